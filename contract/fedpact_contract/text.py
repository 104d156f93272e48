"""A contract as a document for people: complete, clause by clause, in plain English.

What is signed is the record, not its rendering; the document therefore prints every value of the record and ends with
the contract's id. Values come from several parties: characters that a terminal would act on are shown as escapes.
"""

from collections.abc import Iterable, Iterator
from decimal import ROUND_CEILING, Context, Decimal
from itertools import count

from fedpact_contract.contract import (
    ClientPrivacy,
    Column,
    Contract,
    Defences,
    Entity,
    EntityUnit,
    Label,
    NumberColumn,
    NumberLabel,
    Party,
    RecordPrivacy,
    SurvivalLabel,
    Training,
    quick_to_score,
)
from fedpact_contract.estimators import EXACT_LINEAR_PLAYERS, EXACT_PLAYERS
from fedpact_contract.output import counted, visible
from fedpact_contract.record import decimal_text
from fedpact_contract.report import not_stopped
from fedpact_contract.settlement import format_fen
from fedpact_contract.statistics import CountQuery, MeanQuery, QuantileQuery, Query
from fedpact_contract.undetected import FEW

_CONTEXT = Context(prec=30)
_FAR = Decimal(20)
"""Epsilons from here on promise nothing that words could tell."""


def render(contract: Contract) -> str:
    """The whole document; lines end in a newline."""
    sections = (
        ("Parties", _parties(contract)),
        ("Purpose and term", _purpose(contract)),
        ("Data", _data(contract)),
        ("Model and training", _training(contract)),
        ("Privacy", _privacy(contract)),
        ("Taking part", _participation(contract)),
        ("Contribution", _contribution(contract)),
        *([] if contract.defences is None else [("Defences against gaming", _defences(contract, contract.defences))]),
        ("Money", _money(contract)),
        ("Code", _code(contract)),
        ("Evidence", _evidence()),
        ("What nothing here stops", not_stopped(contract)),
    )
    lines = [
        f"FEDERATED LEARNING CONTRACT: {visible(contract.title)}",
        "",
        f"This document renders a record of the type {contract.TYPE}, version {contract.VERSION}. The record is "
        "what is signed; its id stands at the end.",
    ]
    for number, (title, clauses) in enumerate(sections, start=1):
        lines += ["", f"{number}. {title}"]
        lines += [f"{number}.{item} {clause}" for item, clause in enumerate(clauses, start=1)]
    lines += ["", "Contract id (SHA-256 of the record's canonical bytes):", contract.id]
    return "\n".join(lines) + "\n"


def _parties(contract: Contract) -> Iterator[str]:
    yield "The operator coordinates training, keeps the log and the validation set, and pays. " + _party(
        contract.operator
    )
    yield (
        f"The participants are {len(contract.participants)} enterprises that train, each on its own premises. They are:"
        + "".join(
            f"\n    - {_party(p)}"
            f"\n      Sector: {visible(p.sector)}. Data set: {visible(p.data_set)}. "
            f"Contracted examples: {p.num_examples}. Payment floor: {_fen(p.floor_fen)}."
            + ("" if p.gate_order is None else f" Rényi order of its ledger: {decimal_text(p.gate_order)}.")
            for p in contract.participants
        )
    )
    if (buyer := contract.buyer) is not None:
        yield f"The buyer of the model signs nothing here. It is {_entity(buyer)}."
    if contract.affiliates:
        yield (
            "Under common control with the operator or the buyer, as they declare, are:"
            + "".join(f"\n    - {_entity(a)}, with the {a.of}" for a in contract.affiliates)
            + "\n    None of them is paid by contribution."
        )
    if contract.common_control:
        names = {p.entity_code: p.name for p in contract.participants}
        yield (
            "Under common control, as they declare, are these participants:"
            + "".join(
                f"\n    - {visible(g.name)}: {_list(names[c] for c in g.members)}" for g in contract.common_control
            )
            + "\n    Each group is one party for the equal part, for floors and for the minimum of a round (below)."
        )
    if (auditor := contract.auditor) is not None:
        yield (
            "The auditor signs nothing here, trains on nothing and is paid nothing; it may re-evaluate the scores. "
            f"{_party(auditor)}\n      Key for deposits: {auditor.encryption_key}"
            "\n      The fingerprint is that of both keys."
        )
    yield (
        "A party is its key: whoever signs must compare the fingerprints above with what the other parties told it "
        "directly. Names are labels. Each party delegates one run key for this contract with its signature."
    )


