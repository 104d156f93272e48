"""The agent's results as text for people. Names and texts of other parties are made visible, never obeyed."""

import itertools
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fedpact_contract import output
from fedpact_contract.keys import show_fingerprint
from fedpact_contract.output import counted, line
from fedpact_contract.record import decimal_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedpact_client.cards import Draft
    from fedpact_client.plan import Plan
    from fedpact_client.review import Check, Cost, Review
    from fedpact_client.signing import Offer
    from fedpact_contract.language import Lang

SHOWN_ROWS = 5
SHORT = 12
FEW = 10

ENROLMENT = {
    "requested": ": the operator has still to approve it, by the fingerprint above",
    "suspended": ": the operator takes nothing more from this key; ask it why",
    "frozen": ": the invitation's token was used a second time, by other keys; call the operator and compare the "
    "fingerprint above, which it approves again where they agree",
}
"""What an enrolment's state means to its enterprise, where something is to be done."""


def show_init(values: dict[str, Any]) -> None:
    """What `init` made."""
    line(f"Home: {values['home']}")
    line("Fingerprint of the contract key (this enterprise's id):")
    line(f"  {show_fingerprint(values['participant'])}")
    line("Next: describe data sets and policy in agent.toml; then, with the operator's invitation,")
    line("`fedpact-agent preflight --invitation INVITATION` and `fedpact-agent enrol INVITATION`.")


def show_enrolled(values: dict[str, Any]) -> None:
    """What `enrol` did, and the fingerprints to read out."""
    operator = values["operator"]
    line(f"Enrolled with {operator['name']} at {operator['url']}: {values['state']}.")
    line("Compare the fingerprints by telephone, on a number that you know:")
    line(f"  the operator's  {show_fingerprint(operator['id'])}")
    for certificate in operator["ca"]:
        line(f"  its authority's {show_fingerprint(certificate)}")
    line(f"  ours            {show_fingerprint(values['participant'])}")
    line("The operator approves after that call. Its fingerprint is pinned in trust.toml.")


def show_preflight(values: dict[str, Any]) -> None:
    """Each check with what it found and, where something is amiss, what to do."""
    for found in values["checks"]:
        line(f"{found['state'].upper():4}  {found['name']}: {found['detail']}")
        if remedy := found.get("remedy"):
            line(f"      -> {remedy}")
    count = values["count"]
    line(f"{count['pass']} passed, {count['warn']} to look at, {count['fail']} failed, {count['skip']} not tried.")


def show_card(draft: "Draft") -> None:
    """A card, item by item, before it is signed."""
    line("This card leaves your premises, signed by the contract key:")
    output.table(output.console(), ["item", "value", "where it comes from"], draft.items())
    for contract in draft.superseded:
        line(f"Mind: contract {contract[:SHORT]} names an earlier card of this data set; the operator notices.")
    line(f"It stays here: {draft.source} has {counted(draft.available, 'row')} for training beside the released ones.")
    for remark in _remarks(draft):
        line(f"Mind (computed from the data; stays here): {remark}.")
    if draft.capped:
        line("Rows left where a contract caps those of one entity (computed from the data; stays here):")
        enough = {True: "enough", False: "too few"}
        rows = [[str(cap), str(left), enough[left >= draft.card.num_examples]] for cap, left in draft.capped.items()]
        output.table(output.console(), ["at most", "rows left", "for the examples on the card"], rows)
    line(f"Rényi limit of the data set over all contracts: {decimal_text(draft.limit)} at alpha {draft.card.alpha}.")


def _remarks(draft: "Draft") -> list[str]:
    """What the enterprise may want to look into before it signs; nothing is refused for it."""
    few, numbers = draft.card.num_examples < FEW, draft.not_finite
    return [
        *(["all rows are of one class: there is nothing to tell apart"] if draft.one_class else []),
        *([_copies(draft)] if draft.duplicates else []),
        *([f"fewer than {FEW} examples: beside the noise so few rows teach a model next to nothing"] if few else []),
        *(
            f"column {name} has {counted(count, 'cell')} that {'is' if count == 1 else 'are'} NaN or infinite: a "
            "contract that reads it as a number is refused"
            for name, count in numbers.items()
        ),
    ]


def _copies(draft: "Draft") -> str:
    found, part = draft.duplicates, draft.duplicates / draft.available
    what = "is an exact copy" if found == 1 else "are exact copies"
    return f"{counted(found, 'row')} {what} of another ({part:.1%}): a contract may allow fewer (max_duplicates)"


def show_released(draft: "Draft") -> None:
    """The rows that would leave: their number, and the first of them."""
    names = [*draft.card.columns, draft.card.label]
    line(f"Rows that leave your premises, as they are: {len(draft.rows)}; the first {SHOWN_ROWS}:")
    rows = [["" if row[name] is None else str(row[name]) for name in names] for row in draft.rows[:SHOWN_ROWS]]
    output.table(output.console(), names, rows)
    line("They are outside every privacy guarantee, and training leaves them out from now on.")


