"""`fedpact-agent preflight`: what this machine and the way to the operator lack, before a round would find out.

Each finding is one of pass, warn, fail and skip, with what to do in a sentence. Nothing is assumed: files are written
and flushed, the walls of trainer and executor are tried in processes of their own, rows are read, and as much is posted
to the operator as an update would be. It changes nothing that is decided by; what leaves is in the egress ledger.
`preflight_network` has what goes to the operator.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import shutil
import subprocess  # this very Python, a list of arguments
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedpact_client import sandbox, store_witness
from fedpact_client.config import AgentConfig
from fedpact_client.home import AgentHome
from fedpact_client.store import Agreement, Store
from fedpact_client.store_records import OVER
from fedpact_contract import __version__
from fedpact_contract.errors import FedpactError, InputError
from fedpact_contract.files import sync_folder
from fedpact_contract.record import Part

if TYPE_CHECKING:
    from fedpact_client.preflight_network import Way

State = Literal["pass", "warn", "fail", "skip"]
MEBIBYTE = 1 << 20
FREE_BYTES = 64 * MEBIBYTE
"""Free space that the ledgers want at least, beside the updates that wait in the outbox."""
KEPT_UPDATES = 3
"""Updates of one contract that may wait in the outbox at once: until the log decides on a round, and spare attempts."""
SLOW_SECONDS = 1.0
"""A flush that takes longer holds every round up: an attempt flushes some ten times."""
PROBE_SECONDS = 60.0

FIXES = {
    "namespace": "Allow user namespaces to ordinary users: sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container or unit, do not "
    "forbid `unshare`.",
    "Landlock": "Use a kernel with Landlock (Linux 5.13; 6.12 for all of it), with `landlock` among its lsm= modules; "
    "in a container or unit, do not forbid its system calls.",
    "TCP": "Linux 6.7 has Landlock ABI 4.",
    "signalled": "Linux 6.12 has Landlock ABI 6; until then run the agent as a user of its own.",
    "cut short": "Linux 6.2 has Landlock ABI 3.",
    "filter": "In a container or unit, do not forbid seccomp; the filter knows x86_64 and aarch64.",
}
"""What to do about a wall that is missing, by a word of how it is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found. `code` is the error's, where it failed by one of ours; `remedy` says what to do."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    code: str | None = None

    def plain(self) -> dict[str, str]:
        """As JSON; empty parts are left out."""
        parts = {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "remedy": self.remedy,
            "code": self.code or "",
        }
        return {key: value for key, value in parts.items() if value}


def failed(name: str, err: FedpactError, remedy: str = "") -> Finding:
    """A check that failed by an error of ours."""
    places = [f"{part}: {value}" for part in ("file", "field") if (value := getattr(err, part))]
    detail = " ".join([err.message, *(f"({place})" for place in places)])
    return Finding(name=name, state="fail", detail=detail, remedy=err.remedy or remedy, code=err.code)


def tried(name: str, check: Callable[[], Finding | str], remedy: str = "") -> Finding:
    """A check's own finding, or a pass with its words; an error of ours, or of the system, is a failure."""
    try:
        found = check()
    except FedpactError as err:
        return failed(name, err, remedy)
    except OSError as err:
        detail = f"The operating system refuses: {err.strerror or err} ({err.filename or 'no file'})."
        return Finding(name=name, state="fail", detail=detail, remedy=remedy, code="SYSTEM")
    return found if isinstance(found, Finding) else Finding(name=name, state="pass", detail=found)


@contextlib.contextmanager
def ledgers(home: AgentHome, config: AgentConfig, found: list[Finding]) -> Iterator[Store | None]:
    """The store, opened as every command does, and noted what came of it; none where it cannot be used."""
    witness = None if config.paths.witness is None else Path(config.paths.witness)
    try:
        store = Store(home.db_path, witness=witness, participant=home.participant_id)
    except FedpactError as err:
        found.append(failed("ledgers", err))
        yield None
        return
    with store:
        rows = sum(len(store.rows(d.data_set)) for d in store.data_sets())
        found.append(Finding(name="ledgers", state="pass", detail=f"whole, each row's signature verified: {rows}"))
        yield store


