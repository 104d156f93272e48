"""The round loop: a durable state machine that any Flower run can pick up at the last committed phase.

opened -> sent -> admitted -> aggregated -> evaluated -> scored -> committed. Every step commits its log entries and
its phase in one transaction, so that a crash repeats at most work that left no trace. Orders are stored before the
first one leaves: a resend carries the same bytes, and an agent that already answered sends its same bytes again.

A run ends in one way, whether its last round is done, too few updates came, or the operator stops it: the rounds that
were committed are named in the log with the model that they led to, and can be settled.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
import sqlalchemy as sa
import structlog
from numpy.typing import NDArray

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import ClientPrivacy
from fedpact_contract.errors import FailedError, InputError
from fedpact_contract.log import (
    BaselinesScored,
    Body,
    Findings,
    NoiseLabel,
    RoundAbandoned,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    RoundScores,
    RunCompleted,
    ScoresCommitted,
    commitment,
)
from fedpact_contract.replay_rounds import NOT_FINITE
from fedpact_contract.request import instant, parse_instant, utc_now
from fedpact_contract.unions import Unions
from fedpact_models import aggregation
from fedpact_models.evaluate import Evaluate, evaluate_coalitions
from fedpact_models.features import Examples
from fedpact_models.noise import Noise, SystemNoise
from fedpact_models.registry import parameter_count
from fedpact_server import db, defences, deposit, leaving, logbook, measurements, orders, replies, scoring, watch
from fedpact_server.pool import load_update
from fedpact_server.run_state import (
    RunContext,
    StopWantedError,
    SupersededError,
    add_timing,
    admitted_updates,
    base_of,
    invited,
    last_round,
    load_model,
    node_ids,
    outcomes,
    rounds_kept,
    run_row,
    set_phase,
    store_model,
    unions_of,
    write_array,
)
from fedpact_server.transport import Outgoing, Transport

log = structlog.get_logger()

POLL_SECONDS = 0.05
RESEND_SECONDS = 5.0
"""An order that was lost, as the transport says, is sent again so long after it was sent."""
SILENT_SECONDS = 15.0
"""An order of which the transport says nothing is sent again after so long, then after twice as long, and so on: it
may train, or the agent came back so soon that nobody noticed its absence. An agent answers each with its same bytes."""
LOOK_SECONDS = 0.5
"""How often a round that waits for replies looks who has left meanwhile."""
UNREADABLE_REPLIES = 3
"""Replies without a valid signature that a participant has in one round: others can send such in its name."""
STOPPED = "RUN_STOPPED"
"""The code of what a run leaves undone that its operator stops."""
PRIVACY_EXHAUSTED = "RUN_PRIVACY_EXHAUSTED"
"""The code of a run that ends because Flower's accountant does not agree to the next release."""
BEFORE_AGGREGATION = ("opened", "sent", "admitted", "committed")
"""Phases in which a stop takes effect: a round that is aggregated is first scored and committed."""
DETAIL_LENGTH = 200
GATHER_SECONDS = 60.0
"""How long a round waits for invited participants to be online before it opens with enough of them."""


