"""The command `fedpact-agent`. Everything heavy is imported by the command that needs it: `--help` answers at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from fedpact_contract import __version__, output
from fedpact_contract.errors import InputError, RefusedError, ServiceError

if TYPE_CHECKING:
    from decimal import Decimal

    from fedpact_client.api import OperatorClient
    from fedpact_client.config import AgentConfig
    from fedpact_client.home import AgentHome
    from fedpact_client.store import ContractState, Store

app = output.command_line("The enterprise's side of a federation: it decides every round, meters, and keeps the data.")
contract_app = output.command_line("Contracts that are offered to this enterprise.")
app.add_typer(contract_app, name="contract")

HomeOption = Annotated[
    Path, typer.Option("--home", envvar="FEDPACT_AGENT_HOME", help="The agent's home.", show_default="./agent")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the contract key.", metavar="FILE")
]
Language = Annotated[
    Literal["en", "zh"] | None,
    typer.Option("--lang", help="The language of the text.", show_default="FEDPACT_LANG, else the locale's"),
]
ContractId = Annotated[str, typer.Argument(help="A contract's id, or its beginning.", metavar="CONTRACT")]
HOME = Path("agent")


def main() -> NoReturn:
    """The entry point of `fedpact-agent`."""
    output.run(app, extra="agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """An opened home: configuration and store, and on demand the operator."""

    home: "AgentHome"
    config: "AgentConfig"
    store: "Store"

    def client(self) -> "OperatorClient":
        """A connection to the enrolled operator; what leaves is entered in the egress ledger."""
        from fedpact_client.api import OperatorClient, egress_of

        return OperatorClient.of_home(self.home, egress_of(self.store))

    def resolve(self, text: str, client: "OperatorClient | None" = None) -> str:
        """A contract's whole id: of those signed here, and of those that the operator offers."""
        from fedpact_client.views import resolve_id

        known = [a.contract_id for a in self.store.contracts()]
        if client is not None and not any(i == text for i in known):
            known += [i for c in client.contracts() if isinstance(i := c.get("id"), str)]
        return resolve_id(text, known)