def run(path: Path, invitation: Path | None = None, *, offline: bool = False) -> list[Finding]:
    """Every check, in the order in which people look for a fault.

    Args:
        path: The agent's home.
        invitation: Before enrolment: where the operator is, and who.
        offline: Send nothing.

    Raises:
        InputError: HOME_MISSING.
    """
    from fedpact_client.api import egress_of
    from fedpact_client.preflight_network import network, post_bytes

    home, found = _home(path), list[Finding]()
    config = _configuration(home, found)
    if config is None:
        return [*found, *machine(home, [])]
    with ledgers(home, config, found) as store:
        running = [] if store is None else [a for a in store.contracts() if a.state not in OVER]
        found += machine(home, running)
        found += configured(home, config)
        found += data(home, config, store, running)
        record = None if store is None else egress_of(store)
        if offline:
            found.append(Finding(name="operator", state="skip", detail="nothing was to be sent"))
        elif (way := _way(home, config, invitation, found)) is not None:
            found += network(home, way, record, post_bytes(running))
    return found


def _home(path: Path) -> AgentHome:
    """The home; that others can enter it is for `files` to say."""
    home = AgentHome(path.expanduser().absolute())
    try:
        return home.check()
    except InputError as err:
        if err.code != "HOME_MODE":
            raise
    return home


def _configuration(home: AgentHome, found: list[Finding]) -> AgentConfig | None:
    try:
        config = home.config()
    except InputError as err:
        found.append(failed("configuration", err))
        return None
    found.append(Finding(name="configuration", state="pass", detail="agent.toml: every key known and of its form"))
    return config


def _way(home: AgentHome, config: AgentConfig, invitation: Path | None, found: list[Finding]) -> "Way | None":
    """Where the operator is; None, and why, where nothing says so."""
    from fedpact_client.enrol import read_invitation
    from fedpact_client.preflight_network import Way
    from fedpact_contract.request import utc_now

    try:
        if invitation is not None:
            return Way.of_invitation(read_invitation(invitation, config.agent.entity_code, utc_now()))
        return Way.of_home(home)
    except FedpactError as err:
        if invitation is None and err.code == "NOT_ENROLLED":
            detail, remedy = "this home is not enrolled yet", "Give the operator's invitation: --invitation FILE."
            found.append(Finding(name="operator", state="skip", detail=detail, remedy=remedy))
        else:
            found.append(failed("invitation" if invitation is not None else "operator", err))
        return None


def machine(home: AgentHome, running: list[Agreement]) -> Iterator[Finding]:
    """What no configuration is needed for: files, software, disk, walls."""
    yield tried("user", user)
    yield tried("files", lambda: files(home), "Give the agent's user its home back: chown -R USER HOME.")
    yield tried("home", lambda: check_place(home))
    yield from software(running)
    yield tried(
        "disk", lambda: disk(home.path, needed(running)), "Give the home a local disk that this user may write to."
    )
    for name in sandbox.PROBED:
        if name != "loader":
            yield isolation(name)


def configured(home: AgentHome, config: AgentConfig) -> Iterator[Finding]:
    """What agent.toml asks of the machine."""
    yield tried("threads", lambda: threads(config.limits.threads))
    yield tried("memory", lambda: memory(config.limits.memory))
    yield tried("witness", lambda: witness(config, home))


def user() -> Finding | str:
    """An ordinary user runs the agent."""
    if os.geteuid() == 0:
        return Finding(
            name="user",
            state="warn",
            detail="this is root: the agent needs none of its rights",
            remedy="Make a user for the agent alone (scripts/fedpact-agent.service has one) and give it the home.",
        )
    return f"an ordinary user, number {os.geteuid()}"


