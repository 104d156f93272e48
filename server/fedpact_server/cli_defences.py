"""Commands `fedpact union …`, `fedpact run readmit` and `fedpact contribution review`: what a person decides."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, find_participant
from fedpact_server.cli_run import RUN, Opened, open_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Connection

    from fedpact_contract.contract import Contract
    from fedpact_contract.log import Body, Finding
    from fedpact_server.defences import Standing
    from fedpact_server.runs import RunStatus

Member = Annotated[str, typer.Argument(help="Any member: name, id or its beginning.", metavar="MEMBER")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stands in the log for everybody.", metavar="TEXT")]


def register(app: typer.Typer) -> None:
    """Add the group `union`, and a command each to `run` and `contribution`."""
    union = group(app, "union", "Participants that are one: their examples count once.")
    union.command("declare")(declare_command)
    union.command("confirm")(confirm_command)
    union.command("withdraw")(withdraw_command)
    group(app, "run").command("readmit")(readmit_command)
    group(app, "contribution").command("review")(review_command)


def declare_command(
    run: RUN,
    members: Annotated[
        list[str], typer.Argument(help="Its members: names, ids or their beginnings.", metavar="MEMBER...")
    ],
    reason: Reason,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Declare that participants are one, on the word of a NEAR_COPY alarm. They may dispute it.

    Example: fedpact union declare 3f2a91 "Hospital A" "Hospital B" --reason "one data warehouse"
    """
    from fedpact_contract.request import utc_now
    from fedpact_server import defences

    at = open_contract(home, run)
    ids = [find_participant(at.contract, member, field="MEMBER").id for member in members]
    body = _enter(at, lambda c, key: defences.declare(c, at.contract, key, ids, reason, utc_now()))
    _told(
        body,
        f"Declared: {defences.names(at.contract, body.members)} are one. They may dispute it until {body.until}, then "
        "`fedpact union confirm` makes their examples count once.",
        as_json=as_json,
    )