def _purpose(contract: Contract) -> Iterator[str]:
    yield f"The data may be used for this purpose only: {visible(contract.purpose)}."
    yield (
        f"Training may take place from {contract.term.not_before} to {contract.term.not_after} (UTC). "
        "Each participant's agent refuses every order outside this term."
    )
    yield (
        "The contract has one run. Any participant may pause or withdraw at any time: its agent then sends nothing "
        "more. What it has sent stays in the model."
    )


def _data(contract: Contract) -> Iterator[str]:
    data, label = contract.data, contract.data.label
    yield (
        "Rows of the data sets do not leave the participants' premises, but for validation rows that a participant "
        f"released by itself. Training reads {counted(len(data.columns), 'column')}, "
        + ("" if (entity := contract.privacy.entity) is None else "the label and whose a row is (below), ")
        + "and no other:"
        + "".join(f"\n    - {_column(column)}" for column in data.columns)
    )
    if entity is not None:
        yield (
            f"The column {visible(entity.column)} says whose a row is. It is no feature and never leaves; training "
            f"takes at most {counted(entity.max_rows, 'row')} of one entity (a person, a firm)."
        )
    yield (
        f"Predicted is {_label(label)}. Where the label is missing, "
        + ("the row is left out." if label.missing == "drop" else "the data set is refused.")
    )
    yield (
        "Bounds and vocabularies are public and part of this contract; nothing is learned from the data to scale it. "
        "Features are scaled to [-1, 1], a constant 1 is added as the last one, and all are multiplied by "
        f"{decimal_text(data.feature_scale)} / sqrt(number of features, the constant included)."
    )
    yield (
        "Each participant trains on exactly its contracted number of examples. More rows change nothing; fewer are "
        "refused before the first round."
    )


def _label(label: Label) -> str:
    if isinstance(label, NumberLabel):
        low, high = decimal_text(label.low), decimal_text(label.high)
        return (
            f'the column {visible(label.name)}, a number from {low} to {high} (rule "{label.rule}"); a data set with a '
            "number outside these bounds is refused. It is scaled by them to [-1, 1]"
        )
    if isinstance(label, SurvivalLabel):
        censored, came = label.outcomes
        return (
            f"when an event comes: the column {visible(label.name)} is the duration, and {visible(label.event)} says "
            f"whether the event came then ({visible(came)}) or the row was watched no longer ({visible(censored)}; "
            f'rule "{label.rule}"). Durations are told apart by these intervals only: {_list(label.intervals)}; an '
            "event beyond the last counts as not seen, and a row that was watched beyond the middle of an interval as "
            "having lived through it"
        )
    rule = (
        "the cell is the class"
        if label.threshold is None
        else f"a number above {decimal_text(label.threshold)} is {visible(label.classes[1])}, else "
        f"{visible(label.classes[0])}"
    )
    return f'the column {visible(label.name)}, with the classes {_list(label.classes)} (rule "{label.rule}": {rule})'


_LOSSES = {
    "cross-entropy": "minus the logarithm of the probability that the model gives to the right class",
    "squared-error": "half the squared error of the scaled label; a prediction beyond the label's bounds counts as the "
    "bound",
    "discrete-hazard": "minus the logarithm of the probability that the model gives to what was seen of it: each "
    "interval that it lived through, and the one in which the event came",
}


def _training(contract: Contract) -> Iterator[str]:
    model, training, central = contract.model, contract.training, isinstance(contract.privacy, ClientPrivacy)
    hidden = f" with hidden layers of {_list(str(width) for width in model.hidden)} units" if model.hidden else ""
    yield (
        f'The model is of the kind "{model.kind}"{hidden}. The first round starts from the model with this digest: '
        f"{model.initial_digest}"
    )
    yield (
        f"The run has {counted(training.rounds, 'round')}. In each, every participant makes "
        f"{counted(training.local_steps, 'training step')} at the learning rate {decimal_text(training.learning_rate)} "
        f"and sends the change of the model, {'clipped and without' if central else 'with'} noise."
    )
    optimizer = training.server_optimizer
    if optimizer is None:
        added = f"times {decimal_text(training.server_rate)}, is added to the model."
    else:
        added = (
            f'is what the server\'s optimizer "{optimizer.kind}" steps by (rate {decimal_text(training.server_rate)}, '
            f"beta_1 {decimal_text(optimizer.beta_1)}, beta_2 {decimal_text(optimizer.beta_2)}, tau "
            f"{decimal_text(optimizer.tau)}); it remembers the changes of earlier rounds."
        )
    combined = _combined(training, len(contract.participants))
    yield f'The operator combines the admitted changes by the rule "{training.aggregation}": {combined}, {added}'