def files(home: AgentHome) -> Finding | str:
    """Everything in the home is this user's, and nobody else can read or write it."""
    found = [home.path, *sorted(p for p in home.path.rglob("*") if not p.is_symlink())]
    open_to_others = [p for p in found if p.stat().st_mode & 0o077 and (p.is_dir() or _matters(p, home))]
    foreign = [p for p in found if p.stat().st_uid != os.geteuid()]
    if foreign:
        detail = f"{foreign[0]} is another user's ({len(foreign)} such)"
        remedy = f"Run the agent as the user whose home it is, or: chown -R {os.geteuid()} {home.path}"
        return Finding(name="files", state="fail", detail=detail, remedy=remedy, code="HOME_OWNER")
    if open_to_others:
        detail = f"others may use {', '.join(map(str, open_to_others[:3]))} ({len(open_to_others)} such)"
        remedy = f"Run: chmod -R go= {home.path}"
        return Finding(name="files", state="fail", detail=detail, remedy=remedy, code="HOME_MODE")
    return f"{len(found)} files and folders, this user's alone"


def _matters(path: Path, home: AgentHome) -> bool:
    """Keys, ledgers, configuration, trust: what Flower's side and the data's owner put here has modes of their own."""
    top = path.relative_to(home.path).parts[0]
    return top in {"keys", "operator", "released", "silence", "agent.toml", "agent.db", "trust.toml", "state.json"}


def check_place(home: AgentHome) -> str:
    """The home lies where trainer and executor cannot read it.

    Raises:
        InputError: HOME_IN_INSTALLATION.
    """
    sandbox.check_home(home.path)
    return "outside of what trainer and executor may read"


def software(running: list[Agreement]) -> Iterator[Finding]:
    """Python and libraries are those that this release asks for, its code the one that signed contracts name."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    metadata = importlib.metadata.metadata("fedpact")
    python, wanted = platform.python_version(), SpecifierSet(metadata["Requires-Python"])
    wrong = [] if python in wanted else [f"Python {python} (it wants {wanted})"]
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    needs = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": "agent"})]
    for need in needs:
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} (it wants {need.specifier})")
    if wrong:
        remedy = f"Install the release anew: pip install 'fedpact[agent]=={__version__}'"
        yield Finding(name="software", state="fail", detail="; ".join(wrong), remedy=remedy, code="SOFTWARE")
    else:
        detail = f"fedpact {__version__}, Python {python}, and {len(needs)} libraries in the versions that it asks for"
        yield Finding(name="software", state="pass", detail=detail)
    for agreement in running:
        yield tried(f"code of contract {agreement.contract_id[:8]}", partial(_code, agreement))


def _code(agreement: Agreement) -> str:
    from fedpact_client.review import check_code

    check_code(agreement.contract)
    return f"the training code that it names (release {agreement.contract.code.release}) is installed"


def threads(wanted: int) -> Finding | str:
    """`limits.threads` are there to be used."""
    there: float = len(os.sched_getaffinity(0))
    if (share := _cgroup("cpu.max")) is not None and share[0] != "max":
        there = min(there, int(share[0]) / int(share[1]))
    if wanted > there:
        detail = f"limits.threads is {wanted}; this process may use {there:g} processors"
        remedy = f"Set limits.threads to {max(1, int(there))} in agent.toml: more are slower, not faster."
        return Finding(name="threads", state="warn", detail=detail, remedy=remedy)
    return f"{wanted} of {there:g} processors"


def memory(mebibytes: int) -> Finding | str:
    """`limits.memory` is there, and free now."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    kibibytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total, free = kibibytes["MemTotal"] >> 10, kibibytes["MemAvailable"] >> 10
    if (limit := _cgroup("memory.max")) is not None and limit[0] != "max":
        total = min(total, int(limit[0]) >> 20)
    if (hard := resource.getrlimit(resource.RLIMIT_DATA)[1]) != resource.RLIM_INFINITY:
        total = min(total, hard >> 20)
    free = min(free, total)
    if mebibytes > total:
        detail = f"limits.memory is {mebibytes} MiB; this machine, or the unit, gives {total} MiB"
        remedy = "Lower limits.memory in agent.toml, or give the agent more (MemoryMax=, LimitDATA= of its unit)."
        return Finding(name="memory", state="fail", detail=detail, remedy=remedy, code="MEMORY")
    if mebibytes > free:
        detail = f"limits.memory is {mebibytes} MiB, and {free} MiB of {total} are free now"
        remedy = "Lower limits.memory in agent.toml, or end what else needs the memory while rounds run."
        return Finding(name="memory", state="warn", detail=detail, remedy=remedy)
    return f"{mebibytes} MiB of {free} MiB free"


