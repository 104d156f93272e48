"""What the agent's commands show: plain JSON values from the store, and the operator's evidence, verified.

Everything here only reads. Figures are recomputed from the ledger and from the evidence; the operator's word alone is
never shown as a result.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from fedpact_client import leaving, silence
from fedpact_client.api import OperatorClient, printable, reply_error
from fedpact_client.facts import Facts
from fedpact_client.home import AgentHome
from fedpact_client.policy import Policy
from fedpact_client.sandbox import Isolation
from fedpact_client.signing import contract_beside
from fedpact_client.store import Agreement, SeenHead, Store
from fedpact_client.store_records import OVER, egress_kind
from fedpact_contract import ledger, merkle
from fedpact_contract.contract import Contract, MeasurementKind
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.evidence import Evidence, unpack
from fedpact_contract.files import refuse_existing, write_new
from fedpact_contract.keys import show_fingerprint
from fedpact_contract.ledger import LedgerRow
from fedpact_contract.log import Entry, MeasurementTaken, ReplyMissed, RoundAbandoned, RoundAggregated, UpdateDecided
from fedpact_contract.messages import Measurement, OperatorSilent, Update
from fedpact_contract.record import decimal_text, read_envelope
from fedpact_contract.verify import Report, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Evidence that holds, and that agrees with what this agent sent and saw.

    `missed`: rounds that the log calls unanswered though this agent made an update.
    """

    files: dict[str, bytes]
    entries: tuple[Entry, ...]
    report: Report
    missed: tuple[int, ...]


def resolve_id(text: str, known: list[str]) -> str:
    """The one id that begins with the text (four characters at least).

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_AMBIGUOUS.
    """
    wanted = text.strip().lower()
    found = sorted({i for i in known if len(wanted) >= 4 and i.startswith(wanted)})
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            "CONTRACT_AMBIGUOUS",
            f"{len(found)} contracts' ids begin with this.",
            field=wanted,
            remedy="Write more of the id; `fedpact-agent contract list` shows them.",
        )
    raise InputError(
        "CONTRACT_UNKNOWN",
        "No contract's id begins with this." if len(wanted) >= 4 else "Four characters of a contract's id are needed.",
        field=printable(wanted, 64),
        remedy="`fedpact-agent contract list` and `fedpact-agent status` show the ids.",
    )


def status(home: AgentHome, store: Store, enrolment: str) -> dict[str, Any]:
    """Who this agent is, whether it runs, and how far its contracts are."""
    config, running = home.config(), running_process(home)
    declared = {d.data_set for d in store.data_sets()}
    facts = Facts.read(home) if running is not None else None
    operator = home.operator().plain() if home.operator_path.exists() else None
    return {
        "participant": home.participant_id,
        "name": config.agent.name,
        "entity_code": config.agent.entity_code,
        "operator": operator,
        "url": config.operator.url or None,
        "enrolment": enrolment,
        "running": running,
        "restart": read_before(home),
        **_facts(facts if facts is not None and facts.process == running else None),
        "witness": store.witness_status(),
        "data_sets": [{"id": d.id, "declared": d.id in declared} for d in config.data_sets],
        "contracts": [_contract_status(home, store, a) for a in store.contracts()],
        "alarms": [
            {"at": a.at, "code": a.code, "contract": a.contract_id, "detail": printable(a.detail)}
            for a in store.alarms()
        ],
    }


def _facts(facts: Facts | None) -> dict[str, Any]:
    """What the running guard knows of itself; nothing where none runs."""
    return {
        "connected": facts.connected if facts else None,
        "waiting": facts.waiting if facts else None,
        "isolation": {
            "trainer": _isolation(facts.trainer if facts else None),
            "executor": _isolation(facts.executor if facts else None),
            **({"loader": _isolation(facts.loader)} if facts and facts.loader else {}),
        },
        "round_times": [time.plain() for time in facts.rounds] if facts else [],
    }


def _isolation(found: Isolation | None) -> dict[str, Any] | None:
    """What holds in a child, by its own word, with one sentence for people; none where it has not said it."""
    return None if found is None else found.plain() | {"sentence": printable(found.sentence)}


