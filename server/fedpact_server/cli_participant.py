"""Commands `fedpact participant …`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_contract.errors import InputError
from fedpact_contract.files import write_new
from fedpact_contract.output import line
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, open_home

if TYPE_CHECKING:
    from fedpact_server.enrolment import Member

CROISSANT = "Add --format croissant, or use --json and a redirection."
Selector = Annotated[
    str, typer.Argument(help="A participant: id, the beginning of it, name or entity code.", metavar="PARTICIPANT")
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    participant = group(app, "participant", "Enterprises that take part.")
    participant.command("invite")(invite_command)
    participant.command("approve")(approve_command)
    participant.command("list")(list_command)
    participant.command("card")(card_command)
    participant.command("revoke")(revoke_command)


def invite_command(
    name: Annotated[str, typer.Option("--name", help="The enterprise's name.")],
    entity_code: Annotated[str, typer.Option("--entity-code", help="The one entity that may use the invitation.")],
    sector: Annotated[str, typer.Option("--sector", help="medical, finance, traffic, … (one code).")],
    out: Annotated[Path, typer.Option("--out", help="A new file: the invitation. It holds a secret token.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Discard a request of this entity that you did not approve.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Invite an enterprise: a file for it, good for 24 hours and one use. Send it by a way that you trust.

    Example: fedpact participant invite --name A --entity-code 91310000MA1K000001 --sector medical --out a.json
    """
    from ssl import PEM_cert_to_DER_cert

    from fedpact_contract.canonical import canonical_bytes, sha256_hex
    from fedpact_contract.keys import show_fingerprint
    from fedpact_contract.request import utc_now
    from fedpact_server import enrolment

    operator, database = open_home(home)
    write_new(out, b"", private=True)  # before the database knows of it: a token that cannot be kept is not issued
    try:
        invitation = enrolment.invite(
            operator, database, name=name, entity_code=entity_code, sector=sector, now=utc_now(), replace=replace
        )
    except BaseException:
        out.unlink()
        raise
    out.write_bytes(canonical_bytes(invitation.plain()) + b"\n")
    authority = sha256_hex(PEM_cert_to_DER_cert(invitation.ca_pem))
    if as_json:
        shown = {"invitation": str(out), "url": invitation.url, "expires": invitation.expires}
        shown |= {"operator": invitation.operator, "entity_code": entity_code}
        output.emit_json(shown | {"ca": authority})
        return
    line(f"The invitation is {out}, good until {invitation.expires} for one use by {entity_code}.")
    line("The enterprise runs: fedpact-agent enrol " + out.name)
    line("It then compares these fingerprints with you:")
    line(f"  your key's                    {show_fingerprint(invitation.operator)}")
    line(f"  your certificate authority's  {show_fingerprint(authority)}")


def approve_command(
    participant: Selector,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="What the enterprise's `enrol` printed, told to you by another way.")
    ],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Admit an enterprise whose fingerprint you compared. It also lifts a freeze or a revocation.

    Example: fedpact participant approve "Hospital A" --fingerprint "3f2a 91c0 …"
    """
    from fedpact_contract.request import utc_now
    from fedpact_server import enrolment

    _, database = open_home(home)
    member = enrolment.approve(database, selector=participant, fingerprint=fingerprint, now=utc_now())
    _show_one(member, f"{member.name} is approved.", as_json=as_json)


def revoke_command(participant: Selector, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Send an enterprise no more orders. Its keys, its signatures and what it earned stay as they are.

    Example: fedpact participant revoke "Hospital A"
    """
    from fedpact_contract.request import utc_now
    from fedpact_server import enrolment

    _, database = open_home(home)
    member = enrolment.suspend(database, selector=participant, now=utc_now())
    _show_one(member, f"{member.name} gets no more orders.", as_json=as_json)


