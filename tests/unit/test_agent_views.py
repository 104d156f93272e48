"""What the agent shows: its own ledger's figures, and the operator's evidence held against what was sent and seen."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.evidence_factory import Made, contract_values, key, make_evidence

from fedpact_client import views
from fedpact_client.home import AgentHome, init
from fedpact_client.store import EgressKind, HomeLock, Ready, SeenHead, Store
from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.errors import FaultError, InputError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import public_hex, save_key
from fedpact_contract.ledger import Terms
from fedpact_contract.log import Checkpoint, UpdateDecided
from fedpact_contract.messages import DataSetCard, Update
from fedpact_contract.privacy import epsilon_gate, epsilon_pld, filter_alpha, filter_limit, rdp
from fedpact_contract.record import sign
from fedpact_contract.report import build
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify

PASSPHRASE = b"correct horse"
CONTRACT = Contract.parse(contract_values())
RUN = key("participant 0 run")


def array(number: int) -> bytes:
    """The update of a round, as bytes."""
    return bytes([number]) * 8


@dataclass(frozen=True)
class World:
    home: AgentHome
    store: Store

    @property
    def me(self) -> str:
        return self.home.participant_id

    @property
    def place(self) -> int:
        return sorted(CONTRACT.by_id()).index(self.me)

    def train(self, number: int) -> Ready:
        """One attempt, as the guard makes it."""
        reserved = self.store.reserve(CONTRACT.id, number, "ab" * 32, RUN)
        assert not isinstance(reserved, Ready)
        data = array(number)
        return self.store.complete(reserved, lambda _: (b"reply", data), update_digest(data), RUN)

    def evidence(self, tamper: Callable[[str, Any], Any] | None = None, **options: Any) -> Made:
        """A run in which this participant's updates are those of its own ledger."""

        def own(stage: str, thing: Any) -> Any:
            number = stage.split(":")[1:2]
            if stage.startswith("update:") and stage.endswith(f":{self.place}"):
                assert isinstance(thing, Update)
                thing = thing.model_copy(update={"update_digest": update_digest(array(int(number[0])))})
            return tamper(stage, thing) if tamper else thing

        return make_evidence(tamper=own, **options)

    def see(self, made: Made) -> None:
        """Keep the heads and results that orders would have brought."""
        for envelope in made.checkpoints:
            head = Checkpoint.from_bytes(envelope.body)
            seen = SeenHead(size=head.size, root=head.root, checkpoint=envelope.to_bytes())
            self.store.add_heads(CONTRACT.id, [seen])
        for entry in made.entries:
            if entry.type == UpdateDecided.TYPE and entry.body["participant"] == self.me:
                self.store.add_result(CONTRACT.id, entry.body["round"], entry.to_bytes())

    def check(self, made: Made, **options: Any) -> views.Checked:
        return views.fetch_checked(self.home, self.store, served(made, **options), CONTRACT.id)

    def code(self, made: Made) -> str:
        with pytest.raises(FaultError) as caught:
            self.check(made)
        return caught.value.code


def served(made: Made, report: Any = None) -> Any:
    """An operator that serves this evidence."""
    files = {name: data.decode() for name, data in made.files.items()}

    def answer(contract_id: str, form: str, lang: str = "en") -> bytes:
        assert contract_id == CONTRACT.id
        return json.dumps(report or build(made.entries)).encode() if form == "json" else f"<html {lang}>".encode()

    return SimpleNamespace(evidence=lambda _: files, report=answer)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    home = init(tmp_path / "agent", name="Hospital 1", entity_code=f"{1:018d}", sector="medical", passphrase=PASSPHRASE)
    own = key("participant 0")
    home.contract_key_path.unlink()
    save_key(home.contract_key_path, own, PASSPHRASE)
    replace_file(home.path / "keys" / "contract.pub", public_hex(own).encode())
    replace_file(home.trust_path, Trust.of(CONTRACT).to_toml().encode())
    epsilon, delta = Decimal(8), Decimal("0.00001")
    alpha = filter_alpha(epsilon, delta)
    card = DataSetCard(
        data_set="visits-1",
        participant=home.participant_id,
        num_examples=400,
        columns=("age",),
        label="again",
        epsilon=epsilon,
        delta=delta,
        alpha=alpha,
        released_rows=0,
    )
    delegation = Delegation(contract_id=CONTRACT.id, party=home.participant_id, run_key=public_hex(RUN))
    signed = SignedContract(contract=sign(CONTRACT, own), delegations=(sign(delegation, own),))
    plan = CONTRACT.privacy
    cost = rdp(plan.noise_multiplier, plan.sample_rate, CONTRACT.training.local_steps, alpha)
    with Store(home.db_path) as store:
        store.declare(sign(card, own).to_bytes(), filter_limit(epsilon, delta, alpha))
        terms = Terms.of(CONTRACT, home.participant_id, cost)
        store.add_contract(canonical_bytes(signed.plain()), terms, "keys/run/x.key", public_hex(RUN))
        store.set_state(CONTRACT.id, "running")
        yield World(home, store)