@dataclass(slots=True)
class Loop:
    """One process's work on a run: what it holds in memory between steps."""

    context: RunContext
    transport: Transport
    examples: Examples
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], datetime] = utc_now  # what the log says; waiting goes by the monotonic clock
    waiting: dict[str, str] = field(default_factory=dict)  # message id -> participant
    unreadable: dict[str, int] = field(default_factory=dict)  # participant -> replies that nobody signed
    noise: Noise = field(default_factory=SystemNoise)  # the operator's own, at client level
    memory: aggregation.Memory = aggregation.START  # of the server's optimizer, after the newest round it was asked for
    detectors: watch.KeptWatch | None = None  # with what they hold of earlier rounds
    evaluate: Evaluate = evaluate_coalitions  # lists of coalitions: here, or on more processes
    absent: set[str] = field(default_factory=set)  # who was not there when the last round opened: not waited for again

    def run(self) -> str:
        """Drive the run until it is completed, stopped, or handed to somebody else; returns its phase."""
        try:
            while (phase := self._step()) == "running":
                pass
        except StopWantedError:
            return self._stop_here()
        except SupersededError:
            log.info("run superseded", contract=self.context.contract_id, driver=self.context.driver)
            self._tell_pause()
            return "superseded"
        return phase

    def _step(self) -> str:
        context = self.context
        with context.database.read() as connection:
            run = run_row(connection, context.contract_id)
            current = last_round(connection, context.contract_id)
        if run is None or run.phase != "running":
            return "stopped" if run is None else str(run.phase)
        done = 0 if current is None else int(current.round) - (current.phase != "committed")
        if run.wanted == "unscored":
            raise StopWantedError("RUN_STOPPED", "The operator ends the run without scores.")
        if done == context.contract.training.rounds:
            with context.write() as connection:
                self._end(connection, "completed", "")
            return "completed"
        if run.wanted == "stop" and (current is None or current.phase in BEFORE_AGGREGATION):
            raise StopWantedError("RUN_STOPPED", "The operator stops the run.")
        if current is None or current.phase == "committed":
            if self._within_budget():
                self._open(done + 1)
        else:
            steps = {
                "opened": self._send,
                "sent": self._collect,
                "admitted": self._aggregate,
                "aggregated": self._evaluate,
                "evaluated": self._score,
                "scored": self._commit,
            }
            steps[str(current.phase)](current)
        return "running"

    def _within_budget(self) -> bool:
        """Whether Flower's accountant agrees that one more model may be released (client level); else the run ends."""
        context = self.context
        if isinstance(context.contract.privacy, ClientPrivacy):
            from fedpact_server.flower_accountant import would_exceed

            with context.write() as connection:
                released = logbook.count_of(connection, context.contract_id, RoundAggregated.TYPE)
                if would_exceed(context.contract, context.contract.privacy, released):
                    self._end(connection, "stopped", PRIVACY_EXHAUSTED)
                    return False
        return True

    def _open(self, number: int) -> None:
        """Wait for enough participants, then log that the round is open, from which model, until when.

        Before the first one the validation rows are deposited for the auditor, where the contract names one.
        """
        context = self.context
        present = self._gather()
        started = time.perf_counter()
        deposited = deposit.make(context) if number == 1 else []
        with context.write() as connection:
            present &= self._candidates(connection) - self._paused(connection)  # who left meanwhile is not invited
            if context.contract.counted_once(present) < context.contract.participation.minimum:
                return
            base = self._base_digest(connection, number)
            deadline = instant(self.now() + timedelta(seconds=context.contract.participation.deadline_seconds))
            body = RoundOpened(round=number, base_digest=base, deadline=deadline, invited=tuple(sorted(present)))
            *_, position = logbook.append(connection, context.contract_id, [*deposited, body])
            head = logbook.checkpoint(connection, context.contract_id, context.run_key)
            connection.execute(
                db.rounds.insert().values(
                    contract_id=context.contract_id,
                    round=number,
                    phase="opened",
                    base_digest=base,
                    deadline=deadline,
                    opened_index=position,
                    checkpoint_size=head.size,
                )
            )
            self._detail(connection, f"round {number} of {context.contract.training.rounds}")
            add_timing(connection, context.contract_id, number, "log", time.perf_counter() - started)
        log.info("round opened", contract=context.contract_id, round=number, invited=len(present))

    def _gather(self) -> set[str]:
        """Participants to invite: registered, neither silent nor excluded; wait for those who were there last time."""
        context = self.context
        minimum, counted = context.contract.participation.minimum, context.contract.counted_once
        begun = time.monotonic()
        told: tuple[int, int] | None = None
        while True:
            with context.read() as connection:
                candidates, paused = self._candidates(connection), self._paused(connection)
            if counted(candidates) < minimum:
                with context.write() as connection:
                    self._end(connection, "stopped", "RUN_TOO_FEW_PARTICIPANTS")
                raise SupersededError("RUN_STOPPED", "Too few participants are left.")
            online = self.transport.online()
            present = {p for p in candidates - paused if online.get(context.nodes[p], False)}
            patience = time.monotonic() - begun > GATHER_SECONDS
            if counted(present) >= minimum and (patience or candidates - paused - self.absent <= present):
                self.absent = candidates - paused - present
                return present
            if (patience or counted(candidates - paused) < minimum) and told != (now := (len(present), len(paused))):
                told = now
                with context.write() as connection:
                    self._detail(connection, self._waiting_for(present, candidates & paused))
            self.sleep(4 * POLL_SECONDS)

    def _waiting_for(self, present: set[str], paused: set[str]) -> str:
        """Why no round opens now."""
        contract = self.context.contract
        counted, minimum = contract.counted_once(present), contract.participation.minimum
        text = f"waiting: {counted} of at least {minimum} participants online"
        names = ", ".join(p.name for p in contract.participants if p.id in paused)
        return (f"{text}; paused by participant: {names}" if names else text)[:DETAIL_LENGTH]

    def _paused(self, connection: sa.Connection) -> set[str]:
        """Who said that it has paused."""
        found = leaving.standing(connection, self.context.contract_id)
        return {participant for participant, standing in found.items() if standing.away and not standing.gone}

    def _candidates(self, connection: sa.Connection) -> set[str]:
        """Who may be invited, now or when it no longer pauses."""
        context = self.context
        gone = {p for p, standing in leaving.standing(connection, context.contract_id).items() if standing.gone}
        limit = context.contract.participation.missed_rounds_limit
        table = db.outcomes.c
        registered = set(
            connection.execute(sa.select(db.participants.c.id).where(db.participants.c.state == "registered")).scalars()
        )
        result = set()
        for participant in context.nodes:
            query = (
                sa.select(table.kind)
                .where(table.contract_id == context.contract_id, table.participant == participant)
                .order_by(table.round.desc())
                .limit(limit)
            )
            kinds = [str(kind) for kind in connection.execute(query).scalars()]
            silent = len(kinds) == limit and all(kind in ("missed", "refused") for kind in kinds)
            if not silent and participant in registered:
                result.add(participant)
        return result - gone - defences.standing(connection, context.contract).excluded.keys()

    def _base_digest(self, connection: sa.Connection, number: int) -> str:
        if number == 1:
            return self.context.contract.model.initial_digest
        return rounds_kept(connection, self.context.contract_id)[-1].model_digest

    def _send(self, current: sa.Row[tuple[object, ...]]) -> None:
        """Make and keep the orders; from here on a resend sends the same bytes."""
        context, number = self.context, int(current.round)
        started = time.perf_counter()
        with context.write() as connection:
            names = invited(connection, context.contract_id, number)
            orders.store_orders(connection, context.contract_id, current, names, context.run_key)
            set_phase(connection, context.contract_id, number, "sent")
            add_timing(connection, context.contract_id, number, "orders", time.perf_counter() - started)

    def _collect(self, current: sa.Row[tuple[object, ...]]) -> None:
        """Send orders to whoever has not answered, and take answers until all are in or the deadline is past."""
        context, number = self.context, int(current.round)
        self.waiting.clear()
        self.unreadable.clear()
        left = self._seconds_left(current)
        deadline = time.monotonic() + left
        model = load_model(context.home, str(current.base_digest)).astype("<f8").tobytes()
        with context.database.read() as connection:
            names = invited(connection, context.contract_id, number)
        sent: dict[str, tuple[float, int]] = {}  # participant -> when, how often
        looked, silent = -LOOK_SECONDS, set[str]()  # who gets no orders any more
        while True:
            with context.read() as connection:
                missing = set(names) - outcomes(connection, context.contract_id, number).keys()
            if not missing:
                break
            now = time.monotonic()
            if now > looked + LOOK_SECONDS:
                looked, silent = now, self._look_who_left(number, missing)
            if now > deadline:
                with context.write() as connection:
                    self._miss(connection, number, missing, "DEADLINE")
                break
            due = {p for p in missing - silent if p not in sent or now - sent[p][0] > self._patience(p, sent[p][1])}
            if due:
                self._dispatch(number, due, model, int(deadline - now) + 1)
                sent |= {p: (now, sent.get(p, (now, 0))[1] + 1) for p in due}
            self._take(current)
            self.sleep(POLL_SECONDS)
        with context.write() as connection:
            set_phase(connection, context.contract_id, number, "admitted")

    def _look_who_left(self, number: int, missing: set[str]) -> set[str]:
        """Who is sent nothing any more: suspended, or its run key is revoked, of whom no reply can come then."""
        context = self.context
        with context.read() as connection:
            found = leaving.standing(connection, context.contract_id)
            registered = node_ids(connection, context.contract).keys()
        revoked = {p for p in missing if p in found and found[p].revoked is not None}
        if revoked:
            with context.write() as connection:
                left = revoked - outcomes(connection, context.contract_id, number).keys()
                self._miss(connection, number, left, leaving.KEY_REVOKED)
        return revoked | (missing - registered)

    def _patience(self, participant: str, times: int) -> float:
        """How long after the last of so many orders the next one is sent."""
        silent = participant in self.waiting.values()
        return float(SILENT_SECONDS * 2 ** (times - 1)) if silent else RESEND_SECONDS

    def _seconds_left(self, current: sa.Row[tuple[object, ...]]) -> float:
        """Until the round's deadline; anew where it is past: we were away, and whoever trained sends its same bytes.

        Never more than the contract gives a round, whatever the wall clock says.
        """
        whole = self.context.contract.participation.deadline_seconds
        left = (parse_instant(str(current.deadline)) - self.now()).total_seconds()
        return float(whole) if not 0 < left <= whole else left

    def _dispatch(self, number: int, due: set[str], model: bytes, ttl: int) -> None:
        context = self.context
        with context.database.read() as connection:
            table = db.orders.c
            rows = connection.execute(
                sa.select(table.participant, table.order).where(
                    table.contract_id == context.contract_id, table.round == number, table.participant.in_(due)
                )
            ).all()
        by_node = {context.nodes[str(row.participant)]: str(row.participant) for row in rows}
        outgoing = [Outgoing(node=context.nodes[str(r.participant)], order=bytes(r.order), model=model) for r in rows]
        for message_id, node in self.transport.send(outgoing, ttl).items():
            self.waiting[message_id] = by_node[node]

    def _take(self, current: sa.Row[tuple[object, ...]]) -> None:
        """Take what has arrived; each answer is decided, logged and kept at once."""
        context, number = self.context, int(current.round)
        for incoming in self.transport.poll(list(self.waiting)):
            participant = self.waiting.pop(incoming.message_id, None)
            if participant is None:
                continue
            if incoming.error is not None or incoming.reply is None:
                log.warning("no reply", participant=participant, round=number, code=incoming.error)
                continue  # lost on the way: the order is sent again until the deadline
            started = time.perf_counter()
            with context.write() as connection:
                if participant in outcomes(connection, context.contract_id, number):
                    continue
                head = logbook.head(connection, context.contract_id, int(current.checkpoint_size))
                kind, code = replies.take(
                    connection,
                    context,
                    current,
                    participant,
                    head,
                    incoming.reply,
                    incoming.array,
                    parameters=self.parameters,
                    last_chance=self.unreadable.get(participant, 0) + 1 >= UNREADABLE_REPLIES,
                )
                if kind == "unreadable":
                    self.unreadable[participant] = self.unreadable.get(participant, 0) + 1
                add_timing(connection, context.contract_id, number, "admission", time.perf_counter() - started)
            log.info("reply", participant=participant, round=number, kind=kind, code=code)

    def _miss(self, connection: sa.Connection, number: int, missing: set[str], code: str) -> None:
        for participant in sorted(missing):
            replies.miss(connection, self.context.contract_id, number, participant, code)

    def _aggregate(self, current: sa.Row[tuple[object, ...]]) -> None:
        """The next model from the admitted updates; fewer than the minimum stop the run."""
        context, number = self.context, int(current.round)
        started = time.perf_counter()
        with context.database.read() as connection:
            admitted = self._admitted(connection, number)
        if context.contract.counted_once(admitted) < context.contract.participation.minimum:
            with context.write() as connection:
                self._abandon(connection, number, "ROUND_TOO_FEW_UPDATES")
            return
        digest, noise = self._next_model(number, str(current.base_digest), admitted)
        made = aggregation.clips(context.contract, self._updates(admitted))
        with context.write() as connection:
            body_ = RoundAggregated(
                round=number, admitted=tuple(admitted), model_digest=digest, noise=noise, clips=made
            )
            logbook.append(connection, context.contract_id, [body_])
            set_phase(connection, context.contract_id, number, "aggregated")
            add_timing(connection, context.contract_id, number, "aggregation", time.perf_counter() - started)

    def _next_model(self, number: int, base_digest: str, admitted: Mapping[str, str]) -> tuple[str, NoiseLabel | None]:
        """Store the model that the admitted updates lead to: its digest, and where the operator's noise came from.

        At client level the noise of one base and its updates is drawn once: what a crash left is taken up again.
        """
        context, contract = self.context, self.context.contract
        privacy, base = contract.privacy, load_model(context.home, base_digest)
        if not isinstance(privacy, ClientPrivacy):
            model = aggregation.next_model(contract, base, self._steps(number, admitted), self._unions(number))
            return store_model(context.home, model), None
        path = context.arrays / f"released-{sha256_hex(':'.join([base_digest, *admitted.values()]).encode())}.f8"
        if not path.exists():
            updates = list(self._updates(admitted).values())
            step = aggregation.noised_mean(updates, contract, privacy, self.noise)
            write_array(path, (base + step).astype("<f8").tobytes())
        label: NoiseLabel = "csprng" if self.noise.label == "csprng" else "test"
        return store_model(context.home, np.frombuffer(path.read_bytes(), "<f8")), label

    def _evaluate(self, current: sa.Row[tuple[object, ...]]) -> None:
        """Coalition losses, kept as integers behind a commitment."""
        context, number = self.context, int(current.round)
        started = time.perf_counter()
        with context.database.read() as connection:
            admitted = self._admitted(connection, number)
            previous = scoring.opened_scores(connection, context.contract_id, number - 1)
            led_to = self._led_to(connection, number)
        try:
            scores, values = self._scored(
                number, str(current.base_digest), led_to, admitted, None if previous is None else previous[1]
            )
        except (FailedError, InputError) as err:
            if err.code not in scoring.NO_LOSS:
                raise
            self._discard(number, NOT_FINITE)
            return
        evaluated = time.perf_counter()
        scoring.store_values(context.arrays, number, values)
        with context.write() as connection:
            scoring.keep(connection, context.contract_id, f"round:{number}", scores)
            set_phase(connection, context.contract_id, number, "evaluated")
            add_timing(connection, context.contract_id, number, "evaluation", evaluated - started)
            add_timing(connection, context.contract_id, number, "contribution", time.perf_counter() - evaluated)

    def _discard(self, number: int, code: str) -> None:
        """Give up the model of a round that cannot be scored, and end the run at the one before it."""
        context = self.context
        with context.write() as connection:
            logbook.append(connection, context.contract_id, [RoundDiscarded(round=number, code=code)])
            self._end(connection, "stopped", f"{code} in round {number}")

    def _score(self, current: sa.Row[tuple[object, ...]]) -> None:
        """Log the commitments to the round's scores and to what the detectors say; exclude whom they call a wrecker."""
        context, number = self.context, int(current.round)
        started = time.perf_counter()
        findings = self._look(number)
        with context.write() as connection:
            kept = scoring.opened_scores(connection, context.contract_id, number)
            assert kept is not None  # noqa: S101 - the phase before this one kept it
            value, found, out = commitment(RoundScores, *kept), None, list[Body]()
            if findings is not None:
                found = scoring.keep(connection, context.contract_id, f"findings:{number}", findings)
                out = watch.exclusions(context.contract, findings)
            scored = ScoresCommitted(round=number, commitment=value, findings=found)
            logbook.append(connection, context.contract_id, [scored, *out])
            set_phase(connection, context.contract_id, number, "scored")
            add_timing(connection, context.contract_id, number, "contribution", time.perf_counter() - started)

    def _look(self, number: int) -> Findings | None:
        """What the detectors say after a round; None where the contract has no defences."""
        context = self.context
        if context.contract.defences is None:
            return None
        if self.detectors is None:
            self.detectors = watch.KeptWatch(context.contract, context.home, self.examples)
        with context.database.read() as connection:
            return self.detectors.after(connection, number)

    def _commit(self, current: sa.Row[tuple[object, ...]]) -> None:
        """A checkpoint over the whole round."""
        context, number = self.context, int(current.round)
        started = time.perf_counter()
        with context.write() as connection:
            logbook.checkpoint(connection, context.contract_id, context.run_key)
            set_phase(connection, context.contract_id, number, "committed")
            add_timing(connection, context.contract_id, number, "log", time.perf_counter() - started)
        log.info("round committed", contract=context.contract_id, round=number)

    def _stop_here(self) -> str:
        """The operator stops the run: give up the round that is waiting for replies, and end."""
        context = self.context
        with context.write() as connection:
            current = last_round(connection, context.contract_id)
            if current is None or current.phase not in ("opened", "sent", "admitted"):
                self._end(connection, "stopped", STOPPED)
            else:
                number = int(current.round)
                names = set(invited(connection, context.contract_id, number))
                missing = names - outcomes(connection, context.contract_id, number).keys()
                self._miss(connection, number, missing, STOPPED)
                self._abandon(connection, number, STOPPED)
        return "stopped"

    def _abandon(self, connection: sa.Connection, number: int, code: str) -> None:
        """Log that a round led to no model, and end the run."""
        admitted = tuple(self._admitted(connection, number))
        body = RoundAbandoned(round=number, admitted=admitted, code=code)
        logbook.append(connection, self.context.contract_id, [body])
        self._end(connection, "stopped", f"{code} in round {number}")

    def _end(self, connection: sa.Connection, phase: str, detail: str) -> None:
        """End the run: commit to the second moments of what was scored, name the model that it led to.

        Without the commitment where the operator said so: what makes the scores is lost.
        """
        context = self.context
        run = run_row(connection, context.contract_id)
        rounds = len(rounds_kept(connection, context.contract_id))
        if rounds:
            unscored = run is not None and run.wanted == "unscored"
            if not unscored:
                self._score_baselines(connection)
            value = None if unscored else self._commit_to_moments(connection)
            digest = self._base_digest(connection, rounds + 1)
            body = RunCompleted(rounds=rounds, model_digest=digest, commitment=value)
            logbook.append(connection, context.contract_id, [body])
        logbook.checkpoint(connection, context.contract_id, context.run_key)
        connection.execute(
            db.runs.update()
            .where(db.runs.c.contract_id == context.contract_id)
            .values(phase=phase, detail=detail, wanted="run")
        )
        log.info("run ended", contract=context.contract_id, phase=phase, rounds=rounds, detail=detail)

    def _score_baselines(self, connection: sa.Connection) -> None:
        """State what the models that participants trained alone are worth on the validation rows."""
        context = self.context
        if context.contract.baseline is not None:
            lines = measurements.baseline_losses(context.home, connection, context.contract, self.examples)
            logbook.append(connection, context.contract_id, [BaselinesScored(lines=tuple(lines))])

    def _commit_to_moments(self, connection: sa.Connection) -> str:
        """Keep the second moments; per-example values that are lost are made again, from the updates."""
        context = self.context
        rounds = [scores for _, scores in scoring.all_scores(connection, context.contract_id)]
        for scores in rounds:
            if not scoring.values_kept(context.arrays, context.contract, scores):
                log.warning("values made again", contract=context.contract_id, round=scores.round)
                digest = base_of(connection, context.contract_id, scores.round)
                led_to, admitted = self._led_to(connection, scores.round), self._admitted(connection, scores.round)
                _, values = self._scored(scores.round, digest, led_to, admitted, None)
                scoring.store_values(context.arrays, scores.round, values)
        moments = scoring.moments(context.arrays, context.contract, rounds)
        return scoring.keep(connection, context.contract_id, "moments", moments)

    def _admitted(self, connection: sa.Connection, number: int) -> dict[str, str]:
        return admitted_updates(connection, self.context.contract_id, number)

    def _led_to(self, connection: sa.Connection, number: int) -> str:
        """The digest of the model that an aggregated round led to."""
        table = db.rounds.c
        where = (table.contract_id == self.context.contract_id, table.round == number + 1)
        following = connection.execute(sa.select(table.base_digest).where(*where)).scalar()
        return str(following or self._base_digest(connection, number + 1))

    def _scored(
        self, number: int, base_digest: str, led_to: str, admitted: Mapping[str, str], previous: RoundScores | None
    ) -> tuple[RoundScores, scoring.FloatArray]:
        """A round's scores and per-example values, from its base model and its updates, or from the model it led to."""
        context, contract = self.context, self.context.contract
        base = load_model(context.home, base_digest)
        if contract.contribution.game == "unanimity":
            model = load_model(context.home, led_to)
            return scoring.score_released(contract, number, list(admitted), base, model, self.examples, previous)
        steps, unions = self._steps(number, admitted), self._unions(number)
        return scoring.score_round(
            contract, number, admitted, base, steps, self.examples, previous, unions, self.evaluate
        )

    def _updates(self, admitted: Mapping[str, str]) -> Mapping[str, NDArray[np.float32]]:
        """Participant id -> admitted update, float32 [P], in the order of ids, each read when it is asked for."""
        arrays = self.context.arrays
        return aggregation.Read(admitted, lambda p: load_update(arrays, admitted[p])[: self.parameters])

    def _steps(self, number: int, admitted: Mapping[str, str]) -> Mapping[str, NDArray[np.floating]]:
        """What each player brings to a round's step, [P], in the order of ids (`aggregation.server_steps`)."""
        contract, updates = self.context.contract, self._updates(admitted)
        steps, _ = aggregation.server_steps(contract, updates, self._memory(number - 1), self._unions(number))
        return steps

    def _unions(self, number: int) -> Unions:
        """Who was one with whom when a round was opened."""
        if self.context.contract.defences is None:
            return ()
        with self.context.database.read() as connection:
            return unions_of(connection, self.context.contract_id, number)

    def _memory(self, number: int) -> aggregation.Memory:
        """What the server's optimizer keeps after a round, from the updates of all rounds so far: no state of its own.

        The newest is held, so that a round costs one step of it.
        """
        contract = self.context.contract
        if contract.training.server_optimizer is None:
            return aggregation.START
        memory = self.memory if self.memory.round <= number else aggregation.START
        while memory.round < number:
            with self.context.database.read() as connection:
                admitted = self._admitted(connection, memory.round + 1)
            unions = self._unions(memory.round + 1)
            _, memory = aggregation.server_steps(contract, self._updates(admitted), memory, unions)
        self.memory = memory
        return memory

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return parameter_count(self.context.contract.model, self.context.contract.data)

    def _tell_pause(self) -> None:
        """Say in the run's status that it has paused, where that is why this driver ends."""
        table, context = db.runs.c, self.context
        where = (table.contract_id == context.contract_id, table.driver == context.driver, table.phase == "running")
        with context.database.write() as connection:
            connection.execute(db.runs.update().where(*where, table.wanted == "pause").values(detail="paused"))

    def _detail(self, connection: sa.Connection, text: str) -> None:
        table = db.runs
        connection.execute(table.update().where(table.c.contract_id == self.context.contract_id).values(detail=text))