@contextmanager
def desk(path: Path, *, read_only: bool = False) -> Iterator[Desk]:
    """Open the home for one command; what is logged meanwhile goes to stderr, for stdout has the result alone."""
    from fedpact_client.home import AgentHome
    from fedpact_client.logs import log_to_stderr
    from fedpact_client.store import Store

    log_to_stderr()
    home = AgentHome(path.expanduser().absolute()).check()
    config = home.config()
    witness = None if config.paths.witness is None else Path(config.paths.witness)
    with Store(home.db_path, witness=witness, read_only=read_only, participant=home.participant_id) as store:
        yield Desk(home=home, config=config, store=store)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedpact-agent {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    name: Annotated[str, typer.Option(help="The enterprise's name.")],
    entity_code: Annotated[str, typer.Option(help="Its legal-entity code: 18 digits and capitals.")],
    sector: Annotated[str, typer.Option(help="Its sector, such as medical or finance.")],
    home: HomeOption = HOME,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Make a home: keys, a documented configuration, empty ledgers."""
    from fedpact_client import home as homes
    from fedpact_client.text import show_init

    passphrase = _passphrase(passphrase_file, new=True)
    made = homes.init(home, name=name, entity_code=entity_code, sector=sector, passphrase=passphrase)
    _show({"home": str(made.path), "participant": made.participant_id}, as_json, show_init)


@app.command()
def enrol(
    invitation: Annotated[Path, typer.Argument(help="The operator's invitation.", metavar="INVITATION")],
    home: HomeOption = HOME,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Join the operator of an invitation, once its key is the one that the invitation names."""
    from fedpact_client.api import egress_of
    from fedpact_client.enrol import enrol as join
    from fedpact_client.text import show_enrolled

    with desk(home) as at:
        passphrase = _passphrase(passphrase_file)
        done = join(at.home, invitation, passphrase, egress_of(at.store))
    result = {
        "operator": {"name": done.operator.name, "id": done.operator.id, "url": done.url, "ca": list(done.ca)},
        "participant": done.own_fingerprint,
        "state": done.state,
    }
    _show(result, as_json, show_enrolled)


@app.command()
def preflight(
    home: HomeOption = HOME,
    invitation: Annotated[
        Path | None, typer.Option("--invitation", help="Before enrolment: the operator's invitation.", metavar="FILE")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine and the way to the operator lack: each check with what it found, and the fix.

    It reads the data sets, tries the walls of trainer and executor, writes to the disk, and posts zeros to the
    operator, as many as an update has bytes.

    Exit 0: nothing failed. Exit 1: something did.
    """
    from fedpact_client.logs import log_to_stderr
    from fedpact_client.preflight import run
    from fedpact_client.text import show_preflight

    log_to_stderr()
    found = run(home, invitation, offline=offline)
    count = {state: sum(f.state == state for f in found) for state in ("pass", "warn", "fail", "skip")}
    _show({"checks": [f.plain() for f in found], "count": count}, as_json, show_preflight)
    if count["fail"]:
        raise typer.Exit(1)


@app.command()
def profile(
    data_set: Annotated[str, typer.Argument(help="A data set of agent.toml.", metavar="DATA_SET")],
    contract: Annotated[
        str,
        typer.Option("--contract", help="Also what this contract asks of the rows: a file, or one signed here."),
    ] = "",
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the report into this new file.", metavar="FILE")
    ] = None,
    lang: Language = None,
    home: HomeOption = HOME,
    as_json: Json = False,
) -> None:
    """Count what is in a data set and hold it against its rules; counts alone, and nothing leaves.

    Exit 0: every rule is kept. Exit 5: one is broken, by which `card`, `sign` and training refuse the data set.

    Example: fedpact-agent profile heart-2026 --lang zh --html quality.html
    """
    from fedpact_client import loading, quality, quality_text, sources
    from fedpact_contract.contract_file import read_contract
    from fedpact_contract.files import refuse_existing, write_new
    from fedpact_contract.language import language
    from fedpact_contract.request import utc_now

    said = language(lang)
    if html is not None:
        refuse_existing(html, option="--html")
    today = utc_now().date()
    with desk(home, read_only=True) as at:
        agreed = None
        if contract:
            file = Path(contract)
            agreed = read_contract(file)[0] if file.exists() else at.store.contract(at.resolve(contract)).contract
        before = quality.Reference.read(at.home.profile_path(data_set))
        described, limits = at.config.data_set(data_set), at.config.limits
        with loading.rows_of(at.home, described) as rows, sources.scratch(at.home.scratch, limits) as scratch:
            found = quality.profile(described, at.home.path, before, today, agreed, loaded=rows, scratch=scratch)
    if html is not None:
        write_new(html, quality_text.render(found, said, today.isoformat()).encode(), private=True, option="--html")
    _show(found.plain(), as_json, lambda _: quality_text.show(found, said, today.isoformat()))
    if found.failed:
        raise typer.Exit(5)


@app.command()
def card(
    data_set: Annotated[str, typer.Argument(help="A data set of agent.toml.", metavar="DATA_SET")],
    measured: Annotated[
        list[str] | None,
        typer.Option(
            "--measured",
            help="A count of the rows to put on the card, outside the privacy guarantee; asked for one by one.",
            metavar="ITEM",
        ),
    ] = None,
    croissant: Annotated[
        Path | None,
        typer.Option(
            "--croissant", help="Only write the card signed last into this new file (JSON-LD).", metavar="FILE"
        ),
    ] = None,
    home: HomeOption = HOME,
    lang: Language = None,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Declare a data set: show its card item by item, sign it, and send it."""
    from fedpact_client import cards
    from fedpact_client.text import show_card, show_released
    from fedpact_contract.clauses.clause import Both
    from fedpact_contract.language import language
    from fedpact_contract.record import decimal_text

    if croissant is not None:
        _export(data_set, croissant, home, as_json=as_json)
        return
    said = language(lang)
    with desk(home) as at, at.client() as client:
        draft = cards.prepare(at.home, at.config, at.store, data_set)
        items = cards.countable(draft, measured or [])
        draft = draft.letting_out([item for item in items if yes or output.agree(cards.question(draft, item, said))])
        if not as_json:
            show_card(draft, said)
        output.confirm(Both("Sign this card and send it?", "签署并发送这张卡片？").of(said), yes=yes)
        if draft.rows:
            if not as_json:
                show_released(draft, said)
            count = len(draft.rows)
            asked = Both(
                f"Rows that leave your premises as they are: {count}. Send them?",
                f"将原样离开本机的行：{count}行。发送？",
            )
            output.confirm(asked.of(said), yes=yes)
        cards.declare(at.home, at.store, client, draft, _passphrase(passphrase_file))
    result = draft.card.plain() | {"limit": decimal_text(draft.limit), "sent": True}
    done = Both("The card is signed, kept here and sent.", "卡片已签署，已留存于本机并已发送。")
    _show(result, as_json, lambda _: output.line(done.of(said)))


def _export(data_set: str, path: Path, home: Path, *, as_json: bool) -> None:
    """The card that was signed last as a Croissant description; nothing is read or sent."""
    from fedpact_contract.croissant import croissant_bytes
    from fedpact_contract.files import write_new

    with desk(home, read_only=True) as at:
        declared = at.store.data_set(data_set).declaration
    write_new(path, croissant_bytes(declared), option="--croissant")
    result = {"data_set": data_set, "digest": declared.digest(), "file": str(path)}
    _show(result, as_json, lambda _: output.line(f"The card {declared.digest()} is described in {path}."))


@contract_app.command("list")
def contract_list(home: HomeOption = HOME, as_json: Json = False) -> None:
    """The contracts that the operator offers, and those signed here."""
    from fedpact_client.api import printable
    from fedpact_client.text import show_contracts

    with desk(home) as at, at.client() as client:
        offered = client.contracts()
        here = {a.contract_id: a.state for a in at.store.contracts()}
    rows = [
        {
            "id": printable(str(c.get("id", "")), 64),
            "title": printable(str(c.get("title", ""))),
            "state": printable(str(c.get("state", ""))),
            "signed": len(c["signed"]) if isinstance(c.get("signed"), list) else 0,
            "here": here.get(str(c.get("id", ""))),
        }
        for c in offered
    ]
    _show({"contracts": rows}, as_json, show_contracts)


@contract_app.command("show")
def contract_show(contract: ContractId, home: HomeOption = HOME, lang: Language = None, as_json: Json = False) -> None:
    """A contract in full, who has signed it, and what policy and budget say to it. CONTRACT: its id, or a beginning."""
    from fedpact_client.review import review
    from fedpact_client.review_text import show_review
    from fedpact_client.signing import fetch_offer
    from fedpact_client.text import review_values
    from fedpact_contract.language import language
    from fedpact_contract.request import utc_now

    with desk(home) as at, at.client() as client:
        offer = fetch_offer(client, at.resolve(contract, client))
        found = review(at.home, at.config, at.store, offer.contract, utc_now(), read_data=False)
    values = review_values(found, offer)
    _show(values, as_json, lambda _: show_review(found, offer, language(lang)))


@app.command()
def quote(
    contract: Annotated[
        str, typer.Argument(help="A contract's id, or its beginning, or a contract's file.", metavar="CONTRACT")
    ],
    revenue: Annotated[str, typer.Option("--revenue", help="Also in yuan: what would be shared, fees taken off.")] = "",
    seconds: Annotated[int, typer.Option("--seconds", min=0, help="Time for simulated runs; 0: none.")] = 20,
    mbit: Annotated[str, typer.Option("--mbit", help="Assumed transfer rate, Mbit/s.")] = "10",
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Also write the contract into this new file.", metavar="FILE")
    ] = None,
    home: HomeOption = HOME,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """What joining a contract would cost, and what it might bring: epsilon, bytes, hours, shares. No promise.

    From the signed card and the contract alone: no row is read. Only a contract that is not here yet is asked for.

    Exit 0: the budget pays for it. Exit 5: it does not.

    Example: fedpact-agent quote 3f2a91c0 --revenue 1000000.00
    """
    from fedpact_client import quote as quoting
    from fedpact_client.quote_text import show_quote
    from fedpact_contract.files import refuse_existing, write_new
    from fedpact_contract.language import language
    from fedpact_contract.settlement import parse_yuan

    said = "en" if as_json else language(lang)
    pool, rate = parse_yuan(revenue, field="--revenue") if revenue else None, quoting.transfer_rate(mbit)
    if keep is not None:
        refuse_existing(keep, option="--keep")
    file = Path(contract)
    with desk(home, read_only=file.exists()) as at:
        found = quoting.from_file(file) if file.exists() else quoting.here_or_offered(at, contract)
        if keep is not None:
            write_new(keep, found.to_bytes(), option="--keep")
        own = at.home.participant_id
        values = quoting.quote(
            at.home, at.config, at.store, found, own, seconds=seconds, mbit=rate, pool_fen=pool, lang=said
        )
    _show(values, as_json, lambda v: show_quote(v, said))
    if not values["privacy"]["fits"]:
        raise typer.Exit(5)


@app.command("dry-run")
def dry_run(
    contract: Annotated[
        str, typer.Argument(help="A contract's file, or the id of one signed here.", metavar="CONTRACT")
    ],
    mbit: Annotated[str, typer.Option("--mbit", help="Assumed transfer rate, Mbit/s.")] = "10",
    home: HomeOption = HOME,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """All that a contract would do here, without network, charge or trace: rows, epsilon, hours, what would leave.

    Every check of `sign` is made, the rows are read by a trainer that is closed in; nothing private is trained.

    Exit 0: it would be signed. Exit 5: it would not.

    Example: fedpact-agent quote 3f2a91c0 --keep contract.json; fedpact-agent dry-run contract.json
    """
    from fedpact_client import dry_run as rehearsal
    from fedpact_client.quote import transfer_rate
    from fedpact_client.quote_text import show_dry_run
    from fedpact_contract.language import language

    rate, said = transfer_rate(mbit), "en" if as_json else language(lang)
    with desk(home, read_only=True) as at:
        values = rehearsal.dry_run(at.home, at.config, at.store, rehearsal.find(at.store, contract), rate, said)
    _show(values, as_json, lambda v: show_dry_run(v, said))
    if not values["accepted"]:
        raise typer.Exit(5)


@app.command()
def sign(
    contract: ContractId,
    home: HomeOption = HOME,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """Check a contract against everything known here, show it, and sign it. CONTRACT: its id, or a beginning."""
    from fedpact_client.review import review
    from fedpact_client.review_text import show_review
    from fedpact_client.signing import commit, fetch_offer
    from fedpact_client.text import review_values, show_signed
    from fedpact_client.views import read_before
    from fedpact_contract.language import language
    from fedpact_contract.request import utc_now

    with desk(home) as at, at.client() as client:
        offer = fetch_offer(client, at.resolve(contract, client))
        found = review(at.home, at.config, at.store, offer.contract, utc_now(), read_data=True)
        if not as_json:
            show_review(found, offer, language(lang))
        found.refuse()
        output.confirm("签署本合约？" if language(lang) == "zh" else "Sign this contract?", yes=yes)
        commit(at.home, at.store, client, found, _passphrase(passphrase_file))
        stale = read_before(at.home)
    values = review_values(found, offer) | {"signed_now": True, "restart": stale}
    _show(values, as_json, lambda v: show_signed(v, language(lang)))


@app.command()
def questions(contract: ContractId, home: HomeOption = HOME, as_json: Json = False) -> None:
    """What the operator's log asks this enterprise: a union that it is said to be in, a review of negative values."""
    from fedpact_client import questions as asking
    from fedpact_client.text import show_questions

    with desk(home) as at, at.client() as client:
        agreed = at.store.contract(at.resolve(contract)).contract
        own = at.home.participant_id
        values = {"contract": agreed.id, "questions": [q.plain(agreed, own) for q in asking.fetch(client, agreed, own)]}
    _show(values, as_json, show_questions)


@app.command()
def answer(
    contract: ContractId,
    subject: Annotated[
        str, typer.Option("--subject", help="The question, as `questions` shows it, or its beginning.", metavar="ID")
    ],
    agree: Annotated[bool, typer.Option("--agree", help="Sign and send that this enterprise agrees.")] = False,
    dispute: Annotated[bool, typer.Option("--dispute", help="Sign and send that it disputes, for a --reason.")] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why; every reader of the log sees it.", metavar="TEXT")
    ] = None,
    home: HomeOption = HOME,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Answer a question of `questions`, signed with the contract key. An answer stands: it cannot be taken back.

    Example: fedpact-agent answer 3f2a91c0 --subject 8c01d2e4 --dispute --reason "another hospital, other patients"
    """
    from fedpact_client import questions as asking
    from fedpact_client.text import show_questions
    from fedpact_contract.errors import InputError

    if agree == dispute:
        raise InputError(
            "ANSWER_ONE",
            "An answer agrees or disputes; " + ("both were given." if agree else "neither was given."),
            field="--agree, --dispute",
            remedy="Give one of --agree and --dispute.",
        )
    with desk(home) as at, at.client() as client:
        agreed = at.store.contract(at.resolve(contract)).contract
        own = at.home.participant_id
        asked = asking.choose(asking.fetch(client, agreed, own), subject)
        said: asking.Answer = "agree" if agree else "dispute"
        record = asking.prepare(agreed, own, asked, said, reason)
        if not as_json:
            show_questions({"contract": agreed.id, "questions": [asked.plain(agreed, own)]})
        output.confirm(f"Sign that this enterprise {said}s, and send it?", yes=yes)
        index = asking.send(at.home, client, record, _passphrase(passphrase_file))
    values = record.plain() | {"index": index}
    _show(values, as_json, lambda _: output.console().print(f"Signed and sent: entry {index} of the log."))


@app.command()
def start(home: HomeOption = HOME, as_json: Json = False) -> None:
    """Run the agent until it is stopped. Prints one line when the operator has let it in; the log goes to stderr."""
    from fedpact_client import guard
    from fedpact_client.logs import log_to_stderr
    from fedpact_client.text import show_ready

    log_to_stderr()

    def ready(url: str, participant: str) -> None:
        _show({"ready": True, "url": url, "participant": participant, "process": os.getpid()}, as_json, show_ready)

    def waits(reason: str) -> None:
        if not as_json:  # there the log alone says it: stdout gets one object
            output.error_console().print(f"Waiting: {reason}.", soft_wrap=True)

    raise typer.Exit(guard.run(home.expanduser().absolute(), ready, waits))


@app.command()
def status(
    home: HomeOption = HOME,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the operator.")] = False,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """Who this agent is, whether it runs, its contracts, and alarms."""
    from fedpact_client import views
    from fedpact_client.text import show_status
    from fedpact_contract.language import language

    with desk(home) as at:
        values = views.status(at.home, at.store, _enrolment(at, offline=offline))
    _show(values, as_json, lambda v: show_status(v, language(lang)))


@app.command()
def head(
    contract: Annotated[str, typer.Argument(help="A contract's id, or its beginning; all without it.")] = "",
    home: HomeOption = HOME,
    as_json: Json = False,
) -> None:
    """The newest head of each log that this agent saw, to compare with other participants by telephone."""
    from fedpact_client import views
    from fedpact_client.text import show_heads

    with desk(home, read_only=True) as at:
        ids = [at.resolve(contract)] if contract else [a.contract_id for a in at.store.contracts()]
        values = {"heads": views.heads(at.store, ids)}
    _show(values, as_json, show_heads)


@app.command()
def budget(home: HomeOption = HOME, as_json: Json = False) -> None:
    """What each data set's privacy budget was spent on, and what is left."""
    from fedpact_client import views
    from fedpact_client.text import show_budget

    with desk(home, read_only=True) as at:
        values = {"data_sets": views.budget(at.store, at.config.policy)}
    _show(values, as_json, show_budget)


@app.command()
def plan(
    what: Annotated[
        str,
        typer.Argument(
            help="A file with a contract or a template; with the options, a data set's id in agent.toml.",
            metavar="FILE|DATA_SET",
        ),
    ],
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds of training.")] = None,
    local_steps: Annotated[int | None, typer.Option("--local-steps", help="Steps in a round.")] = None,
    sample_rate: Annotated[
        str, typer.Option("--sample-rate", help="Probability with which a row is drawn in a step.")
    ] = "",
    epsilon: Annotated[str, typer.Option("--epsilon", help="The contract's epsilon; the noise follows.")] = "",
    noise_multiplier: Annotated[
        str, typer.Option("--noise-multiplier", help="The contract's noise; epsilon follows.")
    ] = "",
    delta: Annotated[str, typer.Option("--delta", help="The contract's delta.", show_default="0.00001")] = "",
    spare_attempts: Annotated[
        int | None, typer.Option("--spare-attempts", help="Attempts beyond one a round.", show_default="1")
    ] = None,
    entity_rows: Annotated[
        int | None, typer.Option("--entity-rows", help="Rows of one person or firm that are trained on, at most.")
    ] = None,
    home: HomeOption = HOME,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """What a contract would cost, what here refuses it, and how many rounds the budget pays; nothing is changed.

    FILE: a contract, of which all that `sign` checks is checked but the rows, or a template that names this enterprise.

    DATA_SET: its id in agent.toml, with the privacy terms as options.

    Exit 0: it fits and is allowed. Exit 5: it does not, or is not.

    Example: fedpact-agent plan heart.toml

    Example: fedpact-agent plan heart --rounds 20 --local-steps 5 --sample-rate 0.1 --epsilon 2
    """
    from fedpact_client import plan as planning
    from fedpact_client.review_text import show_plan
    from fedpact_client.text import plan_values
    from fedpact_contract.language import language
    from fedpact_contract.request import utc_now

    options = {
        "rounds": rounds,
        "local_steps": local_steps,
        "sample_rate": _number(sample_rate, "--sample-rate"),
        "epsilon": _number(epsilon, "--epsilon"),
        "noise_multiplier": _number(noise_multiplier, "--noise-multiplier"),
        "delta": _number(delta, "--delta"),
        "spare_attempts": spare_attempts,
        "entity_rows": entity_rows,
    }
    asked = planning.Question.of(options)
    with desk(home, read_only=True) as at:
        if asked is None:
            found = planning.of_file(at.home, at.config, at.store, Path(what), utc_now())
        else:
            found = planning.of_terms(at.home, at.config, at.store, what, asked, utc_now())
    _show(plan_values(found), as_json, lambda _: show_plan(found, language(lang)))
    if found.refused:
        raise typer.Exit(RefusedError.exit_code)


def _number(text: str, option: str) -> "Decimal | None":
    from decimal import Decimal, InvalidOperation

    wrong = InputError("PLAN", f"{text[:40]} is no number.", field=option, remedy="Write a decimal number such as 0.5.")
    try:
        number = Decimal(text) if text else None
    except InvalidOperation as err:
        raise wrong from err
    if number is not None and not number.is_finite():
        raise wrong
    return number


@app.command()
def egress(
    home: HomeOption = HOME,
    contract: Annotated[str, typer.Option("--contract", help="One contract's only; its id, or its beginning.")] = "",
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="One kind's only, such as update; repeat it for several.")
    ] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="The last entries only.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show each request, not one line for those in a row.")] = False,
    as_json: Json = False,
) -> None:
    """Everything that left this enterprise: kind, bytes, digest. Requests in a row are one line; --json has each."""
    from fedpact_client import views
    from fedpact_client.text import show_egress

    with desk(home, read_only=True) as at:
        contract_id = at.resolve(contract) if contract else None
        values = {"egress": views.egress(at.store, contract_id, last, kind or ())}
    _show(values, as_json, lambda v: show_egress(v, fold=not every))


@app.command()
def statement(
    contract: ContractId,
    home: HomeOption = HOME,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Also write the evidence into this new folder.", metavar="FOLDER")
    ] = None,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """This enterprise's lines, recomputed from the operator's evidence and compared with what was sent.

    Exit codes: 0 verified and authenticated; 1 a fault; 4 partly authenticated (an open run, unknown keys).
    """
    from fedpact_client import views
    from fedpact_client.text import show_statement
    from fedpact_contract.language import language

    with desk(home) as at, at.client() as client:
        checked = views.fetch_checked(at.home, at.store, client, at.resolve(contract))
        values = views.statement(checked, at.home.participant_id)
    if keep is not None:
        views.write_evidence(keep, checked.files)
    _show(values, as_json, lambda v: show_statement(v, language(lang)))
    raise typer.Exit(checked.report.exit_code)


@app.command()
def report(
    contract: ContractId,
    out: Annotated[Path, typer.Option("--out", help="The file to write; a new one.", metavar="FILE")],
    form: Annotated[Literal["json", "html"], typer.Option("--format", help="What is written.")] = "json",
    lang: Language = None,
    home: HomeOption = HOME,
    as_json: Json = False,
) -> None:
    """Write the run's report, once the evidence behind it is verified.

    Exit codes: as `statement`.
    """
    from fedpact_client import views
    from fedpact_contract.files import refuse_existing, write_new
    from fedpact_contract.language import language

    refuse_existing(out)
    with desk(home) as at, at.client() as client:
        checked = views.fetch_checked(at.home, at.store, client, at.resolve(contract))
        data = views.report_bytes(checked, client, form, language(lang))
    write_new(out, data)
    values: dict[str, Any] = {"file": str(out), "bytes": len(data), "verdict": checked.report.verdict}
    _show(values, as_json, lambda v: output.console().print(output.visible(f"{v['file']}: {v['verdict']}")))
    raise typer.Exit(checked.report.exit_code)


@app.command()
def pause(contract: ContractId, home: HomeOption = HOME, as_json: Json = False) -> None:
    """Answer no more orders of a contract until `resume`; works without the operator.

    A training that runs is ended within seconds; the attempt is charged. The running agent tells the operator.
    """
    _move(contract, home, "paused", as_json=as_json)


@app.command()
def resume(contract: ContractId, home: HomeOption = HOME, as_json: Json = False) -> None:
    """Answer the orders of a paused contract again."""
    _move(contract, home, "running", as_json=as_json)


@app.command()
def withdraw(
    contract: ContractId,
    home: HomeOption = HOME,
    lang: Language = None,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """End a contract on this side, for good; works without the operator. What was sent stays in the model.

    What was made for it here is destroyed, and a signed receipt says what; the operator answers with its own, which
    lists the models that our updates are in. Again: the same, and what the operator has said since. The passphrase is
    asked for only where the run key is revoked.
    """
    from fedpact_client import leaving
    from fedpact_client.text import show_withdrawn
    from fedpact_client.views import running_process
    from fedpact_contract.clauses.clause import Both
    from fedpact_contract.language import language

    with desk(home) as at:
        contract_id, said = at.resolve(contract), language(lang)
        named = _named(at, contract_id)
        output.confirm(Both(f"Withdraw from {named} for good?", f"永久退出{named}？").of(said), yes=yes)
        at.store.set_state(contract_id, "withdrawn")
        revoked = at.home.revocation_path(contract_id).exists()
        if running_process(at.home) is not None and not revoked:
            leaving.wait_for_guard(at.home, contract_id)
        else:
            key = leaving.signing_key(at.home, contract_id, lambda: _passphrase(passphrase_file))
            receipt = leaving.destroy(at.home, at.store, contract_id, key, lambda: False)
            if not at.home.receipt_path(contract_id, "operator").exists():
                why = leaving.try_to_withdraw(at.home, at.store, at.client, contract_id, key, receipt)
                if why is not None:
                    typer.echo(f"The operator was not told ({why}): the next agent that runs here tells it.", err=True)
        values = {"contract": contract_id, "state": "withdrawn", "receipts": leaving.receipts(at.home, contract_id)}
    _show(values, as_json, lambda v: show_withdrawn(v, said))


@app.command("revoke-key")
def revoke_key(
    contract: ContractId,
    home: HomeOption = HOME,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Revoke this enterprise's run key of a contract, by the contract key: it may be in other hands.

    Nothing more is trained under the contract here, and nothing that the run key signs from then on counts. What it
    signed before stands and is paid; the closing is then countersigned by hand (`fedpact-agent countersign`).
    Exit 6: revoked here; the operator does not answer and is told by the running agent, or by the same command again.

    Example: fedpact-agent revoke-key 3f2a91c0
    """
    from fedpact_client import leaving

    with desk(home) as at:
        contract_id = at.resolve(contract)
        output.confirm(f"Revoke the run key of {_named(at, contract_id)} for good?", yes=yes)
        leaving.revoke(at.home, at.store, contract_id, _passphrase(passphrase_file))
        try:
            with at.client() as client:
                index = leaving.send_revocation(at.home, client, contract_id)
        except ServiceError as err:
            raise ServiceError(
                err.code,
                f"The run key is revoked here; the operator does not know it yet. {err.message}",
                remedy="The running agent tells it as soon as it answers; or give the same command again.",
            ) from err
    values = {"contract": contract_id, "revoked": True, "entry": index}
    _show(values, as_json, lambda v: output.line(f"Revoked here, and in the operator's log (entry {v['entry']})."))


@app.command()
def countersign(
    contract: ContractId, home: HomeOption = HOME, passphrase_file: PassphraseFile = None, as_json: Json = False
) -> None:
    """Verify the closing of a contract whose run key is revoked, and countersign it with the contract key.

    Exit codes: 0 countersigned, or nothing to close yet; 1 it does not hold, and the operator is told.
    """
    from fedpact_client import closing
    from fedpact_contract.errors import FaultError

    with desk(home) as at, at.client() as client:
        contract_id = at.resolve(contract)
        key = at.home.load_contract_key(_passphrase(passphrase_file))
        done, _ = closing.by_hand(at.home, at.store, client, contract_id, key)
    if done == "objected":
        raise FaultError(
            "CLOSING_OBJECTED",
            "The closing does not hold; the operator was told.",
            remedy="`fedpact-agent status` says what is wrong.",
        )
    _show({"contract": contract_id, "done": done}, as_json, lambda v: output.line(v["done"]))


@app.command()
def backup(
    out: Annotated[Path, typer.Option("--out", help="The file to write; a new one.", metavar="FILE")],
    whole: Annotated[
        bool, typer.Option("--whole", help="Also keys, agent.toml and all else: as secret as the keys.")
    ] = False,
    home: HomeOption = HOME,
    as_json: Json = False,
) -> None:
    """Copy the ledgers as they stand, or the whole home, to a new file, also while the agent runs.

    The witness stays out of it: what puts old ledgers back must not put it back.
    """
    from fedpact_client.backup import save

    with desk(home, read_only=True) as at:
        if whole:
            save(at.home, at.store, out)
        else:
            at.store.backup(out)
    _show({"file": str(out)}, as_json, lambda v: output.console().print(output.visible(v["file"])))


@app.command()
def restore(
    home: HomeOption = HOME,
    backup_file: Annotated[
        Path | None,
        typer.Option("--from", help="First make the home of this file of `backup --whole`.", metavar="FILE"),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """After an old copy of agent.db was put back: every running contract counts as fully spent from now on.

    With --from, a new home is made of a backup of the whole home; ledgers of an earlier release become this one's.
    """
    from fedpact_client.backup import unpack
    from fedpact_client.home import AgentHome
    from fedpact_client.store import HomeLock, Store
    from fedpact_client.store_upgrade import upgrade as make_new
    from fedpact_contract.request import utc_now

    at = AgentHome(home.expanduser().absolute())
    if backup_file is None:
        at.check().config()
    output.confirm("Count every running contract of this agent as fully spent, for good?", yes=yes)
    if backup_file is not None:
        unpack(backup_file, at.path)
        with HomeLock(at.path):
            make_new(at.db_path, utc_now())
    config = at.check().config()
    witness = None if config.paths.witness is None else Path(config.paths.witness)
    own = at.participant_id
    with HomeLock(at.path), Store(at.db_path, witness=witness, restoring=True, participant=own) as store:
        keys = {
            a.contract_id: at.run_key(a.contract_id)
            for a in store.contracts()
            if at.run_key_path(a.contract_id).exists()
        }
        rows = store.write_off(keys)
    values = {"written_off": [{"contract": r.contract_id, "rdp": str(r.rdp)} for r in rows]}
    _show(
        values,
        as_json,
        lambda v: output.console().print(f"{output.counted(len(v['written_off']), 'contract')} written off."),
    )


@app.command()
def upgrade(home: HomeOption = HOME, as_json: Json = False) -> None:
    """Make the ledgers of an earlier release those of this one: a backup first, then all of it or nothing.

    Stop the agent before, install the new release, then run this. An earlier release refuses the ledgers afterwards.
    """
    from fedpact_client.home import AgentHome
    from fedpact_client.store import HomeLock
    from fedpact_client.store_upgrade import upgrade as make_new
    from fedpact_contract.request import utc_now

    at = AgentHome(home.expanduser().absolute()).check()
    with HomeLock(at.path):
        done = make_new(at.db_path, utc_now())
    values = {"old": done.old, "new": done.new, "backup": None if done.backup is None else str(done.backup)}
    at.config()  # a key that this release wants and the file lacks is named now, not at the next start

    def show(_: dict[str, Any]) -> None:
        if done.backup is None:
            output.line(f"Nothing to do: the ledgers are of version {done.new}.")
        else:
            output.line(f"The ledgers are of version {done.new}, and were of {done.old}: a copy is {done.backup}.")

    _show(values, as_json, show)


def _move(contract: str, home: Path, state: "ContractState", *, as_json: bool) -> None:
    from fedpact_client.leaving import check_resumable

    with desk(home) as at:
        contract_id = at.resolve(contract)
        if state == "running":
            check_resumable(at.home, contract_id)
        at.store.set_state(contract_id, state)
    words = "are answered again" if state == "running" else "are answered no more, until `fedpact-agent resume`"
    _show(
        {"contract": contract_id, "state": state},
        as_json,
        lambda v: output.line(f"{v['state']}: orders of the contract {contract_id[:8]} {words}."),
    )


def _named(at: Desk, contract_id: str) -> str:
    """A contract as a question names it: title, and the beginning of its id."""
    return f"{at.store.contract(contract_id).contract.title} ({contract_id[:8]})"


def _enrolment(at: Desk, *, offline: bool) -> str:
    """What the operator says of this agent; a silent operator is part of the status, no error."""
    if not at.home.operator_path.exists():
        return "not enrolled"
    if offline:
        return "not asked"
    try:
        with at.client() as client:
            return client.enrolment()
    except (ServiceError, RefusedError) as err:
        return f"unknown ({err.code})"


def _show(values: dict[str, Any], as_json: bool, text: Any) -> None:  # noqa: ANN401 - a function of the values
    if as_json:
        output.emit_json(values)
    else:
        text(values)


def _passphrase(file: Path | None, *, new: bool = False) -> bytes:
    return output.read_passphrase(file, "the contract key", new=new)