def _cgroup(name: str) -> list[str] | None:
    """A limit of this process's control group (version 2), the nearest above it that is set; None where none is."""
    try:
        place = Path("/proc/self/cgroup").read_text("ascii").strip().rpartition(":")[2]
    except OSError:
        return None
    folder, root = Path("/sys/fs/cgroup") / place.lstrip("/"), Path("/sys/fs/cgroup")
    while folder.is_relative_to(root):
        with contextlib.suppress(OSError):
            if (words := (folder / name).read_text("ascii").split()) and words[0] != "max":
                return words
        folder = folder.parent
    return None


def needed(running: list[Agreement]) -> int:
    """Bytes that the home's disk should have free."""
    from fedpact_models.registry import parameter_count

    sizes = [4 * parameter_count(a.contract.model, a.contract.data) for a in running]
    return FREE_BYTES + KEPT_UPDATES * sum(sizes)


def disk(folder: Path, wanted: int) -> Finding | str:
    """The home's disk has room, and a flush to it comes back."""
    free = shutil.disk_usage(folder).free
    draft = folder / f".preflight.{secrets.token_hex(4)}"
    began = time.monotonic()
    try:
        with draft.open("xb") as out:
            out.write(bytes(MEBIBYTE))
            out.flush()
            os.fsync(out.fileno())
        sync_folder(folder)
    finally:
        draft.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if free < wanted:
        detail = f"{_mebibytes(free)} are free, and ledgers and outbox want {_mebibytes(wanted)}"
        remedy = f"Free space on the disk of {folder}."
        return Finding(name="disk", state="fail", detail=detail, remedy=remedy, code="DISK_SPACE")
    if seconds > SLOW_SECONDS:
        detail = f"a flush of 1 MiB took {seconds:.1f} s"
        remedy = "Put the home on a local disk: every attempt waits for some ten flushes."
        return Finding(name="disk", state="warn", detail=detail, remedy=remedy)
    return f"{_mebibytes(free)} free of {_mebibytes(wanted)} wanted; a flush of 1 MiB took {seconds * 1000:.0f} ms"


def _mebibytes(number: int) -> str:
    return f"{number / MEBIBYTE:,.0f} MiB"


def witness(config: AgentConfig, home: AgentHome) -> Finding | str:
    """A witness is configured, can be written, and does not lie on the home's own disk.

    Raises:
        FailedError, InputError: as `store_witness`.
    """
    if config.paths.witness is None:
        return Finding(
            name="witness",
            state="warn",
            detail="none is configured: an old copy of the ledgers that is put back is noticed by the head in the "
            "operator's log alone, so not where the operator conspires with whoever put it back",
            remedy="Set paths.witness in agent.toml to a file on another disk, outside of the home's backups.",
        )
    path = Path(config.paths.witness)
    store_witness.check_writable(path)
    store_witness.read_witness(path)
    if path.parent.stat().st_dev == home.path.stat().st_dev:
        detail = f"{path} lies on the disk of the home: what puts that back puts the witness back with it"
        remedy = "Put it on another disk, outside of the home's backups and snapshots."
        return Finding(name="witness", state="warn", detail=detail, remedy=remedy)
    return f"{path}, on another disk"


class Probe(Part):
    """What a process in the walls of trainer or executor says (`sandbox`)."""

    isolation: sandbox.Isolation
    memory_limited: bool


def isolation(name: str) -> Finding:
    """What the walls of one process are on this machine, tried from inside of one that closes itself in likewise."""
    line = [sys.executable, "-I", "-m", "fedpact_client.sandbox", name]
    env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    title = f"isolation of the {name}"
    try:
        done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=PROBE_SECONDS, check=True)  # noqa: S603 - this very Python
        probe = Probe.parse(json.loads(done.stdout), code="PROBE")
    except (subprocess.SubprocessError, ValueError, InputError) as err:
        said = getattr(err, "stderr", None) or str(err)
        detail = f"the process that tries it did not tell: {str(said).strip()[-300:]}"
        return Finding(name=title, state="fail", detail=detail, remedy="Report this fault of Fedpact.", code="PROBE")
    return judged(title, probe)