def _combined(training: Training, count: int) -> str:
    """What the rule makes of the admitted changes."""
    if training.krum is None:
        return {
            "weighted-mean": "the mean weighted by the contracted examples",
            "uniform-mean": f"their sum with the operator's noise, divided by {count} (whoever is missing counts as 0)",
            "median": "for each number of the model the middle one of them (of an even number the mean of both middle "
            "ones), each participant's counting alike",
        }[training.aggregation]
    near = f"the number of changes less {training.krum.tolerated + 2}"
    return (
        f"the plain mean of the {training.krum.kept} that lie closest to their neighbours (the least sum of squared "
        f"distances to the nearest others, {near} of them; ties by fingerprint), each participant's counting alike; "
        f"{training.krum.tolerated} of the admitted may send anything (tolerated {training.krum.tolerated}, kept "
        f"{training.krum.kept})"
    )


def _privacy(contract: Contract) -> Iterator[str]:
    if isinstance(contract.privacy, ClientPrivacy):
        yield from _central_privacy(contract, contract.privacy)
    else:
        yield from _record_privacy(contract, contract.privacy)
    yield (
        "Each participant's agent keeps its own ledger of what was spent on its data set over all contracts, and "
        "refuses the step that would exceed the limit on the data set's card. The ledger adds Rényi divergences at the "
        "one order that the card declares."
    )


def _central_privacy(contract: Contract, privacy: ClientPrivacy) -> Iterator[str]:
    training, norm, delta = contract.training, decimal_text(privacy.max_update_norm), decimal_text(privacy.delta)
    yield (
        f'Trust model "{privacy.trust_model}", the same for every participant: THE OPERATOR SEES EACH PARTICIPANT\'S '
        "CHANGE OF THE MODEL WITHOUT NOISE, and rows can be learned from such changes. Nothing here bounds what the "
        "operator learns. It adds the noise before anybody else sees a model; that it does is its signed word alone."
    )
    yield (
        f"Towards everybody else, the whole contract costs at most epsilon {decimal_text(privacy.epsilon)} at delta "
        f"{delta} for each participant."
    )
    yield _meaning(privacy.epsilon, delta, "all changes of any one participant", "whether they were", "them")
    yield (
        f'What is protected (the unit) is one "{privacy.unit}": all that its changes of all rounds tell. Neighbouring '
        f'runs are taken by "{privacy.relation}": its changes are there, or zeros stand in their place. Who takes '
        "part, who is admitted, refuses or is missing, and the number of participants are public."
    )
    yield (
        f"In each step a participant draws every row by itself with probability {decimal_text(privacy.sample_rate)} "
        f'("{privacy.sampling}" sampling), which lessens no cost. It clips its change of a round as a whole to the '
        f"norm {norm}; the operator checks that, and adds to the sum of the changes Gaussian noise of "
        f"{decimal_text(privacy.noise_multiplier)} times that norm, once a round. The noise comes from the operating "
        "system's random numbers and is never drawn from a fixed seed."
    )
    yield (
        f"The plan is {counted(contract.planned_steps, 'released model')}, one a round, without amplification by "
        f"sampling. Epsilon covers all of them, and was computed by {visible(privacy.accountant)}; before each round "
        "Flower's own accountant must agree, or the run ends. A participant may repeat "
        f"{counted(privacy.spare_attempts, 'attempt')} after a crash, of which one enters the model."
    )
    yield (
        "The log shows digests of the changes with 32 random bytes behind each, so that nobody can try guesses on "
        "them. A row changes a change by at most twice the norm: a data set's ledger is charged for that, for each of "
        f"{counted(training.rounds + privacy.spare_attempts, 'attempt')}. It bounds what released models tell of a "
        "row, never what the operator sees."
    )