def show_contracts(values: dict[str, Any]) -> None:
    """The list of contracts."""
    rows = [[c["id"], c["title"], c["state"], str(c["signed"]), c["here"] or "-"] for c in values["contracts"]]
    if not rows:
        line("The operator offers no contract.")
        return
    output.table(output.console(), ["contract", "title", "at the operator", "signatures", "here"], rows)


def review_values(review: "Review", offer: "Offer") -> dict[str, Any]:
    """A review as plain values."""
    cost = review.cost
    return {
        "contract": review.contract.id,
        "title": review.contract.title,
        "state": offer.state,
        "signed_here": review.signed_here,
        "signed": sorted(offer.signed),
        "complete": offer.complete,
        "parties": [
            {
                "id": s.party.id,
                "name": s.party.name,
                "entity_code": s.party.entity_code,
                "role": review.contract.role(s.party.id),
                "standing": s.standing,
                "signed": s.party.id in offer.signed,
            }
            for s in review.parties
        ],
        "checks": check_values(review.checks),
        "cost": None if cost is None else cost_values(cost),
        "terms": review.contract.plain(),
    }


def check_values(checks: "Sequence[Check]") -> list[dict[str, Any]]:
    """What was checked, as plain values."""
    return [
        {"name": c.name, "ok": c.error is None, **({} if c.error is None else {"error": c.error.as_dict()})}
        for c in checks
    ]


def cost_values(cost: "Cost") -> dict[str, Any]:
    """A plan's cost as plain values."""
    return {
        "epsilon": _epsilon(cost.epsilon),
        "alpha": decimal_text(cost.alpha),
        "attempts": cost.attempts,
        "before": decimal_text(cost.before),
        "after": decimal_text(cost.after),
        "limit": decimal_text(cost.limit),
    }


RESTART: dict["Lang", str] = {
    "en": "agent.toml was changed since the running agent read it: restart the agent, or it goes on by the old one.",
    "zh": "运行中的代理启动之后，agent.toml已被修改：请重新启动代理，否则仍按修改前的策略拒绝与允许。",
}


def show_signed(values: dict[str, Any], lang: "Lang") -> None:
    """That a contract is signed, and what has to be done before its first round."""
    line("已在本机签署并发送给运营方。" if lang == "zh" else "Signed here and sent to the operator.")
    if values["restart"]:
        line(RESTART[lang])


def show_status(values: dict[str, Any], lang: "Lang" = "en") -> None:
    """The agent's status; in Chinese a sentence stands under each alarm whose code has one."""
    from fedpact_contract.refusals import chinese

    operator = values["operator"]
    line(f"{values['name']} ({values['entity_code']})")
    line(f"fingerprint  {show_fingerprint(values['participant'])}")
    line(f"operator     {operator['name'] + ' at ' + str(values['url']) if operator else '-'}")
    line(f"enrolment    {values['enrolment']}{ENROLMENT.get(values['enrolment'], '')}")
    line(f"running      {'process ' + str(values['running']) if values['running'] else 'no'}")
    if values["restart"]:
        line(RESTART[lang])
    line(f"connected    {values['connected'] or 'no'}{'; ' + values['waiting'] if values['waiting'] else ''}")
    for child, found in values["isolation"].items():
        line(f"{child:<12} {'-' if found is None else found['sentence']}")
    line(f"witness      {values['witness']}")
    for data_set in values["data_sets"]:
        line(f"data set     {data_set['id']}: {'declared' if data_set['declared'] else 'no card yet'}")
    columns = ["contract", "title", "state", "data set", "updates", "rounds", "last round"]
    rows = [
        [
            c["id"][:SHORT],
            c["title"],
            "ready" if c["state"] == "running" and not c["last_round"] else c["state"],
            c["data_set"],
            str(c["updates"]),
            str(c["rounds"]),
            str(c["last_round"]),
        ]
        for c in values["contracts"]
    ]
    if rows:
        output.table(output.console(), columns, rows, right=(4, 5, 6))
    for contract in values["contracts"]:
        if silence := contract["silence"]:
            later = "it closed later" if silence["closed_since"] else "it has not closed it yet"
            line(f"SILENT {silence['at']} contract {contract['id'][:SHORT]}: the operator did not close it by")
            line(f"  {silence['due']}; {later}. Our signed record, for anybody to verify with the contract beside it:")
            line(f"  fedpact verify {silence['file']} --contract {silence['contract_file']}")
    for alarm in values["alarms"]:
        said = chinese(alarm["code"]) if lang == "zh" else None
        line(f"ALARM {alarm['at']} {alarm['code']}: {alarm['detail']}" + ("" if said is None else f"\n  {said}"))