def judged(title: str, probe: Probe) -> Finding:
    """Fail where something is open that nothing else closes; warn where a second wall is missing before a first."""
    found = probe.isolation
    missing = [*found.missing, *([] if probe.memory_limited else ["its memory is not limited"])]
    open_now = [
        *([] if found.landlock_abi else ["files of this user can be read and written, keys among them"]),
        *([] if found.network_kept or _offline(found) else ["the network can be reached"]),
        *([] if probe.memory_limited else ["no limit holds for its memory"]),
    ]
    if not missing:
        walls = f"Landlock ABI {found.landlock_abi}, no new privileges, memory limited"
        closed = "TCP and sockets refused" if found.sockets_denied else "no network but its own loopback"
        more = "; the network that it needs" if found.network_kept else f"; own namespaces, {closed}"
        return Finding(name=title, state="pass", detail=walls + more)
    remedy = " ".join(dict.fromkeys(fix for word, fix in FIXES.items() if any(word in m for m in missing)))
    remedy = remedy or "Run the agent outside of what takes these rights from it."
    if open_now:
        detail = f"{'; '.join(open_now)}. Missing: {'; '.join(missing)}"
        return Finding(name=title, state="fail", detail=detail, remedy=remedy, code="NOT_ISOLATED")
    return Finding(name=title, state="warn", detail=f"closed, by fewer walls: {'; '.join(missing)}", remedy=remedy)


def _offline(found: sandbox.Isolation) -> bool:
    """Whether one wall at least keeps the process from every network."""
    return found.user_and_network_namespace or found.sockets_denied


def data(home: AgentHome, config: AgentConfig, store: Store | None, running: list[Agreement]) -> Iterator[Finding]:
    """Each data set can be read and has what its card says; under each contract by the trainer, closed in."""
    if not config.data_sets:
        detail, remedy = "agent.toml describes none", "Describe it in a [[data_sets]] block; see configs/agent.toml."
        yield Finding(name="data", state="warn", detail=detail, remedy=remedy)
    if any(declared.source.is_database for declared in config.data_sets):
        yield isolation("loader")
    for declared in config.data_sets:
        name = f"data set {declared.id}"
        if store is None:
            yield Finding(name=name, state="skip", detail="the ledgers cannot be used, which know its card")
            continue
        yield tried(name, partial(_data_set, home, config, store, declared.id))
    for agreement in running:
        name = f"rows of contract {agreement.contract_id[:8]}"
        yield tried(name, partial(_rows, home, config, agreement))


def _data_set(home: AgentHome, config: AgentConfig, store: Store, data_set: str) -> str:
    from fedpact_client import cards, review

    declared, known = config.data_set(data_set), store.declared(data_set)
    if known is not None:
        review.check_num_examples(declared, known.declaration)
        _check_card(declared.columns, declared.label, known.declaration.columns, known.declaration.label)
    draft = cards.prepare(home, config, store, data_set)
    card = "as on the signed card" if known is not None else "no card is signed yet"
    return f"{draft.available} rows for {declared.num_examples}; {len(declared.names)} columns, {card}"


def _check_card(columns: tuple[str, ...], label: str, on_card: tuple[str, ...], label_on_card: str) -> None:
    if missing := sorted(set(on_card) - set(columns)):
        raise InputError(
            "CARD_COLUMNS",
            f"The signed card names the column {missing[0]}, and agent.toml does not.",
            field="data_sets.columns",
            remedy="Put it back in agent.toml, or sign a new card: fedpact-agent card.",
        )
    if label != label_on_card:
        raise InputError(
            "CARD_LABEL",
            f"The signed card predicts {label_on_card}, agent.toml {label}.",
            field="data_sets.label",
            remedy="Put it back in agent.toml, or sign a new card: fedpact-agent card.",
        )


def _rows(home: AgentHome, config: AgentConfig, agreement: Agreement) -> str:
    from fedpact_client.trial import try_rows

    trial = try_rows(home, config, agreement.contract)
    return f"{trial.num_rows} fit the contract's schema, read by a trainer that is closed in"
