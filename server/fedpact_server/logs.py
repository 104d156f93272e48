"""Where the operator's log goes: JSON lines in a file, or text on stderr; never stdout, which is for results."""

import logging
import sys
from pathlib import Path
from typing import TextIO, cast

import structlog


def configure_logging(path: Path | None = None, *, level: int = logging.INFO) -> None:
    """Log to a file, which is appended to, or to stderr; warnings of other libraries go the same way.

    Args:
        path: The file.
        level: What our own log shows: from this level of `logging` on.
    """
    stream = cast(TextIO, _Stderr()) if path is None else path.open("a", encoding="utf-8", buffering=1)
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if path is None
        else structlog.processors.JSONRenderer()
    )
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    structlog.configure(
        processors=[structlog.processors.add_log_level, stamp, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(
        stream=stream,
        level=max(level, logging.WARNING),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )


class _Stderr:
    """Whatever stderr is when something is written."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()