def _record_privacy(contract: Contract, privacy: RecordPrivacy) -> Iterator[str]:
    training = contract.training
    epsilon, delta = privacy.epsilon, decimal_text(privacy.delta)
    yield (
        f'Trust model "{privacy.trust_model}": the noise is added by the participant, before anything leaves. Neither '
        "the operator nor the others see anything without it."
    )
    yield (
        f"The whole contract, {_list(['every round and spare attempt', *contract.measurements])}, costs at most "
        f"epsilon {decimal_text(epsilon)} at delta {delta} for each data set, for one row."
    )
    yield _meaning(epsilon, delta)
    entity = privacy.entity
    yield (
        f'What is protected (the unit) is one "{privacy.unit}", that is one row; neighbouring data sets are taken by '
        f'"{privacy.relation}": the row is there, or zeros stand in its place. The number of rows is public. '
        + (
            "A person with k rows has less: k times epsilon, and delta times (e^(k epsilon) - 1) / (e^epsilon - 1)."
            if entity is None
            else "This and the two clauses before are of one row by itself; the next is of all rows of one entity."
        )
    )
    if entity is not None:
        yield from _entity_privacy(entity)
    yield (
        f'In each step every row is drawn by itself with probability {decimal_text(privacy.sample_rate)} ("'
        f'{privacy.sampling}" sampling); its gradient is clipped to the norm {decimal_text(privacy.max_grad_norm)}; '
        f"Gaussian noise of {decimal_text(privacy.noise_multiplier)} times that norm is added to the sum. The noise "
        "comes from the operating system's random numbers and is never drawn from a fixed seed."
    )
    yield from _measured(contract)
    yield (
        f"The plan is {counted(training.rounds, 'round')} and {counted(privacy.spare_attempts, 'spare attempt')} "
        f"(after a crash) of {counted(training.local_steps, 'step')} each: {contract.planned_steps} in all"
        + "".join(f", and the {kind}" for kind in contract.measurements)
        + f". Epsilon covers all of them, and was computed by {visible(privacy.accountant)}. An attempt is charged in "
        "full even where its result never arrived."
    )


def _entity_privacy(entity: EntityUnit) -> Iterator[str]:
    """What holds for all rows of one entity: one clause, in place of the formula for any number of rows."""
    epsilon, delta = decimal_text(entity.epsilon), decimal_text(entity.delta)
    yield (
        f"The second unit is one entity: all its rows together, at most {entity.max_rows} by the column "
        f"{visible(entity.column)}, are protected by epsilon {epsilon} at delta {delta} (method "
        f'"{entity.method}"); neighbouring data sets have them, or zeros in their place. That covers all that the '
        "whole contract releases of one data set. For an entity with rows in several data sets the epsilons add up, "
        "and the deltas. Rows that the column does not give to it are not counted with it. "
        + _meaning(entity.epsilon, delta, "any rows of one entity", "whether they were", "them")
    )


def _measured(contract: Contract) -> Iterator[str]:
    """What each participant releases once, besides its updates."""
    if (statistics := contract.statistics) is not None:
        yield (
            "Each participant also releases statistics of its contracted rows, once; they stand in the log for all "
            "signatories. Noise is added to each sum; its standard deviation, in rows, is "
            f"{decimal_text(statistics.noise_multiplier)}:"
            + "".join(f"\n    - {_query(query)}" for query in statistics.queries)
        )
    if (baseline := contract.baseline) is not None:
        yield (
            f"Each participant also trains a model alone, with the same clipping and noise, "
            f"{counted(baseline.steps, 'step')} from the initial model, and releases it once to the operator. It is "
            "never aggregated; how it does on the validation rows stands in the log, and no money follows from it."
        )


def _query(query: Query) -> str:
    column = visible(query.column)
    if isinstance(query, MeanQuery):
        return f"the mean of {column}, clipped to its bounds"
    if isinstance(query, CountQuery):
        which = visible(query.value) if query.value is not None else f"at least {query.at_least:f}"
        return f"how many rows have {column}: {which}"
    if isinstance(query, QuantileQuery):
        wanted = ", ".join(decimal_text(p) for p in query.probabilities)
        return f"the quantiles {wanted} of {column}, from a histogram of {query.bins} parts"
    return f"the histogram of {column}" + ("" if query.bins is None else f" in {query.bins} parts")