@pytest.fixture
def trained(world: World) -> World:
    world.train(1)
    world.train(2)
    return world


# Evidence


def test_evidence_that_fits_gives_the_own_lines(trained: World) -> None:
    made = trained.evidence()
    trained.see(made)
    checked = trained.check(made)
    values = views.statement(checked, trained.me)
    own = values["participant"]
    assert (values["exit_code"], values["status"]) == (0, "closed")
    assert (own["id"], own["rounds_admitted"], own["held_fen"]) == (trained.me, 2, 0)
    assert own["fen"] == values["settlement"]["line"]["fen"] > 0
    assert values["rounds"] == [{"round": n, "outcome": "admitted", "code": "ADMITTED"} for n in (1, 2)]
    assert values["sent_but_missed"] == []
    assert json.dumps(values)


def test_the_same_result_as_fedpact_verify(trained: World) -> None:
    made = trained.evidence(unsigned=(trained.place,))
    checked = trained.check(made)
    direct = verify(made.evidence, Trust.of(CONTRACT))
    assert checked.report == direct
    own = views.statement(checked, trained.me)["participant"]
    assert own["held_fen"] == own["fen"]
    assert checked.report.exit_code == 4


def test_keys_that_nobody_vouches_for_are_partly_authenticated(trained: World) -> None:
    lines = [p for p in Trust.of(CONTRACT).party if p.role == "operator"]
    replace_file(trained.home.trust_path, Trust(party=tuple(lines)).to_toml().encode())
    assert trained.check(trained.evidence()).report.exit_code == 4


@pytest.mark.parametrize("end", ["opened", "round", "completed", "settled", "closing"])
def test_an_open_run_is_shown_as_far_as_it_goes(trained: World, end: str) -> None:
    made = trained.evidence(end=end)
    trained.see(made)
    values = views.statement(trained.check(made), trained.me)
    assert values["exit_code"] == 4
    assert (values["settlement"] is None) == (end in ("opened", "round", "completed"))


def test_an_update_of_a_round_still_open_need_not_be_logged(world: World) -> None:
    world.train(1)
    world.train(2)
    assert world.check(world.evidence(end="opened")).missed == ()


def test_an_update_without_a_word_in_the_log_is_missing(trained: World) -> None:
    made = trained.evidence(outcomes={(2, trained.place): "refused"})
    assert trained.code(made) == "STATEMENT_RECEIPT_MISSING"


def test_an_update_that_the_log_calls_late_is_named(trained: World) -> None:
    made = trained.evidence(outcomes={(2, trained.place): "missed"}, participation__minimum=2)
    checked = trained.check(made)
    assert checked.missed == (2,)
    values = views.statement(checked, trained.me)
    assert values["sent_but_missed"] == [2]
    assert values["rounds"][1] == {"round": 2, "outcome": "missed", "code": "DEADLINE"}


def test_an_update_that_was_never_sent_is_wrong(world: World) -> None:
    world.train(1)
    assert world.code(world.evidence()) == "STATEMENT_RECEIPT_WRONG"


def test_another_update_than_the_one_sent_is_wrong(trained: World) -> None:
    assert trained.code(make_evidence()) == "STATEMENT_RECEIPT_WRONG"


def test_a_result_that_was_shown_must_still_stand(trained: World) -> None:
    made = trained.evidence()
    trained.store.add_result(CONTRACT.id, 1, b"another word on round 1")
    assert trained.code(made) == "STATEMENT_RESULT_MISSING"


def test_a_head_that_was_seen_must_be_continued(trained: World) -> None:
    made = trained.evidence()
    trained.store.add_heads(CONTRACT.id, [SeenHead(size=3, root="ab" * 32, checkpoint=b"x")])
    assert trained.code(made) == "STATEMENT_FORK"


