"""What every command line shares: errors as people and programs read them, exit codes, tables.

A command's result goes to stdout, everything else to stderr. Text that others wrote (names, evidence) is shown with
every character that could steer a terminal made visible.
"""

import errno
import json
import os
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedpact_contract.canonical import HIDDEN
from fedpact_contract.errors import FailedError, FedpactError, InputError, RefusedError

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.table import Table

    from fedpact_contract.group import Group

INTERRUPTED = 130

OUTWARD = "its ends are rounded outward"
"""How `format_interval` rounds; it stands once beside the intervals that are shown."""


def run(main: "Callable[[], object] | typer.Typer", *, extra: str = "server") -> NoReturn:
    """Run a command line and leave the process with its exit code.

    Args:
        main: A typer app, or a function; an integer that it returns is the exit code.
        extra: The extra of the package that brings what this program imports on use.

    Raises:
        SystemExit: always.
    """
    as_json = "--json" in sys.argv[1:]
    try:
        code = _call(main)
    except FedpactError as err:
        code = show_error(err, as_json=as_json)
    except KeyboardInterrupt:
        code = INTERRUPTED
        _stderr("Interrupted.")
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not write to it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except ModuleNotFoundError as err:
        missing = err.name or ""
        if missing.partition(".")[0].startswith("fedpact_"):
            code = _unexpected(err, as_json=as_json)
        else:
            code = show_error(extra_missing(f"This command needs the package {missing}.", extra), as_json=as_json)
    except OSError as err:
        code = show_error(_system_error(err), as_json=as_json)
    except Exception as err:  # noqa: BLE001 - the rim: nothing above us shows an unexpected error to a person
        if _interrupted(err):
            code = INTERRUPTED
            _stderr("Interrupted.")
        else:
            code = _unexpected(err, as_json=as_json)
    raise SystemExit(code)