def show_questions(values: dict[str, Any]) -> None:
    """What the log asks this enterprise, in words."""
    if not values["questions"]:
        line("Nothing asks this enterprise.")
    for question in values["questions"]:
        subject = question["subject"][:SHORT]
        if question["kind"] == "union":
            line(f"UNION {subject}: the operator holds {' and '.join(question['members'])} to be one.")
            line(f"  it says why: {question['reason']}")
            line(
                "  If it confirms it, from the next round on their examples count once, and so do their parts of equal "
                f"payments and floors. It cannot before {question['until']}; a dispute it must answer in the log."
            )
        else:
            named, ratio = ", ".join(question["negative"]), float(Fraction(question["ratio"]))
            line(f"REVIEW {subject}: values of {named} are negative, together {ratio:.3f} of the total value.")
            line(f"  the operator found out: {question['text']}")
            line(
                "  No amount changes by it. The period is settled once more than half of the others have agreed. "
                "Scores are not open yet; whom it names, and the ratio, every agent recomputes at the close."
            )
        for name, answer in question["answers"].items():
            line(f"  {name}: {answer}")
        if question["answered"] is None:
            line(f"  To answer: fedpact-agent answer {values['contract'][:SHORT]} --subject {subject} --agree")
            line("  or --dispute --reason TEXT")


def show_ready(values: dict[str, Any]) -> None:
    """The agent is connected."""
    line(f"Connected to {values['url']} and serving; participant {values['participant']}. Ctrl-C ends it.")


def show_heads(values: dict[str, Any]) -> None:
    """Heads, in groups of four for the telephone."""
    for head in values["heads"]:
        line(f"contract {head['contract']}")
        line(f"  size {head['size']}, {'countersigned' if head['countersigned'] else 'not countersigned'}")
        line(f"  root {head['root_shown']}")
    if not values["heads"]:
        line("No contract was signed here yet.")


def show_withdrawn(values: dict[str, Any]) -> None:
    """What each side destroyed and keeps, and what nobody can take back."""
    line(f"Withdrawn from the contract {values['contract']}.")
    for by, name in (("participant", "here"), ("operator", "at the operator")):
        receipt = values["receipts"][by]
        if receipt is None:
            line(f"  Nothing is said yet of what was destroyed {name}: the same command again asks.")
            continue
        line(f"  Destroyed {name}: {_held(receipt['destroyed'])}. Kept: {_held(receipt['kept'])}.")
        line(f"  Signed receipt: {receipt['file']}")
    operators = values["receipts"]["operator"]
    for model in operators["models"] if operators else ():
        line(f"  With our updates: the model of round {model['round']}, {model['digest']}")
    line("  What our updates changed stays in these models, and in every later one. What was earned is paid.")


def _held(things: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{thing['count']} {thing['kind']}" + (f" ({thing['reason']})" if "reason" in thing else "") for thing in things
    )


def show_budget(values: dict[str, Any]) -> None:
    """Budgets, with both epsilons named."""
    for data_set in values["data_sets"]:
        line(f"data set {data_set['data_set']}: epsilon {data_set['epsilon']} at delta {data_set['delta']}")
        line(
            f"  Rényi sum at alpha {data_set['alpha']}: {_rounded(Decimal(data_set['charged']))} charged, "
            f"{_rounded(Decimal(data_set['committed']))} with what signed contracts may still charge, "
            f"limit R {_rounded(Decimal(data_set['limit']))}; charged sum / R {_percent(data_set['sum_of_limit'])}"
        )
        line(
            f"  All contracts together cost at most epsilon {data_set['epsilon_gate']} "
            "(epsilon_gate: a coarse bound, large even where little was spent)"
        )
        own = data_set["policy"]
        line(
            f"  Uses (attempts and measurements): {data_set['uses']}"
            + ("" if own["max_uses"] is None else f" of the {own['max_uses']} that the policy allows")
            + ("" if own["max_epsilon"] is None else f"; the policy's own limit is epsilon {own['max_epsilon']}")
        )
        rows = [
            [
                c["contract"][:SHORT],
                c["title"],
                c["state"],
                f"{c['epsilon_pld']} of {c['epsilon']}",
                " + ".join([f"{c['steps']} of {c['planned_steps']}", *c["measured"]]),
                f"{c['rounds_left']} of {c['rounds']}",
                str(c["attempts_left"]),
                f"{c['uses']}, {c['uses_left']} left",
                c["not_after"],
            ]
            for c in data_set["contracts"]
        ]
        if rows:
            columns = ["contract", "title", "state", "epsilon_pld", "steps charged", "rounds left", "attempts left"]
            output.table(output.console(), [*columns, "uses", "ends"], rows, right=(3, 4, 5, 6, 7))
    if not values["data_sets"]:
        line("No data set was declared here yet.")