def test_a_shorter_log_than_was_seen_is_a_fork(trained: World) -> None:
    trained.see(trained.evidence())
    assert trained.code(trained.evidence(end="round")) == "STATEMENT_FORK"


def test_another_contracts_evidence_is_refused(trained: World) -> None:
    made = trained.evidence(title="Another")
    assert trained.code(made) == "EVIDENCE_OTHER_CONTRACT"


def test_a_changed_byte_is_a_fault(trained: World) -> None:
    made = trained.evidence()
    operator = served(made)
    files = operator.evidence("")
    files["log.jsonl"] = files["log.jsonl"].replace('"fees_fen":1000000', '"fees_fen":1000001')
    with pytest.raises(FaultError):
        views.fetch_checked(trained.home, trained.store, operator, CONTRACT.id)


def test_a_key_that_contradicts_the_trust_file_is_a_fault(trained: World) -> None:
    text = trained.home.trust_path.read_text()
    first = Trust.of(CONTRACT).party[0]
    other = Trust(party=(first.model_copy(update={"fingerprint": "ab" * 32}), *Trust.of(CONTRACT).party[1:]))
    replace_file(trained.home.trust_path, other.to_toml().encode())
    assert trained.code(trained.evidence()) == "TRUST_CONTRADICTION"
    assert text != other.to_toml()


@pytest.mark.parametrize("answer", [{"log.jsonl": 1}, {"log.jsonl": None}])
def test_evidence_that_is_no_text_is_refused(trained: World, answer: Any) -> None:
    operator = SimpleNamespace(evidence=lambda _: answer)
    with pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        views.fetch_checked(trained.home, trained.store, operator, CONTRACT.id)


@pytest.mark.parametrize("name", ["../../trust.toml", "more.txt"])
def test_a_file_too_many_is_a_fault(trained: World, name: str) -> None:
    operator = served(trained.evidence())
    operator.evidence("")[name] = "x\n"
    with pytest.raises(FaultError, match="EVIDENCE_FILE_EXTRA"):
        views.fetch_checked(trained.home, trained.store, operator, CONTRACT.id)


# Reports and files


def test_the_json_report_is_built_here(trained: World) -> None:
    made = trained.evidence()
    checked = trained.check(made)
    operator = SimpleNamespace()  # is not asked
    assert json.loads(views.report_bytes(checked, operator, "json")) == build(made.entries)


def test_the_html_report_is_the_operators_once_its_figures_are_ours(trained: World) -> None:
    made = trained.evidence()
    checked = trained.check(made)
    assert views.report_bytes(checked, served(made), "html", "zh") == b"<html zh>"
    with pytest.raises(FaultError, match="REPORT_DIFFERS"):
        views.report_bytes(checked, served(made, report=build(made.entries) | {"title": "x"}), "html")


def test_the_evidence_written_is_the_evidence_verified(trained: World, tmp_path: Path) -> None:
    made = trained.evidence()
    folder = tmp_path / "evidence"
    views.write_evidence(folder, trained.check(made).files)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == made.files
    with pytest.raises(InputError, match="FILE_EXISTS"):
        views.write_evidence(folder, made.files)


# The own ledger


def test_the_budget_of_an_empty_ledger(world: World) -> None:
    (line,) = views.budget(world.store)
    assert (line["charged"], line["epsilon_gate"]) == ("0", "0")
    (one,) = line["contracts"]
    assert (one["steps"], one["epsilon_pld"], one["rounds_left"], one["attempts_left"]) == (0, "0", 2, 3)
    assert Decimal(line["committed"]) == 3 * world.store.contract(CONTRACT.id).terms.rdp


def test_the_budget_counts_charged_steps_and_names_both_epsilons(world: World) -> None:
    world.train(1)
    (line,) = views.budget(world.store)
    (one,) = line["contracts"]
    plan, declared = CONTRACT.privacy, world.store.data_set("visits-1")
    charged = world.store.contract(CONTRACT.id).terms.rdp
    assert Decimal(line["charged"]) == charged
    assert Decimal(line["epsilon_gate"]) == epsilon_gate(charged, declared.delta, declared.alpha)
    spent = epsilon_pld([(plan.noise_multiplier, plan.sample_rate, 3)], plan.delta)
    assert (Decimal(one["epsilon_pld"]), one["epsilon"]) == (spent, "2")
    assert (one["steps"], one["planned_steps"]) == (3, 9)
    assert (one["rounds_left"], one["attempts_left"]) == (1, 2)


