"""A whole home in one file: keys, configuration, trust, ledgers; what is made anew stays out (`MADE_ANEW`).

The ledgers are copied as of their last commit, also while the agent runs. The file is as secret as the keys in it: the
node key and the run keys have no passphrase. The witness stays out: what puts back old ledgers must not put it back.
"""

import io
import os
import secrets
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from fedpact_client import sandbox
from fedpact_client.home import AgentHome
from fedpact_client.store import Store
from fedpact_contract.errors import InputError
from fedpact_contract.files import make_home, refuse_existing, sync_folder
from fedpact_contract.keys import write_private

MADE_ANEW = ("logs", "flower", "loaded", "scratch", "state.json", "guard.lock")
NEEDED = ("agent.toml", "agent.db", "keys/contract.key", "keys/contract.pub", "keys/node.key")
MAX_BYTES = 1 << 34
"""Of one file in a backup."""


def save(home: AgentHome, store: Store, out: Path) -> int:
    """Write a home into a new file, which is its owner's alone and there only once it is whole; how many files.

    Raises:
        InputError: FILE_EXISTS.
        FailedError: STORE_*, the ledgers cannot be copied.
    """
    refuse_existing(out)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    names = sorted(_names(home))
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            ledgers = Path(scratch) / "agent.db"
            store.backup(ledgers)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a handle
                with tarfile.open(fileobj=file, mode="w") as archive:
                    for name in names:
                        archive.add(home.path / name, name, recursive=False)
                    archive.add(ledgers, "agent.db")
                file.flush()
                os.fsync(file.fileno())
        draft.replace(out)
        sync_folder(out.absolute().parent)
    finally:
        draft.unlink(missing_ok=True)
    return len(names) + 1


def unpack(file: Path, path: Path) -> AgentHome:
    """Make a home of a backup: whole, or not at all; nothing is overwritten.

    Raises:
        InputError: BACKUP_FORM, the file is no whole backup of a home; HOME_EXISTS, HOME_IN_INSTALLATION.
    """
    path = path.expanduser().absolute()
    sandbox.check_home(path)
    try:
        with tarfile.open(file, mode="r:") as archive:
            members = {_safe(member, file): member for member in archive}
            if lacking := [name for name in NEEDED if name not in members]:
                raise _no_backup(file, f"it lacks {lacking[0]}")
            make_home(path, lambda build: _fill(archive, members, build))
    except (tarfile.TarError, EOFError) as err:
        raise _no_backup(file, str(err) or "it ends too early") from err
    return AgentHome(path)


def _names(home: AgentHome) -> set[str]:
    """The files to keep, by their place in the home; the ledgers are copied by themselves."""
    found = set()
    for place in home.path.rglob("*"):
        name = place.relative_to(home.path)
        ledgers = name.name.startswith("agent.db") and len(name.parts) == 1
        drafted = name.parts[0].startswith(".state.json.")  # the running agent's, gone in a moment
        anew = drafted or name.parts[0] in MADE_ANEW
        if place.is_file() and not place.is_symlink() and not anew and not ledgers:
            found.add(name.as_posix())
    return found


def _safe(member: tarfile.TarInfo, file: Path) -> str:
    """The member's name, if it is an ordinary file that stays below the home."""
    name = PurePosixPath(member.name)
    if not member.isfile() or name.is_absolute() or ".." in name.parts or member.size > MAX_BYTES:
        raise _no_backup(file, f"{member.name[:100]!r} is no plain file of a home")
    return str(name)


def _fill(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], build: Path) -> None:
    for name, member in members.items():
        place = build / name
        for above in reversed(place.relative_to(build).parents[:-1]):
            (build / above).mkdir(mode=0o700, exist_ok=True)
        write_private(place, (archive.extractfile(member) or io.BytesIO()).read())
    for folder in ("keys/run", "operator", "released", "logs"):
        (build / folder).mkdir(mode=0o700, exist_ok=True)


def _no_backup(file: Path, why: str) -> InputError:
    return InputError(
        "BACKUP_FORM",
        f"This is no whole backup of an agent's home: {why}.",
        file=file,
        remedy="Give a file that `fedpact-agent backup --whole` wrote.",
    )