def plan_values(plan: "Plan") -> dict[str, Any]:
    """A plan as plain values; quantities are decimal strings."""
    from fedpact_client.views import share_text

    contract, cost = plan.contract, plan.cost
    privacy, entity = contract.privacy, contract.privacy.entity
    return {
        "data_set": plan.data_set,
        "trust_model": privacy.trust_model,
        "rounds": contract.training.rounds,
        "noised_steps": contract.planned_steps,
        "measurements": list(contract.measurements),
        "noise_multiplier": decimal_text(privacy.noise_multiplier),
        "epsilon": decimal_text(privacy.epsilon),
        "delta": decimal_text(privacy.delta),
        "entity": None if entity is None else entity.plain(),
        "cost": None if cost is None else cost_values(cost),
        "sum_of_limit": None if cost is None else share_text(cost.after, cost.limit),
        "epsilon_gate": None if plan.gate is None else _epsilon(plan.gate),
        "rounds_that_fit": plan.rounds_that_fit,
        "checks": check_values(plan.checks),
        "not_checked": list(plan.not_checked),
        "refused": plan.refused,
    }


def show_egress(values: dict[str, Any], *, fold: bool) -> None:
    """The egress ledger; `fold`: requests that follow each other are one line."""
    entries: list[dict[str, Any]] = values["egress"]

    def one_line(entry: dict[str, Any]) -> object:
        return "requests" if fold and entry["kind"] == "request" else entry["seq"]

    rows = [_egress_row(list(run)) for _, run in itertools.groupby(entries, one_line)]
    columns = ["no.", "time (UTC)", "kind", "contract", "round", "bytes", "sha256", "detail"]
    output.table(output.console(), columns, rows, right=(0, 4, 5))
    line(f"{sum(e['times'] for e in entries)} messages, {sum(e['bytes'] * e['times'] for e in entries)} bytes")


def _egress_row(run: list[dict[str, Any]]) -> list[str]:
    """A message, however often it left, or several requests: when the last one left, whose contracts, all bytes."""
    first, last = run[0], run[-1]
    single, contracts = len(run) == 1, {e["contract"] for e in run}
    detail = first["detail"] if single else f"{len(run)} requests since {first['at']}"
    if first["times"] > 1:
        detail = f"{detail} {first['times']} times since {first['at']}".strip()
    return [
        str(first["seq"]) if single else f"{first['seq']}-{last['seq']}",
        last["last"] or last["at"],
        first["kind"],
        "several" if len(contracts) > 1 else (first["contract"] or "-")[:SHORT],
        "-" if first["round"] is None else str(first["round"]),
        str(sum(e["bytes"] * e["times"] for e in run)),
        first["sha256"][:SHORT] if single else "-",
        detail,
    ]


def show_statement(values: dict[str, Any]) -> None:
    """This participant's lines."""
    from fedpact_contract.settlement import format_fen

    own = values["participant"]
    line(f"contract {values['contract']}")
    line(values["title"])
    line(
        f"{own['name']} ({own['entity_code']}): admitted in {counted(own['rounds_admitted'], 'round')}; "
        f"the run is {values['status']}"
    )
    for entry in values["rounds"]:
        if entry["outcome"] != "admitted":
            line(f"  round {entry['round']}: {entry['outcome']} ({entry['code']})")
    for number in values["sent_but_missed"]:
        line(f"  round {number}: this agent made an update; the operator says that none came in time")
    if own["fen"] is not None:
        held = f", of which {format_fen(own['held_fen'], 'en')} are held" if own["held_fen"] else ""
        interval = output.format_interval(own["low"], own["high"])
        line(f"share {output.format_share(own['share'])} (95 % interval {interval})")
        line(f"paid {format_fen(own['fen'], 'en')}{held}")
    if values["settlement"] is not None:
        paid = values["settlement"]["line"]
        line(f"  interval: {values['settlement']['interval']['covers']}; {output.OUTWARD}")
        line(
            f"  exact {paid['exact_fen']} fen, whole {paid['whole_fen']}, remainder {paid['remainder']} "
            f"(rank {paid['remainder_rank']}), floor {paid['floor_fen']}"
        )
        for group in values["settlement"]["common_control"]:
            if own["id"] in group["members"]:
                line(f"  {group['name']} controls {', '.join(group['names'])}: they have one equal part and one floor")
    for note in values["notes"]:
        line(f"- {note}")
    line(values["verdict"])


def _epsilon(value: Decimal) -> str:
    return decimal_text(value) if value.is_finite() else "more than 100"


def _percent(share: str | None) -> str:
    return "without bound" if share is None else f"{100 * Decimal(share):.1f} %"


def _rounded(value: Decimal) -> str:
    return f"{value:.4f}"