def test_a_crashed_attempt_is_charged_and_shown(world: World) -> None:
    world.store.reserve(CONTRACT.id, 1, "ab" * 32, RUN)
    world.train(1)
    (one,) = views.budget(world.store)[0]["contracts"]
    assert (one["steps"], one["rounds_left"], one["attempts_left"]) == (6, 1, 1)


def test_a_withdrawn_contract_has_nothing_left(world: World) -> None:
    world.train(1)
    world.store.set_state(CONTRACT.id, "withdrawn")
    (line,) = views.budget(world.store)
    (one,) = line["contracts"]
    assert (one["steps"], one["rounds_left"], one["attempts_left"]) == (3, 0, 0)
    assert line["committed"] == line["charged"]


def test_heads_are_shown_for_the_telephone(trained: World) -> None:
    (empty,) = views.heads(trained.store, [CONTRACT.id])
    assert (empty["size"], empty["countersigned"], empty["seen"]) == (0, False, 0)
    made = trained.evidence()
    trained.see(made)
    last = Checkpoint.from_bytes(made.checkpoints[-1].body)
    trained.store.countersign(CONTRACT.id, last.size, last.root)
    (shown,) = views.heads(trained.store, [CONTRACT.id])
    assert (shown["size"], shown["root"], shown["countersigned"]) == (last.size, last.root, True)
    assert shown["root_shown"].replace(" ", "") == last.root


def test_egress_is_listed_and_narrowed(world: World) -> None:
    world.store.record_egress(EgressKind.CARD, None, None, 10, "ab" * 32, detail="POST /cards")
    world.store.record_egress(EgressKind.UPDATE, CONTRACT.id, 1, 20, "cd" * 32)
    world.store.record_egress(EgressKind.UPDATE, CONTRACT.id, 1, 20, "cd" * 32)
    everything = views.egress(world.store)
    assert [e["times"] for e in everything] == [1, 2]
    assert [(e["kind"], e["bytes"], e["round"]) for e in everything] == [("card", 10, None), ("update", 20, 1)]
    assert views.egress(world.store, CONTRACT.id) == everything[1:]
    assert views.egress(world.store, None, 1) == everything[1:]
    assert views.egress(world.store, None, 5) == everything
    assert views.egress(world.store, "ef" * 32) == []
    assert views.egress(world.store, kinds=["update", "refusal"]) == everything[1:]
    with pytest.raises(InputError, match=r"EGRESS_KIND.*card, signature, update"):
        views.egress(world.store, kinds=["poll"])


def test_the_status_of_an_agent(trained: World) -> None:
    trained.store.add_alarm("HEAD_FEW_WITNESSES", CONTRACT.id, "round 2: \x1b[2J")
    values = views.status(trained.home, trained.store, "approved")
    assert values["participant"] == trained.me
    assert (values["operator"], values["running"], values["witness"]) == (None, None, "none")
    (one,) = values["contracts"]
    assert (one["state"], one["updates"], one["last_round"], one["rounds"]) == ("running", 2, 2, 2)
    (alarm,) = values["alarms"]
    assert alarm["code"] == "HEAD_FEW_WITNESSES"
    assert "\x1b" not in alarm["detail"]


@pytest.mark.parametrize("content", ["", "none", "999999999\n", "OWN"])
def test_a_running_guard_is_told_by_its_lock(world: World, content: str) -> None:
    """Not by a number that was left by kill -9, and is another process's by now."""
    (world.home.path / "guard.lock").write_text(content.replace("OWN", f"{os.getpid()}\n"))
    assert views.running_process(world.home) is None
    with HomeLock(world.home.path):
        assert views.running_process(world.home) == os.getpid()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ab", "CONTRACT_UNKNOWN"),
        ("abcd", "CONTRACT_AMBIGUOUS"),
        ("ffff", "CONTRACT_UNKNOWN"),
        ("", "CONTRACT_UNKNOWN"),
    ],
)
def test_a_beginning_must_name_one_contract(text: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        views.resolve_id(text, ["abcd" * 16, "abcd" + "0" * 60])
    assert caught.value.code == code
    assert ("Four characters" in caught.value.message) == (len(text) < 4)


def test_a_beginning_that_names_one_contract_is_enough() -> None:
    known = ["abcd" * 16, "ef01" * 16, "ef01" * 16]
    assert views.resolve_id(" EF01 ", known) == "ef01" * 16
    assert views.resolve_id("abcd" * 16, known) == "abcd" * 16
