"""`fedpact demo`: the public commands, one after the other, with real processes on this machine.

Everything here can be done by hand with the same commands on separate machines (README, "Across real machines").
"""

import contextlib
import functools
import json
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedpact_contract.errors import FailedError, InputError
from fedpact_contract.output import visible
from fedpact_contract.request import utc_now
from fedpact_server.demo import scenario as scenarios
from fedpact_server.demo import times
from fedpact_server.demo.processes import Processes, adopt_orphans, interruptible, reserve_port, say, write_secret
from fedpact_server.demo.scenario import Enterprise, Scenario
from fedpact_server.demo.warm import Warm

HOST = "127.0.0.1"
OPERATOR = "City Data Group"
OPERATOR_CODE = "91310000MA1DEMO999"
READY_SECONDS = 90.0
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    folder: Path
    participants: int | None
    rounds: int | None
    revenue: str
    data: Path | None
    lift: bool | None
    keep: bool


@dataclass(slots=True)
class Demo:
    """One demo in its folder.

    Args:
        options: What the command line asks for.
        tell: Shows progress: a step's name, or what one participant is doing.
        hand_over: Called before something else writes to the terminal; says whether there is one.
    """

    options: Options
    tell: Callable[[str], None]
    hand_over: Callable[[], bool] = bool
    processes: Processes = field(default_factory=Processes)
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    scenario: Scenario = field(init=False)
    port: int = field(init=False)
    _ours: bool = False
    _held: socket.socket = field(init=False)

    def run(self) -> dict[str, Any]:
        """From nothing to a verified statement; the result that `--json` prints.

        Raises:
            FedpactError: a step failed, or a process ended: every process has been ended then.
            KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP: likewise.
        """
        adopt_orphans()
        self.processes.stay = self.options.keep
        with interruptible(self.processes.announce):
            try:
                result = self._run()
                if self.options.keep:
                    return result | self._keep()
                with self._step("stop"):
                    self.processes.stop()
            except BaseException:
                self.tell = lambda _text: None  # what a thread still tells would come between
                self.hand_over()
                self.processes.announce()
                self.processes.stop()
                if self._ours and self.folder.is_dir() and any(self.folder.iterdir()):
                    say(f"What is left is {visible(str(self.folder))}. Remove it with: {self.removal}")
                raise
        return result

    def _keep(self) -> dict[str, Any]:
        """Leave the processes running; what they are, and how to stop them."""
        self.processes.check()
        pids = self.processes.let_go()
        (self.folder / "processes.json").write_text(json.dumps(pids) + "\n", "utf-8")
        return {"processes": pids, "stop": shlex.join(["kill", *map(str, pids.values())])}

    @property
    def folder(self) -> Path:
        """The demo's folder."""
        return self.options.folder

    @property
    def operator(self) -> Path:
        """The operator's home."""
        return self.folder / "operator"

    @property
    def removal(self) -> str:
        """The command that removes everything."""
        return visible(shlex.join(["rm", "-r", str(self.folder)]))

    def agent(self, index: int) -> Path:
        """The home of an enterprise's agent."""
        return self.folder / f"enterprise-{index + 1}" / "agent"

    def _run(self) -> dict[str, Any]:
        with self._step("data"):
            self._make_folder()
            if sys.platform == "linux":
                self.processes.warm = Warm()
        with self._step("homes, keys, certificates"):
            identities = self._each(self._make_home)
        with self._step("operator serves"):
            self._serve()
        with self._step("enrolment"):
            self._enrol(identities)
        with self._step("data set cards"):
            self._each(self._send_card)
        with self._step("contract"):
            contract_id = self._contract()
        with self._step("signatures"):
            self._each(lambda i, e: self._sign(i, e, contract_id))
        with self._step("training"):
            run = self._train(contract_id)
        with self._step("settlement and countersignatures"):
            self._settle(contract_id)
        with self._step("statements, checked by each agent"):
            statements = self._each(lambda i, e: self._statement(i, e, contract_id))
            spent = times.of_rounds(run["milliseconds"], self._each(self._status))
        with self._step("evidence, verified offline"):
            verdict = self._evidence(contract_id, identities)
        with self._step("model, lift and report"):
            report = self._report(contract_id)
        return self._result(contract_id, run["run_id"], report, verdict) | {
            "statements_checked": len(statements),
            "round_milliseconds": spent,
        }

    def _make_folder(self) -> None:
        """The folder, once all options are checked: what is refused leaves nothing behind."""
        options = self.options
        if self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(
                "DEMO_FOLDER", "The demo's folder is not empty.", file=self.folder, remedy="Name a new one with --dir."
            )
        self._ours = True
        if options.data is None:
            self.scenario = scenarios.of_digits(self.folder, options.participants, options.rounds)
        else:
            self.scenario = scenarios.of_folder(options.data.absolute(), options.participants, options.rounds)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_secret(self.folder / "operator.passphrase", secrets.token_urlsafe(24))
        self._held = reserve_port()
        self.port = int(self._held.getsockname()[1])

    def _make_home(self, index: int, enterprise: Enterprise) -> dict[str, Any]:
        if index == 0:
            self.processes.call(
                [
                    *("fedpact", "init", "--home", str(self.operator), "--name", OPERATOR),
                    *("--entity-code", OPERATOR_CODE, "--host", HOST, "--port", str(self.port)),
                    *("--passphrase-file", str(self.folder / "operator.passphrase")),
                ]
            )
        home = self.agent(index)
        home.parent.mkdir(parents=True, exist_ok=True)
        passphrase = write_secret(self._passphrase(index), secrets.token_urlsafe(24))
        made = self.processes.call(
            [
                *("fedpact-agent", "init", "--home", str(home), "--name", enterprise.name),
                *("--entity-code", enterprise.entity_code, "--sector", enterprise.sector),
                *("--passphrase-file", str(passphrase)),
            ]
        )
        self._configure(home, enterprise)
        return made

    def _configure(self, home: Path, enterprise: Enterprise) -> None:
        """What a person does in agent.toml: allow the purpose, describe the data set."""
        path = home / "agent.toml"
        text = path.read_text("utf-8")
        changed = text.replace("purposes = []", f"purposes = [{json.dumps(self.scenario.purpose)}]")
        changed = changed.replace("threads = 2", "threads = 1").replace("poll_seconds = 5", "poll_seconds = 1")
        if len(self.scenario.enterprises) < 3:
            changed = changed.replace("min_participants = 3", "min_participants = 2")
        if changed == text:
            raise FailedError(
                "DEMO_CONFIG", "The agent's configuration has another form than the demo knows.", file=path
            )
        path.write_text(changed + "\n" + scenarios.agent_blocks(self.scenario, enterprise), "utf-8")

    def _passphrase(self, index: int) -> Path:
        return self.agent(index).parent / "passphrase"

    def _serve(self) -> None:
        log = self.folder / "logs" / "operator.log"
        self.processes.start(OPERATOR, ["fedpact", "serve", "--home", str(self.operator)], log)
        self.processes.wait_for(lambda: _answers(self.operator, self.port), "the operator", READY_SECONDS)
        self._held.close()

    def _enrol(self, identities: list[dict[str, Any]]) -> None:
        def invite(index: int, enterprise: Enterprise) -> None:
            invitation = self.agent(index).parent / "invitation.json"
            self.tell(f"{enterprise.name}: enrols")
            self.processes.call(
                [
                    *("fedpact", "participant", "invite", "--home", str(self.operator), "--name", enterprise.name),
                    *("--entity-code", enterprise.entity_code, "--sector", enterprise.sector, "--out", str(invitation)),
                ]
            )
            self.processes.call(
                [
                    *("fedpact-agent", "enrol", str(invitation), "--home", str(self.agent(index))),
                    *("--passphrase-file", str(self._passphrase(index))),
                ]
            )
            fingerprint = identities[index]["participant"]
            self.processes.call(
                [
                    *("fedpact", "participant", "approve", fingerprint, "--fingerprint", fingerprint),
                    *("--home", str(self.operator)),
                ]
            )
            log = self.folder / "logs" / f"enterprise-{index + 1}.log"
            self.processes.start(enterprise.name, ["fedpact-agent", "start", "--home", str(self.agent(index))], log)

        self._each(invite)

    def _send_card(self, index: int, enterprise: Enterprise) -> None:
        self.tell(f"{enterprise.name}: signs its data set's card")
        self.processes.call(
            [
                *("fedpact-agent", "card", enterprise.data_set, "--home", str(self.agent(index)), "--yes"),
                *("--passphrase-file", str(self._passphrase(index))),
            ]
        )

    def _contract(self) -> str:
        template = self.folder / "contract-template.toml"
        template.write_text(scenarios.template(self.scenario, utc_now()), "utf-8")
        line = ["fedpact", "contract", "new", str(template), "--home", str(self.operator)]
        validation = self.scenario.validation
        if validation is None:
            line.append("--released")
        else:
            line += ["--validation", validation["path"], "--kind", validation["kind"]]
            if validation["kind"] == "csv":
                line += ["--delimiter", validation.get("delimiter", ",")]
            if validation.get("column_names"):
                line += ["--column-names", ",".join(validation["column_names"])]
            for marker in validation.get("missing", ()):
                line += ["--missing", marker]
        contract_id = str(self.processes.call(line)["contract_id"])
        passphrase = str(self.folder / "operator.passphrase")
        self.processes.call(["fedpact", "contract", "offer", contract_id, "--home", str(self.operator)])
        self.processes.call(
            [
                *("fedpact", "contract", "sign", contract_id, "--home", str(self.operator), "--yes"),
                *("--passphrase-file", passphrase),
            ]
        )
        return contract_id

    def _sign(self, index: int, enterprise: Enterprise, contract_id: str) -> None:
        self.tell(f"{enterprise.name}: checks and signs the contract")
        self.processes.call(
            [
                *("fedpact-agent", "sign", contract_id, "--home", str(self.agent(index)), "--yes"),
                *("--passphrase-file", str(self._passphrase(index))),
            ]
        )

    def _train(self, contract_id: str) -> dict[str, Any]:
        self.processes.call(["fedpact", "run", "start", contract_id, "--home", str(self.operator)])
        follow = ["fedpact", "run", "follow", contract_id, "--home", str(self.operator), "--seconds", "3600"]
        if self.hand_over():
            self.processes.call(follow, seconds=3700, shown=True)
        return self.processes.call(follow, seconds=3700)

    def _settle(self, contract_id: str) -> None:
        close = [
            *("fedpact", "settle", "close", contract_id, "--home", str(self.operator)),
            *("--revenue", self.options.revenue, "--wait", "60"),
        ]
        done = self.processes.call(close, ok=(0, 5))
        if "error" in done:
            if done["error"]["code"] == "SETTLE_REVIEW_DUE":
                self._review(contract_id)
            self.processes.call(close)

    def _review(self, contract_id: str) -> None:
        """Negative values ask for a review: the operator writes one, and everybody's person agrees."""
        self.tell("negative values ask for a review, which everybody agrees to")
        text = "Written by the demo, which looks into nothing: here stands what the operator found out."
        self.processes.call(
            [
                *("fedpact", "contribution", "review", contract_id, "--home", str(self.operator)),
                *("--text", text),
            ]
        )

        def agree(index: int, _enterprise: Enterprise) -> None:
            home = ("--home", str(self.agent(index)))
            asked = self.processes.call(["fedpact-agent", "questions", contract_id, *home])["questions"]
            for question in asked:
                if question["kind"] == "review":
                    self.processes.call(
                        [
                            *("fedpact-agent", "answer", contract_id, "--subject", question["subject"], "--agree"),
                            *("--yes", *home, "--passphrase-file", str(self._passphrase(index))),
                        ]
                    )

        self._each(agree)

    def _statement(self, index: int, enterprise: Enterprise, contract_id: str) -> dict[str, Any]:
        self.tell(f"{enterprise.name}: recomputes its statement")
        # Exit 4: the agent's trust file knows the operator; the others' keys it has only from the operator.
        return self.processes.call(
            ["fedpact-agent", "statement", contract_id, "--home", str(self.agent(index))], ok=(0, 4)
        )

    def _status(self, index: int, _enterprise: Enterprise) -> dict[str, Any]:
        """What an agent tells of itself: how long its guard took over each order."""
        return self.processes.call(["fedpact-agent", "status", "--offline", "--home", str(self.agent(index))])

    def _evidence(self, contract_id: str, identities: list[dict[str, Any]]) -> dict[str, Any]:
        self._write_trust(identities)
        folder = self.folder / "evidence"
        self.processes.call(["fedpact", "evidence", contract_id, "--home", str(self.operator), "--out", str(folder)])
        return self.processes.call(["fedpact", "verify", str(folder), "--trust", str(self.folder / "trust.toml")])

    def _write_trust(self, identities: list[dict[str, Any]]) -> None:
        """The fingerprints that the homes printed. Made by the demo itself: it shows the mechanism, proves nothing."""
        from fedpact_contract.trust import Trust, TrustedParty, write
        from fedpact_server.home import OperatorHome

        home = OperatorHome.open(self.operator)
        parties = [
            TrustedParty(role="operator", name=OPERATOR, entity_code=OPERATOR_CODE, fingerprint=home.fingerprint),
            *(
                TrustedParty(
                    role="participant", name=e.name, entity_code=e.entity_code, fingerprint=found["participant"]
                )
                for e, found in zip(self.scenario.enterprises, identities, strict=True)
            ),
        ]
        write(self.folder / "trust.toml", Trust(party=tuple(parties)))

    def _report(self, contract_id: str) -> dict[str, Any]:
        home = ("--home", str(self.operator))
        self.processes.call(["fedpact", "model", contract_id, *home, "--out", str(self.folder / "model")])
        line = ["fedpact", "report", contract_id, *home, "--out", str(self.folder / "report.html")]
        wanted = self.options.lift if self.options.lift is not None else self.options.data is None
        if wanted:
            from fedpact_server.demo.compare import compare

            self.tell("each enterprise alone, for comparison")
            lift = self.folder / "lift.json"
            work = functools.partial(compare, self.operator, contract_id, self._agents())
            lift.write_text(json.dumps(self.processes.each([work])[0]) + "\n", "utf-8")
            line += ["--lift", str(lift)]
        self.processes.call(line)
        report = self.processes.call(["fedpact", "report", contract_id, *home, "--format", "json"])
        (self.folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
        return report

    def _agents(self) -> dict[str, Path]:
        """Entity code -> agent's home."""
        return {e.entity_code: self.agent(i) for i, e in enumerate(self.scenario.enterprises)}

    def _result(self, contract_id: str, run_id: str, report: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
        keys = (
            "id",
            "name",
            "share",
            "share_low",
            "share_high",
            "fen",
            "epsilon_spent",
            "epsilon_budget",
            "num_examples",
        )
        return {
            "contract_id": contract_id,
            "run_id": run_id,
            "rounds": len(report["rounds"]),
            "seconds": round(time.monotonic() - self.begun, 1),
            "step_seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "metric": {k: report["metric"][k] for k in ("name", "initial", "final")},
            "pool_fen": report["settlement"]["pool_fen"],
            "basis": report["settlement"]["basis"],
            "defences": defence_counts(report),
            "participants": [{k: line[k] for k in keys} for line in self._in_order(report["participants"])],
            "verdict": verdict["verdict"],
            "lift": self._lift(),
            "evidence": str(self.folder / "evidence"),
            "trust": str(self.folder / "trust.toml"),
            "report": str(self.folder / "report.html"),
            "model": str(self.folder / "model.safetensors"),
        }

    def _lift(self) -> dict[str, Any] | None:
        path = self.folder / "lift.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found | {"participants": self._in_order(found["participants"])}

    def _in_order(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Participants' lines as the contract lists them, which is the order of the scenario."""
        place = {enterprise.name: index for index, enterprise in enumerate(self.scenario.enterprises)}
        return sorted(lines, key=lambda line: place[line["name"]])

    def _each(self, work: Callable[[int, Enterprise], R]) -> list[R]:
        """Do something for every enterprise, a few at a time; the first failure ends the demo."""
        return self.processes.each([functools.partial(work, i, e) for i, e in enumerate(self.scenario.enterprises)])

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.tell(name)
        self.processes.step = name
        begun = time.monotonic()
        yield
        if name != "stop":
            self.processes.check()
        self.seconds[name] = time.monotonic() - begun


def defence_counts(report: dict[str, Any]) -> dict[str, int]:
    """How many alarms and clipped updates there were, and how many detectors could hardly find anything to the end."""
    found, last = report["defences"], len(report["rounds"])
    return {
        "alarms": len(found["alarms"]),
        "without_power": sum(last in line["rounds"] for line in found["no_power"]),
        "clipped": len(found["clipped"]),
        "updates": found["updates"],
    }


def _answers(home: Path, port: int) -> bool:
    """Whether the operator's port answers with the operator's certificate."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        context = ssl.create_default_context(cafile=str(home / "tls" / "ca.crt"))
        with urllib.request.urlopen(f"https://{HOST}:{port}/health", context=context, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