def confirm_command(
    run: RUN,
    member: Member,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why, although a member disputes it.", metavar="TEXT")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Confirm a declared union, after the time to dispute it: from the next round on its examples count once."""
    from fedpact_contract.request import utc_now
    from fedpact_server import defences

    at = open_contract(home, run)
    who = find_participant(at.contract, member, field="MEMBER").id
    body = _enter(at, lambda c, key: defences.confirm(c, at.contract, key, who, reason, utc_now()))
    text = f"Confirmed: {defences.names(at.contract, body.members)} count as one from the next round on."
    _told(body, text, as_json=as_json)


def withdraw_command(
    run: RUN, member: Member, reason: Reason, home: Home = DEFAULT_HOME, as_json: Json = False
) -> None:
    """End a union, declared or confirmed, from the next round on."""
    from fedpact_server import defences

    at = open_contract(home, run)
    who = find_participant(at.contract, member, field="MEMBER").id
    body = _enter(at, lambda c, key: defences.withdraw(c, at.contract, key, who, reason))
    text = f"Withdrawn: {defences.names(at.contract, body.members)} count for themselves from the next round on."
    _told(body, text, as_json=as_json)


def readmit_command(
    run: RUN,
    participant: Annotated[
        str, typer.Argument(help="Who was excluded: name, id or its beginning.", metavar="PARTICIPANT")
    ],
    reason: Reason,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Invite an excluded participant again, once you have reviewed why its value was negative."""
    from fedpact_server import defences

    at = open_contract(home, run)
    party = find_participant(at.contract, participant, field="PARTICIPANT")
    body = _enter(at, lambda c, key: defences.readmit(c, at.contract, key, party.id, reason))
    _told(body, f"Readmitted: {party.name} is invited from the next round on.", as_json=as_json)


def review_command(
    run: RUN,
    text: Annotated[str, typer.Option("--text", help="What you found out about the negative values.", metavar="TEXT")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Put your review of negative values before the participants, where they are too many to settle without one.

    It tells all of them whose values are negative. No amount changes by it. More than half of the others must agree
    (`fedpact-agent answer`) before `fedpact settle close` goes through.

    Example: fedpact contribution review 3f2a91 --text "Labels of Hospital C were shifted by one column; mended now."
    """
    from fedpact_contract.questions import review_due
    from fedpact_server import closing, defences

    at = open_contract(home, run)
    with at.database.write() as connection:
        due = review_due(at.contract, closing.preview(connection, at.contract, 0, 0).shares)
        key = at.operator.run_key(at.contract.id)
        body = defences.open_review(connection, at.contract, key, due, closing.PERIOD, text)
    _told(
        body,
        f"The review is open; it names {defences.names(at.contract, body.negative)}. The others see it with "
        "`fedpact-agent questions` and answer with `fedpact-agent answer`; `fedpact run status` counts them.",
        as_json=as_json,
    )


def shown(connection: "Connection", contract: "Contract", run: "RunStatus") -> tuple[dict[str, Any], list[str]]:
    """Where the defences stand, as plain values and as lines for people; nothing where the contract has none."""
    from fedpact_server import defences

    if contract.defences is None:
        return {}, []
    state, raised = defences.standing(connection, contract), defences.alarms(connection, contract)
    return {"defences": _plain(contract, state, raised)}, list(_lines(contract, state, raised, run))


def _plain(contract: "Contract", state: "Standing", raised: "list[Finding]") -> dict[str, Any]:
    from fedpact_contract.questions import agreed

    unions = [("declared", question) for question in state.pending.values()]
    unions += [("confirmed", question) for question in state.unions.values()]
    review = state.review
    return {
        "alarms": [{"code": f.code, "round": f.round, "participants": list(f.participants)} for f in raised],
        "excluded": [{"participant": p, "round": number} for p, number in state.excluded.items()],
        "unions": [
            {
                "state": how,
                "members": list(union.body.members),
                "until": union.body.until,
                "reason": union.body.reason,
                "disputed": {p: union.answers[p].reason for p in union.said("dispute")},
            }
            for how, union in unions
        ],
        "review": None
        if review is None
        else {
            "negative": list(review.body.negative),
            "ratio": review.body.ratio,
            "text": review.body.text,
            "agree": list(review.said("agree")),
            "disputed": {p: review.answers[p].reason for p in review.said("dispute")},
            "agreed": agreed(contract, review),
        },
    }


def _lines(contract: "Contract", state: "Standing", raised: "list[Finding]", run: "RunStatus") -> "Iterator[str]":
    from fedpact_contract.questions import agreed
    from fedpact_contract.request import instant, utc_now
    from fedpact_server.defences import names, review_words

    going_on, name = run.phase == "running", contract.id[:12]
    if raised:
        kinds = ", ".join(sorted({finding.code for finding in raised}))
        many = output.counted(len(raised), "alarm")
        yield f"{many} ({kinds}), which only you see: `fedpact contribution alarms {name}`"
    for participant, number in state.excluded.items():
        then = f": look into it with them, then `fedpact run readmit {name}`" if going_on else ""
        yield f"excluded since round {number}: {names(contract, [participant])}{then}"
    for union in state.pending.values():
        who, until = names(contract, union.body.members), union.body.until
        said = "; ".join(f"{names(contract, [p])}: {union.answers[p].reason}" for p in union.said("dispute"))
        open_ = instant(utc_now()) < until
        yield f"union declared: {who}; " + (f"disputed ({said})" if said else "not disputed so far")
        if going_on:
            because = " --reason TEXT" if said else ""
            yield (
                f"  it can be disputed until {until}; then: "
                if open_
                else f"  the time to dispute it was over at {until}: "
            ) + f"`fedpact union confirm {name} MEMBER{because}`, or `withdraw`"
    for union in state.unions.values():
        yield f"union: {names(contract, union.body.members)} count as one ({union.body.reason})"
    if state.review is not None and not state.settled:
        named = names(contract, state.review.body.negative)
        then = " `fedpact settle close` goes through." if agreed(contract, state.review) else ""
        yield f"review of negative values ({named}): {review_words(contract, state.review)}{then}"


def _enter(at: Opened, enter: "Callable[..., Any]") -> Any:  # noqa: ANN401 - the body that was entered
    """One transaction with the operator's run key."""
    with at.database.write() as connection:
        return enter(connection, at.operator.run_key(at.contract.id))


def _told(body: "Body", text: str, *, as_json: bool) -> None:
    if as_json:
        output.emit_json({"type": body.TYPE} | body.plain())
    else:
        output.line(text)