def command_line(help_text: str, cls: "type[Group] | None" = None) -> "typer.Typer":
    """A typer app as all of ours are; `cls` is its group, if it is a special one."""
    import typer

    from fedpact_contract.group import Group

    return typer.Typer(
        cls=cls or Group,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def read_passphrase(file: Path | None, whose: str, *, new: bool = False) -> bytes:
    """A passphrase, from a file or asked for; a new one is asked for twice. Never from argv or the environment.

    Args:
        file: Its first line is the passphrase.
        whose: The key that it opens, as in "the contract key".
        new: Ask twice.

    Raises:
        InputError: PASSPHRASE_NEEDED, nobody can be asked; or as `first_line`.
    """
    import typer

    if file is not None:
        return first_line(file, "passphrase")
    if not sys.stdin.isatty():
        raise InputError(
            "PASSPHRASE_NEEDED",
            f"The passphrase of {whose} is needed, and there is no terminal to ask for it.",
            remedy="Give --passphrase-file FILE (mode 600).",
        )
    text: str = typer.prompt(f"Passphrase of {whose}", hide_input=True, confirmation_prompt=new, err=True)
    return text.encode()


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless --yes was given.

    Raises:
        InputError: CONFIRMATION_NEEDED, nobody can be asked.
        RefusedError: DECLINED.
    """
    if not yes and not agree(question):
        raise RefusedError("DECLINED", "The answer was no: nothing was done.")


def agree(question: str) -> bool:
    """Ask a person; no is the default.

    Raises:
        InputError: CONFIRMATION_NEEDED, nobody can be asked.
    """
    if not sys.stdin.isatty():
        raise InputError(
            "CONFIRMATION_NEEDED",
            f"This must be confirmed, and there is no terminal to ask at: {question}",
            remedy="Answer at a terminal, or give --yes.",
        )
    import typer

    return bool(typer.confirm(visible(question), default=False, err=True))


def first_line(path: Path, what: str) -> bytes:
    """The first line of a file that holds a secret.

    Raises:
        InputError: SECRET_FILE, missing, unreadable or empty; SECRET_FILE_MODE, readable by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(
                "SECRET_FILE_MODE", f"Others can read the {what} file.", file=path, remedy=f"Run: chmod 600 {path}"
            )
        found = path.read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
    except OSError as err:
        raise InputError("SECRET_FILE", f"The {what} file cannot be read: {err.strerror}.", file=path) from err
    if not found:
        raise InputError("SECRET_FILE", f"The first line of the {what} file is empty.", file=path)
    return found


def show_error(err: FedpactError, *, as_json: bool) -> int:
    """Show an error, as {"error": {...}} on stdout or in red on stderr; returns its exit code.

    In Chinese a refusal's sentence stands first, and what the program found out below it as it was said.
    """
    if as_json:
        emit_json({"error": err.as_dict()})
    else:
        from rich.text import Text

        from fedpact_contract.language import language
        from fedpact_contract.refusals import chinese, place

        console, lang = error_console(), language()
        said = chinese(err.code) if lang == "zh" else None
        console.print(
            Text.assemble((f"{err.code}: ", "bold red"), (said or visible(err.message), "red")), soft_wrap=True
        )
        if said:
            console.print(Text(f"  {visible(err.message)}"), soft_wrap=True)
        for name in ("file", "field", "party", "rule", "remedy"):
            if value := getattr(err, name):
                console.print(Text(f"  {place(name, visible(value), lang)}"), soft_wrap=True)
    return err.exit_code


def extra_missing(message: str, extra: str) -> InputError:
    """The error for a command whose extra is not installed."""
    return InputError("EXTRA_MISSING", message, remedy=f"Run: pip install 'fedpact[{extra}]'")


def emit_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """One JSON value on stdout, on one line; characters that could steer a terminal stand as JSON escapes."""
    text = json.dumps(value, ensure_ascii=not _utf8())
    sys.stdout.write("".join(json.dumps(c)[1:-1] if unicodedata.category(c) in HIDDEN else c for c in text) + "\n")
    sys.stdout.flush()


def console() -> "Console":
    """A rich console on stdout; markup in the text is shown, not obeyed."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def line(text: str = "") -> None:
    """One line on stdout; characters that could steer a terminal are made visible."""
    console().print(visible(text), soft_wrap=True)


def error_console() -> "Console":
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def table(
    target: "Console", columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """A plain table; `right` are the columns that are set flush right. Cells are made visible.

    Headers and first cells may stand on several lines, broken between words, where the console is too narrow; nothing
    else is broken. Where that is not enough, each row becomes a block of its own, named by its first cell.
    """
    from rich.text import Text

    widest = [max((len(row[place]) for row in rows), default=0) for place in range(len(columns))]
    narrow = [c.replace(" ", "\n") if len(c) > width else c for c, width in zip(columns, widest, strict=True)]
    for heads in (columns, narrow):
        made = _table(heads, rows, right)
        over = target.measure(made, options=target.options.update(max_width=_UNBOUNDED)).maximum - target.width
        if over <= 0:
            target.print(made)
            return
    names = target.measure(Text("\n".join([columns[0], *(visible(row[0]) for row in rows)])))
    if names.maximum - over >= names.minimum:
        made.columns[0].width, made.columns[0].no_wrap = names.maximum - over, False
        target.print(made)
    else:
        _print_blocks(target, columns, rows)


def format_share(share: str | Decimal) -> str:
    """A share of the pool for people: percent with two decimals, half to even."""
    return f"{_percent(share, ROUND_HALF_EVEN)} %"


def format_interval(low: str | Decimal, high: str | Decimal) -> str:
    """The interval of a share for people: percent with two decimals.

    Its ends are rounded outward, the low one down and the high one up, as they were when they were computed: what is
    shown is never narrower than what was found.
    """
    return f"{_percent(low, ROUND_FLOOR)} - {_percent(high, ROUND_CEILING)} %"


def counted(number: int, noun: str) -> str:
    """So many of something: 1 round, 2 rounds. For nouns that take an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def visible(text: str) -> str:
    """The text with control characters, direction marks and the like spelt out in ASCII, and line ends as they are."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text)


_UNBOUNDED = 1_000_000


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for place, head in enumerate(heads):
        result.add_column(head, justify="right" if place in right else "left", no_wrap=True)
    for row in rows:
        result.add_row(*(Text(visible(cell)) for cell in row))
    return result


def _print_blocks(target: "Console", columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as its first cell and, under it, a line for every other cell that is not empty."""
    from rich.table import Table
    from rich.text import Text

    for row in rows:
        target.print(Text(f"{columns[0]} {visible(row[0])}", "bold"), soft_wrap=True)
        block = Table.grid(padding=(0, 2), pad_edge=True)
        block.add_column(overflow="fold")
        block.add_column(overflow="fold")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                block.add_row(column, Text(visible(cell)))
        target.print(block)


def _percent(share: str | Decimal, rounding: str) -> str:
    return str((Decimal(share) * 100).quantize(Decimal("0.01"), rounding))


def _call(main: "Callable[[], object] | typer.Typer") -> int:
    import click
    import typer

    try:
        result = main(standalone_mode=False) if isinstance(main, typer.Typer) else main()
    except click.exceptions.Exit as err:
        return int(err.exit_code)
    except click.Abort as err:
        raise KeyboardInterrupt from err
    except click.exceptions.NoArgsIsHelpError as err:
        err.show()
        return InputError.exit_code
    except click.UsageError as err:
        hint = err.ctx.command_path if err.ctx else ""
        remedy = f"Run: {hint} --help" if hint else ""
        param = err.param if isinstance(err, click.BadParameter) else None
        raise InputError("USAGE", err.format_message(), field=param.opts[0] if param else None, remedy=remedy) from err
    except click.ClickException as err:
        raise InputError("USAGE", err.format_message()) from err
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _system_error(err: OSError) -> FedpactError:
    reason = err.strerror or type(err).__name__
    if err.filename is None:
        return FailedError("SYSTEM", f"The operating system refuses: {reason}.")
    return InputError(
        "FILE_ACCESS",
        f"A file cannot be used: {reason}.",
        file=os.fsdecode(err.filename),
        remedy=_ACCESS.get(err.errno or 0, "Check the path, and who may use it."),
    )


_ACCESS = {
    errno.ENOENT: "Check the path. A new file goes only into a folder that exists.",
    errno.ENOTDIR: "Check the path: a part of it is a file, not a folder.",
    errno.EISDIR: "Name a file; this is a folder.",
    errno.EACCES: "Check who may read it, or write into its folder.",
}
"""What to do about a file that cannot be used, by the system's error."""


def _interrupted(err: BaseException) -> bool:
    """Whether Ctrl-C is behind the error: Python wraps it where it strikes within an import."""
    seen: BaseException | None = err
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _unexpected(err: BaseException, *, as_json: bool) -> int:
    """An error that nobody foresaw: one line for the person, the details in a file that only its owner reads."""
    if os.environ.get("FEDPACT_DEBUG") == "1":
        raise err
    handle, path = tempfile.mkstemp(prefix="fedpact-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as out:
        out.write("".join(traceback.format_exception(err)))
    problem = FailedError(
        "INTERNAL",
        f"An unexpected error: {type(err).__name__}.",
        file=path,
        remedy="Please report it with this file, once you have read what is in it.",
    )
    return show_error(problem, as_json=as_json)


def _stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