def _meaning(
    epsilon: Decimal,
    delta: str,
    what: str = "any one row",
    whether: str = "whether a certain row was",
    it: str = "the row",
) -> str:
    if epsilon >= _FAR:
        return "In words: an epsilon of this size is no protection that words could describe."
    factor = _CONTEXT.exp(epsilon)
    guess = _CONTEXT.divide(factor, _CONTEXT.add(factor, Decimal(1))) * 100
    return (
        "In words: whatever anybody learns from this training, it is at most "
        f"{_rounded(factor, '0.01')} times as likely (e^epsilon) as it would be without {what}, apart from a "
        f"chance of {delta}. Someone who held it for even {whether} used guesses right at most "
        f"{_below_100(guess)} % of the time instead of 50 %, apart from the same chance. What is true of people "
        f"in general, and would be learned without {it} too, is not protected."
    )


def _below_100(percent: Decimal) -> str:
    """Rounded up, with the digits that it takes not to read 100."""
    places = next(places for places in count(1) if percent.quantize(Decimal(10) ** -places, ROUND_CEILING) < 100)
    return _rounded(percent, f"1e-{places}")


def _participation(contract: Contract) -> Iterator[str]:
    part = contract.participation
    yield (
        f"A round counts with at least {counted(part.minimum, 'admitted update')}; with fewer the run stops and the "
        f"model stays as it was. A participant has {counted(part.deadline_seconds, 'second')} to answer an order."
        + (" Updates of participants under common control count once there." if contract.common_control else "")
    )
    missed = counted(part.missed_rounds_limit, "round")
    yield f"A participant that misses or refuses {missed} in a row gets no more orders."
    strict = "refuses the order (strict heads: yes)" if part.strict_heads else "raises an alarm (strict heads: no)"
    yield (
        "With every reply an agent countersigns the log's head that it was shown. An agent that sees fewer than "
        f"{counted(part.head_threshold, 'countersignature')} of the others on the head before {strict}."
    )
    yield (
        "An update is rejected, with a signed receipt that says why, if it is not signed, was sent before, has another "
        "shape, is not finite, or is larger than contracted training can give. A refusal by an agent is a recorded "
        "result, not a breach."
    )


def _contribution(contract: Contract) -> Iterator[str]:
    contribution, names = contract.contribution, {p.id: p.name for p in contract.participants}
    validation, unmeasured = contribution.validation, contribution.game == "unanimity"
    yield _game(contract)
    yield f'The loss "{contribution.loss}" of a row is {_LOSSES[contribution.loss]}.'
    if contribution.max_coalitions is not None:
        most = EXACT_LINEAR_PLAYERS if quick_to_score(contract) else EXACT_PLAYERS
        yield (
            f"In a round all groups are scored if at most {most} were admitted and there are no more than "
            f"{contribution.max_coalitions}. Otherwise no more than so many are, drawn by the admitted updates' "
            "digests; the Shapley value is then estimated, what the draw leaves open is reported beside it, and every "
            "party recomputes the draw."
        )
    yield (
        "The validation rows are fixed before the first round and stay at the operator. Their salted Merkle root is: "
        f"{validation.root}"
    )
    yield "They come from:" + "".join(
        f"\n    - {_source(s.source, names)}: {counted(s.count, 'row')}" for s in validation.slices
    )
    yield (
        ("" if unmeasured else "A participant that gave validation rows is scored on the others' rows only. ")
        + "Scores are committed in each round and opened to all signatories at the close of the period; that uses the "
        "validation rows up."
    )
    if (auditor := contract.auditor) is None:
        yield (
            "Scores are the operator's statement, computed from "
            + ("the released models" if unmeasured else "the logged updates")
            + "; whoever holds them and the validation rows can compute the scores again."
        )
        return
    yield (
        "Scores are the operator's statement, computed from the logged updates, until the auditor "
        f"{visible(auditor.name)} has re-evaluated them. Before the first round the operator deposits the validation "
        "rows, sealed to the auditor's key, and logs the digest of what it sealed. In a dispute it hands the auditor "
        "that deposit, the models, and every admitted update with its noise; the auditor computes every loss and every "
        "next model again and signs what it found. The operator keeps all of it until the period is closed and "
        "undisputed."
    )