def running_process(home: AgentHome) -> int | None:
    """The process id of the guard that runs on this home: the one that its lock file names, if it has that file open.

    After `kill -9` the number stays there, and another process may have it by now.
    """
    path = home.path / "guard.lock"
    with suppress(OSError, ValueError):
        number, lock = int(path.read_text("ascii")), path.stat()
        for handle in Path(f"/proc/{number}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samestat(handle.stat(), lock):
                    return number
    return None


def read_before(home: AgentHome) -> bool:
    """Whether an agent runs that read agent.toml before its last change, and so goes by another policy than is there.

    It writes its lock file when it starts, once it has read agent.toml.
    """
    if running_process(home) is None:
        return False
    return home.config_path.stat().st_mtime_ns > (home.path / "guard.lock").stat().st_mtime_ns


def heads(store: Store, contract_ids: list[str]) -> list[dict[str, Any]]:
    """The newest head of each contract's log that this agent saw, to compare with others by telephone."""
    result = []
    for contract_id in contract_ids:
        seen = store.heads(contract_id)
        last = seen[-1] if seen else None
        result.append(
            {
                "contract": contract_id,
                "size": last.size if last else 0,
                "root": last.root if last else merkle.EMPTY_ROOT.hex(),
                "root_shown": show_fingerprint(last.root if last else merkle.EMPTY_ROOT.hex()),
                "countersigned": bool(last and last.countersigned),
                "seen": len(seen),
            }
        )
    return result


def budget(store: Store, policy: Policy | None = None) -> list[dict[str, Any]]:
    """Each data set's budget: the Rényi sum against its limit, uses, and what each contract has used and left.

    `policy`: its own limits for the data set are shown, too.
    """
    from fedpact_contract.privacy import epsilon_gate

    result = []
    for data_set in store.data_sets():
        rows, standing = store.rows(data_set.data_set), store.budget(data_set.data_set)
        result.append(
            {
                "data_set": data_set.data_set,
                "epsilon": decimal_text(data_set.epsilon),
                "delta": decimal_text(data_set.delta),
                "alpha": decimal_text(standing.alpha),
                "limit": decimal_text(standing.limit),
                "charged": decimal_text(standing.charged),
                "committed": decimal_text(standing.committed),
                "sum_of_limit": share_text(standing.charged, standing.limit),
                "epsilon_gate": epsilon_text(epsilon_gate(standing.charged, data_set.delta, standing.alpha)),
                "ledger_head": store.ledger_head(data_set.data_set),
                "uses": store.uses(data_set.data_set),
                "policy": {
                    "max_uses": policy.max_data_set_uses if policy else None,
                    "max_epsilon": _limit_text(policy.max_data_set_epsilon if policy else None),
                },
                "contracts": [
                    contract_budget(rows, a) for a in store.contracts() if a.terms.data_set == data_set.data_set
                ],
            }
        )
    return result


def _limit_text(value: Decimal | None) -> str | None:
    return None if value is None else decimal_text(value)


def share_text(rdp_sum: Decimal, limit: Decimal) -> str | None:
    """Sum / R, the meter of a data set's budget, rounded up to a thousandth; None where the sum has no bound."""
    if not rdp_sum.is_finite():
        return None
    return decimal_text((rdp_sum / limit).quantize(Decimal("0.001"), ROUND_CEILING))


def contract_budget(rows: tuple[LedgerRow, ...], agreement: Agreement) -> dict[str, Any]:
    """What one contract was charged: steps, their epsilon by PLD, and what is left of its plan."""
    from fedpact_contract.privacy import epsilon_pld

    contract, terms = agreement.contract, agreement.terms
    steps = min(ledger.charged_steps(rows, terms.contract_id), contract.planned_steps)  # several attempts, one release
    whole = ledger.written_off(rows, terms.contract_id)  # then everything planned is charged
    releases = [(m.noise_multiplier, m.sample_rate, m.steps) for m in terms.measurements] if whole else []
    releases = releases or [
        (r.noise_multiplier, r.sample_rate, r.steps) for r in ledger.measured(rows, terms.contract_id)
    ]
    spent = epsilon_pld([(terms.noise_multiplier, terms.sample_rate, steps), *releases], contract.privacy.delta)
    tried = {r.round for r in rows if r.contract_id == terms.contract_id and r.round}
    over = agreement.state in OVER or whole
    return {
        "contract": terms.contract_id,
        "title": contract.title,
        "state": agreement.state,
        "epsilon": decimal_text(contract.privacy.epsilon),
        "epsilon_pld": epsilon_text(spent),
        "steps": steps,
        "planned_steps": contract.planned_steps,
        "measured": sorted(str(r.kind) for r in ledger.measured(rows, terms.contract_id)),
        "rounds": terms.rounds,
        "rounds_used": terms.rounds if whole else len(tried),
        "rounds_left": 0 if over else terms.rounds - max(tried, default=0),
        "attempts_left": 0 if over else max(0, terms.planned_attempts - ledger.attempts(rows, terms.contract_id)),
        **_used_and_left(rows, agreement),
    }


def egress(
    store: Store, contract_id: str | None = None, last: int | None = None, kinds: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Everything that left, oldest first; one contract's, of these kinds, or the last entries only.

    Raises:
        InputError: EGRESS_KIND.
    """
    return [
        {
            "seq": e.seq,
            "at": e.at,
            "kind": e.kind.value,
            "contract": e.contract_id,
            "round": e.round,
            "bytes": e.size,
            "sha256": e.sha256,
            "detail": e.detail,
            "times": e.times,
            "last": e.last,
        }
        for e in store.egress(contract_id, {egress_kind(kind) for kind in kinds}, last)
    ]


def fetch_checked(home: AgentHome, store: Store, client: OperatorClient, contract_id: str) -> Checked:
    """The contract's evidence from the operator: verified against the own trust file, and against what was sent.

    Raises:
        FaultError: the first fault; EVIDENCE_OTHER_CONTRACT; STATEMENT_*.
        ServiceError: the operator does not answer, or not in this form.
    """
    answer = client.evidence(contract_id)
    if not all(isinstance(text, str) for text in answer.values()):
        raise reply_error("the evidence is no text")
    files = {name: text.encode(errors="surrogatepass") for name, text in answer.items()}
    evidence = unpack(files)
    report = verify(evidence, home.trust(), privacy=False)  # the plan was checked before signing
    if report.faults:
        raise _first_fault(report.faults[0])
    if report.contract_id != contract_id:
        raise FaultError(
            "EVIDENCE_OTHER_CONTRACT", "The operator sent another contract's evidence.", field="contract_id"
        )
    missed = check_own(seen(store, contract_id), home.participant_id, evidence)
    entries = tuple(Entry.from_bytes(line) for line in evidence.log)
    return Checked(files=files, entries=entries, report=report, missed=missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What this agent keeps of a contract: heads, the results that orders brought, digests of what it sent.

    `sent`: of its updates by round; `measured`: of its measurements by kind.
    """

    heads: list[SeenHead]
    results: list[tuple[int, bytes]]
    sent: dict[int, str]
    measured: Mapping[MeasurementKind, str] = field(default_factory=dict)


def seen(store: Store, contract_id: str) -> Seen:
    """Read what this agent keeps of a contract, apart from `check_own`: a fault in here is the agent's own.

    Raises:
        InputError: STORE_DAMAGED.
    """
    return Seen(
        heads=store.heads(contract_id),
        results=store.results(contract_id),
        sent=store.sent_updates(contract_id),
        measured=store.sent_measurements(contract_id),
    )


def check_own(seen: Seen, participant_id: str, evidence: Evidence) -> tuple[int, ...]:
    """The log holds what this agent saw and sent; the rounds of its updates that the log calls unanswered.

    Every head seen is a prefix of the log; every result that an order brought stands in it; in every round that the
    log has finished, the update is the one that was sent, and no update stands there that was not; nor a measurement.

    Raises:
        FaultError: STATEMENT_MEASUREMENT, STATEMENT_FORK, STATEMENT_RESULT_MISSING, STATEMENT_RECEIPT_MISSING,
            STATEMENT_RECEIPT_WRONG.
    """
    hashes = [merkle.leaf_hash(line) for line in evidence.log]
    for head in seen.heads:
        if head.size > len(hashes) or merkle.root(hashes[: head.size]).hex() != head.root:
            raise _fault("STATEMENT_FORK", "The log does not continue a head that this agent saw.", f"size {head.size}")
    lines = set(evidence.log)
    for number, body in seen.results:
        if body not in lines:
            raise _fault("STATEMENT_RESULT_MISSING", "A result that this agent was shown is gone.", f"round {number}")
    logged, missed, finished = _own_entries(evidence, participant_id)
    sent = seen.sent
    for number, digest in sorted(sent.items()):
        if number in logged and logged[number] != digest:
            raise _fault("STATEMENT_RECEIPT_WRONG", "The log has another update than was sent.", f"round {number}")
        if number in finished and number not in logged and number not in missed:
            raise _fault("STATEMENT_RECEIPT_MISSING", "The log has no word on the update sent.", f"round {number}")
    for kind, digest in _own_measurements(evidence, participant_id):
        if seen.measured.get(kind) != digest:
            raise _fault("STATEMENT_MEASUREMENT", f"The log has {kind} of this agent that it never sent.", kind)
    for number in sorted(logged.keys() - sent.keys()):
        raise _fault("STATEMENT_RECEIPT_WRONG", "The log has an update that was never sent.", f"round {number}")
    return tuple(sorted(missed & sent.keys()))


def _own_measurements(evidence: Evidence, participant_id: str) -> Iterator[tuple[MeasurementKind, str]]:
    """Kind and digest of what the log says that this agent measured."""
    for line in evidence.log:
        body = Entry.from_bytes(line).open()
        if isinstance(body, MeasurementTaken) and body.participant == participant_id:
            record = Measurement.from_bytes(read_envelope(body.measurement).body)
            yield record.kind, record.array_digest


def statement(checked: Checked, participant_id: str) -> dict[str, Any]:
    """This participant's lines: rounds, and once settled its share and fen, recomputed from the opened scores."""
    from fedpact_contract import report as reports
    from fedpact_contract.settlement import statement as settled_statement

    bodies = [entry.open() for entry in checked.entries]
    built = reports.build(checked.entries)
    contract = _contract_in(checked)
    result = reports.settled(bodies, contract)
    own = next(p for p in checked.report.participants if p.id == participant_id)
    rounds = [
        {"round": line["round"], "outcome": outcome["outcome"], "code": outcome["code"]}
        for line in built["rounds"]
        for outcome in line["outcomes"]
        if outcome["participant"] == participant_id
    ]
    return {
        "contract": contract.id,
        "title": contract.title,
        "participant": own.as_dict(),
        "status": checked.report.status,
        "verdict": checked.report.verdict,
        "exit_code": checked.report.exit_code,
        "notes": list(checked.report.notes),
        "rounds": rounds,
        "sent_but_missed": list(checked.missed),
        "settlement": None if result is None else settled_statement(result, contract, participant_id),
    }


def report_bytes(checked: Checked, client: OperatorClient, form: str, lang: str = "en") -> bytes:
    """The report: as JSON built here from the log; as HTML the operator's page, once its figures are known to be ours.

    Raises:
        FaultError: REPORT_DIFFERS, the operator's figures are not those of the log.
        ServiceError: the operator does not answer.
    """
    import json

    from fedpact_client.home import read_json
    from fedpact_contract import report as reports

    built = reports.build(checked.entries)
    if form == "json":
        return json.dumps(built, ensure_ascii=False, indent=2).encode() + b"\n"
    contract_id = _contract_in(checked).id
    if read_json(client.report(contract_id, "json"), "operator's report") != built:
        raise _fault("REPORT_DIFFERS", "The operator's report is not the one that follows from the log.", "report")
    return client.report(contract_id, form, lang)


def _contract_in(checked: Checked) -> Contract:
    from fedpact_contract.log import ContractSigned

    first = checked.entries[0].open()
    assert isinstance(first, ContractSigned)  # noqa: S101 - verified evidence begins with it
    return Contract.from_bytes(first.signed.contract.body)


def _contract_status(home: AgentHome, store: Store, agreement: Agreement) -> dict[str, Any]:
    contract = agreement.contract
    last = store.answers(agreement.contract_id)
    return {
        "id": agreement.contract_id,
        "title": contract.title,
        "state": agreement.state,
        "data_set": agreement.terms.data_set,
        "rounds": agreement.terms.rounds,
        **_used_and_left(store.rows(agreement.terms.data_set), agreement),
        "updates": len(store.sent_updates(agreement.contract_id)),
        "last_round": max(last, default=0),
        "silence": _silence(home, store, agreement),
        "key_revoked": home.revocation_path(agreement.contract_id).exists(),
        "withdrawal": leaving.receipts(home, agreement.contract_id) if agreement.state == "withdrawn" else None,
    }


def _used_and_left(rows: Sequence[LedgerRow], agreement: Agreement) -> dict[str, Any]:
    """How often a contract has used the data and still may, and until when."""
    terms = agreement.terms
    over = agreement.state in OVER or ledger.written_off(rows, terms.contract_id)
    return {
        "uses": ledger.uses(rows, [terms]),
        "uses_left": 0 if over else ledger.uses_left(rows, terms),
        "not_after": agreement.contract.term.not_after,
    }


def _silence(home: AgentHome, store: Store, agreement: Agreement) -> dict[str, Any] | None:
    """The record that the operator did not close in time, and whether it did later; none where there is none."""
    data = silence.recorded(store, agreement.contract_id)
    if data is None:
        return None
    record = OperatorSilent.from_bytes(read_envelope(data).body)
    path = home.silence_path(agreement.contract_id)
    return {
        "due": record.due,
        "at": record.at,
        "found": record.found,
        "file": str(path),
        "contract_file": str(contract_beside(path, agreement.contract_id)),
        "closed_since": agreement.state == "closed",
    }


def _own_entries(evidence: Evidence, participant_id: str) -> tuple[dict[int, str], set[int], set[int]]:
    """By round the digest of this participant's logged update; rounds called unanswered; rounds that are over."""
    logged: dict[int, str] = {}
    missed: set[int] = set()
    finished: set[int] = set()
    for line in evidence.log:
        body = Entry.from_bytes(line).open()
        if isinstance(body, RoundAggregated | RoundAbandoned):
            finished.add(body.round)
        elif isinstance(body, UpdateDecided) and body.participant == participant_id:
            logged[body.round] = Update.from_bytes(read_envelope(body.update).body).update_digest
        elif isinstance(body, ReplyMissed) and body.participant == participant_id:
            missed.add(body.round)
    return logged, missed, finished


def epsilon_text(value: Any) -> str:  # noqa: ANN401 - Decimal, possibly infinite
    """An epsilon for people and for JSON; beyond 100 they are not told apart."""
    return decimal_text(value) if value.is_finite() else "more than 100"


def _first_fault(fault: dict[str, str]) -> FaultError:
    places = {name: fault.get(name) for name in ("file", "field", "party", "rule")}
    return FaultError(fault["code"], fault["message"], remedy=fault.get("remedy", ""), **places)


def _fault(code: str, message: str, field: str) -> FaultError:
    return FaultError(
        code,
        message,
        field=field,
        party="operator",
        remedy="Keep this agent's home and the evidence, and show both to the other participants.",
    )


def write_evidence(folder: Path, files: dict[str, bytes]) -> None:
    """Write the evidence's files into a new folder, for `fedpact verify`.

    Raises:
        InputError: FILE_EXISTS.
    """
    refuse_existing(folder)
    folder.mkdir()
    for name, data in files.items():  # names are those of the evidence: `unpack` refused others
        write_new(folder / name, data)
