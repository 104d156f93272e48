"""Where a key stands in a TOML file that a person wrote, so that a fault names its line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fedpact_contract.errors import InputError


@contextmanager
def naming_lines(text: str, file: object) -> Iterator[None]:
    """Whatever is found wrong with this file's text names FILE:LINE, where its field is found there.

    Raises:
        InputError: as what is done within; `file` is FILE:LINE.
    """
    try:
        yield
    except InputError as err:
        if err.file == str(file) and (line := locate(text, err.field or "")):
            err.file = f"{file}:{line}"
        raise


def locate(text: str, field: str) -> int | None:
    """The line (from 1) of the key that a dotted field path names, or of the deepest table on the way to it.

    Understands what people write: [table] and [[table]] headers and one `key = value` a line.
    """
    wanted = field.split(".")
    best: tuple[int, int] | None = None
    here: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line):
            here = _table(header.group(2), seen, array=header.group(1) == "[[")
            path = here
        elif key := re.match(r"^\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*=", line):
            path = [*here, key.group(1).strip("\"'")]
        else:
            continue
        depth = _common(path, wanted)
        if depth == len(path) and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _table(name: str, seen: dict[str, int], *, array: bool) -> list[str]:
    """The path of a table, with the index that pydantic gives to an element of an array of tables."""
    parts = [p.strip().strip("\"'") for p in name.split(".")]
    path: list[str] = []
    for depth, part in enumerate(parts):
        path.append(part)
        key = ".".join(path)
        if array and depth == len(parts) - 1:
            seen[key] = seen.get(key, -1) + 1
        if key in seen:
            path.append(str(seen[key]))
    return path


def _common(path: list[str], wanted: list[str]) -> int:
    count = 0
    for a, b in zip(path, wanted, strict=False):
        if a != b:
            break
        count += 1
    return count