def _defences(contract: Contract, defences: Defences) -> Iterator[str]:
    values = "" if contract.contribution.game == "re-normalised" else " and values"
    yield (
        "In training and in scores an update counts scaled down to the signal of the median participant: its energy "
        "beyond that of the contracted noise, with three deviations of that noise left to everybody. Energies and "
        "factors are logged (clip: median-signal)."
        if defences.clip == "median-signal"
        else "Updates count as they come; none is scaled down (clip: none)."
    )
    yield (
        f"After each round the operator's detectors look at all admitted updates{values}. What they find is "
        "committed to with the scores and opened with them. An alarm is a question and moves no money."
    )
    if len(contract.participants) < FEW:
        yield (
            f"There are fewer than {FEW} participants: the detectors that compare somebody with the others have no "
            "power here, that of near-copies among them. Only values that are negative are told."
        )
    if not values:
        yield "A value below zero is nothing unusual in this game: it raises no alarm (wreckers: report)."
    else:
        yield "Whose own value is below minus three standard errors in two rounds running is " + (
            "invited no more, until the operator has reviewed it and logged why it is readmitted. It is paid for the "
            "rounds in which it was admitted (wreckers: reject)."
            if defences.wreckers == "reject"
            else "named by an alarm, and invited as before (wreckers: report)."
        )
    yield (
        "Participants whose updates are near-copies of each other can be declared one union by the operator, which "
        f"names the reason. A member may dispute that for {counted(defences.dispute_hours, 'hour')}, signed with its "
        "contract key; then the operator may confirm it, with a reason where it was disputed. From the next round on "
        "the union's examples count once, as many as its largest member's, its part of equal payments and of floors "
        "counts once, and its members share what it is worth (Owen values)."
    )
    yield (
        f"Where negative values together are above {_percent(defences.negatives)} of the total value (negatives: "
        f"{decimal_text(defences.negatives)}), the period is not settled before more than half of the other "
        "participants have agreed to the operator's review."
    )
    if defences.max_duplicates is not None:
        yield (
            f"At most {_percent(defences.max_duplicates)} of a participant's contracted examples may be exact copies "
            f"of another of them, features and label (max_duplicates: {decimal_text(defences.max_duplicates)}). Its "
            "own agent counts them before it signs and before each attempt, and refuses more before its privacy budget "
            "is charged; that it refuses is seen, how many there are is not. An altered agent need not count."
        )


def _game(contract: Contract) -> str:
    contribution = contract.contribution
    if contribution.game == "unanimity":
        return (
            f'Contribution is not measured (game "{contribution.game}"): scoring single changes would show what only '
            f'the operator may see. The loss "{contribution.loss}" on the validation rows is that of released models; '
            "its fall in a round is of all who were admitted together, the same part for each (estimator "
            f'"{contribution.estimator}"), and no money follows from it.'
        )
    if contribution.game == "re-normalised":
        moved = (
            "the rule by which changes are combined is applied to their changes alone, as if nobody else had been in "
            "the round. So a contribution depends on who else is there: one more change makes each other one count "
            "for less, and whoever sends zeros, or a change that is worth less than the others', may have a negative "
            "contribution. Whoever was not admitted in a round has contributed 0 in it."
        )
        if contract.training.krum is not None:
            moved += (
                f" For a group of fewer than {2 * contract.training.krum.tolerated + 3} the rule stands for the plain "
                "mean of its changes; a larger one keeps no more than its number less "
                f"{contract.training.krum.tolerated}."
            )
    elif contract.keeps_momentum:
        moved = (
            "only their parts of the server's momentum move the model. Whoever was admitted has a part in all later "
            "rounds too; before that it has contributed 0."
        )
    else:
        moved = (
            "only their updates of the round are added, with their weights unchanged. Whoever was not admitted in a "
            "round has contributed 0 in it."
        )
    return (
        f'Contribution is the Shapley value, estimator "{contribution.estimator}", of the game "{contribution.game}": '
        f'for every group of participants, how much the loss "{contribution.loss}" on the validation rows falls when '
        + moved
    )