def list_command(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """List enterprises with their states, data sets and fingerprints, open invitations, and the latest alarms.

    Example: fedpact participant list --json
    """
    from fedpact_contract.keys import show_fingerprint
    from fedpact_server import alarms, cards, enrolment

    _, database = open_home(home)
    with database.read() as connection:
        members = enrolment.members(connection)
        sets = {m.id: cards.card_list(connection, m.id) for m in members}
        invited, alarmed = enrolment.open_invitations(connection), alarms.latest(connection, 20)
    if as_json:
        shown: list[dict[str, Any]] = [
            m.plain() | {"data_sets": [{"id": c.data_set, "num_examples": c.num_examples} for c in sets[m.id]]}
            for m in members
        ]
        output.emit_json({"participants": shown, "invitations": invited, "alarms": alarmed})
        return
    console = output.console()
    rows = [
        [
            m.name,
            m.entity_code,
            m.sector,
            m.state,
            ", ".join(f"{c.data_set} ({c.num_examples})" for c in sets[m.id]) or "-",
            show_fingerprint(m.id),
        ]
        for m in members
    ]
    output.table(console, ["participant", "entity code", "sector", "state", "data sets (rows)", "fingerprint"], rows)
    if invited:
        rows = [[i["name"], i["entity_code"], i["sector"], i["expires"]] for i in invited]
        output.table(console, ["invited", "entity code", "sector", "until"], rows)
    if alarmed:
        output.table(console, ["alarm", "at", "detail"], [[a["code"], a["at"], a["detail"]] for a in alarmed])


def card_command(
    participant: Selector,
    data_set: Annotated[str, typer.Option("--data-set", help="One data set of several.", metavar="ID")] = "",
    form: Annotated[
        Literal["text", "croissant"], typer.Option("--format", help="croissant: JSON-LD by Croissant 1.1.")
    ] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="A new file for it.", metavar="FILE")] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show what an enterprise declared of a data set and signed, and which contracts were made by this card.

    Example: fedpact participant card "Hospital A" --format croissant --out heart.jsonld
    """
    from fedpact_contract.croissant import croissant_bytes
    from fedpact_contract.quality import card_lines
    from fedpact_contract.record import decimal_text
    from fedpact_server import cards, enrolment

    _, database = open_home(home)
    with database.read() as connection:
        member = enrolment.find(connection, participant)
        card = cards.the_card(connection, member, data_set)
        named = cards.naming(connection, card)
    if form == "croissant":
        made = croissant_bytes(card)
        write_new(out, made) if out is not None else line(made.decode().rstrip())
        return
    if out is not None:
        raise InputError("USAGE", "A file is written of the format croissant.", field="--out", remedy=CROISSANT)
    if as_json:
        contracts = [{"id": i, "this_card": same} for i, same in named]
        output.emit_json(card.plain() | {"digest": card.digest(), "contracts": contracts})
        return
    line(f"{member.name} declared and signed of its data set {card.data_set}; none of it was verified here:")
    rows = [
        ("examples", str(card.num_examples), "declared"),
        ("columns", ", ".join(card.columns), "declared"),
        ("label", card.label, "declared"),
        ("entity", card.entity or "none", "declared"),
        ("epsilon, delta", f"{decimal_text(card.epsilon)}, {decimal_text(card.delta)}", "over all contracts"),
        ("released rows", str(card.released_rows), "counted; outside the privacy guarantee"),
        *card_lines(card.facts, card.measured),
        ("digest", card.digest(), "SHA-256 of the record"),
    ]
    output.table(output.console(), ["item", "value", "where it comes from"], rows)
    for contract, same in named:
        line(
            f"Contract {contract[:12]} was made by {'this card' if same else 'an EARLIER card: it has changed since'}."
        )


def _show_one(member: "Member", text: str, *, as_json: bool) -> None:
    if as_json:
        output.emit_json(member.plain())
        return
    line(text)
    line(f"State        {member.state}")
    line(f"Id           {member.id}")