def _money(contract: Contract) -> Iterator[str]:
    terms = contract.settlement
    yield (
        f"Amounts are in {terms.currency}, in whole fen. The pool of a period is its revenue less fees, as the "
        "operator states them in the log."
    )
    yield (
        f"Of the pool, {_percent(terms.contribution_weight)} is split by contribution (weight "
        f"{decimal_text(terms.contribution_weight)}; a negative contribution counts as 0), "
        f"{_percent(terms.data_weight)} by contracted examples (weight {decimal_text(terms.data_weight)}) and "
        f"{_percent(terms.equal_weight)} equally (weight {decimal_text(terms.equal_weight)}); the last two pro rata to "
        "the rounds in which a participant was admitted."
    )
    basis = {
        "metered": "by contracted examples, pro rata to rounds admitted",
        "equal": "equally, pro rata to rounds admitted",
    }
    yield (
        f'If contributions cannot be told from chance on the validation rows, the fallback is "{terms.fallback}": the '
        f"pool is split {basis[terms.fallback]}."
    )
    yield (
        "Each participant gets at least its payment floor, pro rata to its rounds; what that takes comes from the "
        "others in proportion. Floors beyond the pool are paid pro rata. Fen left over in rounding go to the largest "
        "remainders, ties by fingerprint. The amounts sum to the pool, to the fen."
    )
    if contract.common_control:
        yield (
            "A round in which several participants under common control were admitted counts once for their equal "
            "part, which they split pro rata to their own rounds. Their floor is one, in each round the largest of "
            "those admitted; what a member's own floor takes beyond it comes from the others of the group."
        )
    yield (
        "A run that ends early, for whatever reason, is settled over the rounds that were committed. Where the "
        "operator cannot open the scores that it committed to, the fallback is due: that is the operator's fault, "
        "`verify` names it, and no agent countersigns it by itself."
    )
    yield (
        f"The operator shows the closing at most {counted(terms.close_days, 'day')} after the end of the term. A "
        "participant's agent that has seen none by then raises an alarm and keeps a signed record of it, with the "
        "operator's last signatures. A period closes when the paid participants have countersigned; the line of a "
        "participant that does not sign is held, the others are paid."
    )


def _code(contract: Contract) -> Iterator[str]:
    code = contract.code
    yield (
        f"Training runs by the installed release {visible(code.release)}, whose training code has this digest: "
        f"{code.models_digest}"
    )
    yield (
        "The bundle that Flower carries is an empty shell; no code of it runs at a participant. Its digest is: "
        f"{code.shell_digest}"
    )


def _evidence() -> Iterator[str]:
    yield (
        "Everything that counts is in one append-only log (RFC 9162): this contract with all signatures, each round, "
        "each update's digest and receipt, refusals, scores, revenue and payments. Participants hold signed heads of "
        "it, so that a change afterwards is found."
    )
    yield "Every signatory may fetch the log and recompute every share and every fen with `fedpact verify`."
    yield (
        "The operator may suspend a participant (no more orders). It cannot change keys, thresholds or what was earned."
    )


def _party(party: Party) -> str:
    return (
        f"{visible(party.name)}, legal-entity code {party.entity_code}."
        f"\n      Key fingerprint: {party.id}"
        f"\n      Key: {party.key}"
    )


def _entity(entity: Entity) -> str:
    return f"{visible(entity.name)}, entity code {entity.entity_code}"


def _column(column: Column) -> str:
    fill = (
        ""
        if column.fill is None
        else visible(decimal_text(column.fill) if isinstance(column.fill, Decimal) else column.fill)
    )
    missing = {
        "refuse": "the data set is refused",
        "drop": "the row is left out",
        "fill": f"it is taken as {fill}",
    }[column.missing]
    if isinstance(column, NumberColumn):
        what = f"a {column.kind}, clipped to {decimal_text(column.low)} to {decimal_text(column.high)}"
    else:
        what = f"a {column.kind}, one of {_list(column.values)}"
    return f'{visible(column.name)}: {what}; where it is missing ("{column.missing}"), {missing}'


def _source(source: str, names: dict[str, str]) -> str:
    return f"the {source}" if source in ("operator", "buyer") else f"{visible(names[source])}, {source}"


def _list(values: Iterable[str]) -> str:
    return ", ".join(visible(value) for value in values)


def _percent(weight: Decimal) -> str:
    return f"{decimal_text(weight * 100)} %"


def _fen(fen: int) -> str:
    return f"{fen} fen ({format_fen(fen, 'en')})"


def _rounded(value: Decimal, step: str) -> str:
    return str(value.quantize(Decimal(step), ROUND_CEILING))
