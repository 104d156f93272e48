"""The card of a data set: what this enterprise declares about it, signed, and the rows it releases for validation.

Only what stands on the card leaves, and the released rows where there are any; both are shown before. The budget on
the card holds for the data set over all contracts and is declared once. Nothing on the card is computed from the data
but the number of released rows, which leave as they are, and counts that a person lets out one by one: both are outside
the privacy guarantee. A data set that breaks a rule of its quality gate gets no card.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING

from fedpact_client import loading, quality, released, sources
from fedpact_client.api import OperatorClient
from fedpact_client.config import AgentConfig, DataSet
from fedpact_client.home import AgentHome
from fedpact_client.store import Store
from fedpact_client.store_records import OVER
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.messages import DataSetCard, check_card_delta
from fedpact_contract.output import counted
from fedpact_contract.quality import ITEMS, Item, Measured, card_lines
from fedpact_contract.record import decimal_text, sign
from fedpact_contract.request import utc_now

if TYPE_CHECKING:
    import polars as pl

MAX_RELEASE_BYTES = 900_000
"""The operator takes requests of at most 2**20 bytes: the card and its envelope need the rest."""
CAPS = (1, 2, 4, 8)
"""Rows of one entity for which it is shown how many rows would be left: a contract names its cap later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A card before it is signed.

    `limit` is R, the bound on the Rényi sum; `rows` are those to be released; `available` are the source's rows
    that are left for training; `capped` says how many of them, by cap, where at most so many rows of one entity are
    trained on (empty where no entity is declared); `not_finite` how many cells of a column are NaN or infinite, where
    there are any; `one_class` whether all labels are the same; `duplicates` how many of the `available` are
    exact copies of another (as the file spells them); by `fingerprints` the source is known again; `profile` is what
    was counted; `superseded` are the contracts signed here that name another card of this data set.
    """

    card: DataSetCard
    limit: Decimal
    rows: tuple[released.Row, ...]
    available: int
    capped: dict[int, int]
    not_finite: dict[str, int]
    one_class: bool
    duplicates: int
    source: str
    fingerprints: tuple[str, ...]
    profile: quality.Profile
    superseded: tuple[str, ...] = ()

    def letting_out(self, items: Sequence[Item]) -> "Draft":
        """This draft with these counts on its card (`countable` has been asked)."""
        exact = self.profile.items()
        made = tuple(Measured.of(item, exact[item]) for item in items)
        return replace(self, card=self.card.model_copy(update={"measured": made or None}))

    def items(self) -> list[tuple[str, str, str]]:
        """The card for people: what, value, where it comes from."""
        card, declared = self.card, "declared in agent.toml"
        return [
            ("data set", card.data_set, declared),
            ("participant", card.participant, "fingerprint of the contract key"),
            ("examples", str(card.num_examples), declared),
            ("columns", ", ".join(card.columns), declared),
            ("label", card.label, declared),
            ("entity", card.entity or "none", declared + ": whose a row is; its name alone leaves"),
            ("epsilon", decimal_text(card.epsilon), declared + "; over all contracts together"),
            ("delta", decimal_text(card.delta), declared),
            ("alpha", decimal_text(card.alpha), "follows from epsilon and delta"),
            ("released rows", str(card.released_rows), "counted; these rows are outside the privacy guarantee"),
            *card_lines(card.facts, card.measured),
        ]


def prepare(home: AgentHome, config: AgentConfig, store: Store, data_set_id: str) -> Draft:
    """Read the data set once and draft its card; nothing leaves.

    Raises:
        InputError: CONFIG_DATA_SET, DATA_*, CARD_BUDGET, CARD_DELTA, CARD_FILE, RELEASE_EMPTY, RELEASE_CELL,
            RELEASE_TOO_LARGE; QUALITY_ENTITY, PROFILE_FILE.
        RefusedError: DATA_SET_BUDGET_FIXED, DATA_SET_KNOWN_ELSEWHERE; QUALITY_GATE, the data set breaks a rule.
        FaultError: RELEASED_DAMAGED.
    """
    data_set = config.data_set(data_set_id)
    places = check_own_file(home, config, store, data_set_id)
    content = [] if data_set.source.is_database else [sources.content_fingerprint(data_set.source, home.path)]
    for fingerprint in content:
        check_known_elsewhere(home, store, data_set_id, fingerprint)
    alpha, limit = limits(home, data_set)
    with loading.rows_of(home, data_set) as file:
        table = sources.read(sources.loaded(data_set.source, file), home.path)
    source = sources.place(data_set.source, home.path)
    _check_columns(data_set, table, source)
    _check_entities(data_set, table, source)
    whole = sources.table_fingerprint(table, data_set.names)
    check_known_elsewhere(home, store, data_set_id, whole)
    last = quality.Reference.read(home.profile_path(data_set_id))
    profile = quality.profile(data_set, home.path, last, utc_now().date(), table=table, keep=True)
    quality.refuse(profile)
    rows = _rows_to_release(home, data_set, table)
    left = released.exclude(table, [*released.read(home.released_path(data_set_id)), *rows])
    if left.height < data_set.num_examples:
        raise _too_few(left.height, data_set.num_examples, source)
    card = DataSetCard(
        data_set=data_set_id,
        participant=home.participant_id,
        num_examples=data_set.num_examples,
        columns=data_set.columns,
        label=data_set.label,
        entity=data_set.entity,
        epsilon=data_set.epsilon,
        delta=data_set.delta,
        alpha=alpha,
        released_rows=len(rows),
        facts=None if data_set.card is None else data_set.card.facts(home.path),
    )
    _check_fixed_budget(home, store, card)
    return Draft(
        card=card,
        limit=limit,
        rows=tuple(rows),
        available=left.height,
        capped=_capped(data_set, left, source),
        not_finite=_not_finite(left, (*data_set.columns, data_set.label)),
        one_class=left[data_set.label].drop_nulls().n_unique() == 1,
        duplicates=left.height - left.n_unique(list(data_set.names)),
        source=source,
        fingerprints=(*places, *content, whole),
        profile=profile,
        superseded=_superseded(store, card),
    )


def countable(draft: Draft, items: Sequence[str]) -> list[Item]:
    """The counts of these names that may be let out of this data set, each once.

    Raises:
        InputError: CARD_MEASURED.
    """
    known = draft.profile.items()
    for item in items:
        if item not in known:
            raise InputError(
                "CARD_MEASURED",
                f"{item} is no count that this data set's card can carry.",
                field="--measured",
                remedy=f"Name one of: {', '.join(known)}.",
            )
    return [item for item in known if item in items]


def question(draft: Draft, item: Item) -> str:
    """What a person is asked before a count is put on the card; no is the default."""
    made = draft.letting_out([item]).card.measured or ()
    shown = ", ".join(f"{ITEMS[m.item][1]}, {m.words}" for m in made)
    return f"Computed from the data, without noise, outside the privacy guarantee: {shown}. Put it on the card?"


def declare(home: AgentHome, store: Store, client: OperatorClient, draft: Draft, passphrase: bytes) -> None:
    """Sign the card, keep it and the record of released rows here, then send it. Again sends the same card again.

    Released rows are recorded before they leave: training leaves them out even if the sending fails.

    Raises:
        InputError: a wrong passphrase; the operator finds the card wrong.
        RefusedError: DATA_SET_BUDGET_FIXED, DATA_SET_KNOWN_ELSEWHERE; the operator refuses.
        ServiceError: OPERATOR_AWAY: declared here, not sent; run it again.
    """
    envelope = sign(draft.card, home.load_contract_key(passphrase))
    if draft.rows:
        released.record(home.released_path(draft.card.data_set), list(draft.rows))
    store.declare(envelope.to_bytes(), draft.limit)
    store.add_version(draft.card.data_set, *draft.fingerprints)
    if draft.profile.reference is not None:
        draft.profile.reference.write(home.profile_path(draft.card.data_set))
    client.send_card(envelope.plain(), [dict(row) for row in draft.rows] or None)


def _superseded(store: Store, card: DataSetCard) -> tuple[str, ...]:
    """Contracts signed here, not over, that name another card of this data set."""
    running = [a for a in store.contracts() if a.state not in OVER and a.terms.data_set == card.data_set]
    named = {a.contract_id: a.contract.participant(card.participant).card for a in running}
    return tuple(i for i, digest in named.items() if digest is not None and digest != card.digest())


def _rows_to_release(home: AgentHome, data_set: DataSet, table: "pl.DataFrame") -> list[released.Row]:
    names = list(data_set.names)
    if data_set.release_fraction is not None:
        slice_ = released.choose(table, names, data_set.release_fraction, home.release_key())
    elif data_set.release_file is not None:
        source = data_set.source.model_copy(update={"path": data_set.release_file})
        slice_ = sources.read(source, home.path)
        _check_columns(data_set, slice_, data_set.release_file)
    else:
        return []
    rows = released.cells(slice_, names)
    if not rows:
        raise InputError(
            "RELEASE_EMPTY",
            "No row would be released.",
            field="release_fraction",
            remedy="Raise release_fraction, or remove it.",
        )
    if (size := len(canonical_bytes(rows))) > MAX_RELEASE_BYTES:
        raise InputError(
            "RELEASE_TOO_LARGE",
            f"{counted(len(rows), 'row')} of {size} bytes would be released; "
            f"one request carries {MAX_RELEASE_BYTES} bytes.",
            field="release_fraction",
            remedy="Release fewer rows.",
        )
    return rows


def _check_columns(data_set: DataSet, table: "pl.DataFrame", file: str) -> None:
    for name in (*data_set.names, *([] if data_set.entity is None else [data_set.entity])):
        if name not in table.columns:
            raise InputError(
                "DATA_COLUMN_MISSING",
                f"The table lacks the column {name}, which agent.toml names.",
                file=file,
                field=name,
                remedy="Correct `columns`, `label`, `entity` or the source's `rename` in agent.toml.",
            )


def _check_entities(data_set: DataSet, table: "pl.DataFrame", file: str) -> None:
    """Every row is somebody's, wherever the data set says whose a row is.

    Raises:
        InputError: DATA_MISSING_VALUE, DATA_ENTITY_MISSING: column and count, never a value.
    """
    from fedpact_models.features import entity_numbers
    from fedpact_models.tables import first_line

    if data_set.entity is not None:
        begins = first_line(data_set.source.kind, data_set.source.column_names)
        entity_numbers(data_set.entity, table, file=file, first_line=begins)


def _capped(data_set: DataSet, table: "pl.DataFrame", file: str) -> dict[int, int]:
    """By cap, how many rows are left where at most so many of each entity are trained on."""
    from fedpact_models.features import entity_numbers

    if data_set.entity is None:
        return {}
    each = Counter(entity_numbers(data_set.entity, table, file=file).tolist()).values()
    return {cap: sum(min(count, cap) for count in each) for cap in CAPS}


def _not_finite(table: "pl.DataFrame", names: Sequence[str]) -> dict[str, int]:
    """By column, how many cells are NaN or infinite, or read as such where a file has text only."""
    import polars as pl

    numbers = {n: table[n] for n in names if table[n].dtype.is_float() or table[n].dtype == pl.String}
    found = {n: int((~cells.cast(pl.Float64, strict=False).is_finite()).sum()) for n, cells in numbers.items()}
    return {name: count for name, count in found.items() if count}


def limits(home: AgentHome, data_set: DataSet) -> tuple[Decimal, Decimal]:
    """Alpha and the limit R that follow from epsilon and delta.

    Raises:
        InputError: CARD_BUDGET, nothing would fit; CARD_DELTA.
    """
    from fedpact_contract.privacy import filter_alpha, filter_limit

    check_card_delta(data_set.delta, data_set.num_examples, file=home.config_path)
    alpha = filter_alpha(data_set.epsilon, data_set.delta)
    limit = filter_limit(data_set.epsilon, data_set.delta, alpha)
    if limit <= 0:
        raise InputError(
            "CARD_BUDGET",
            f"Under epsilon {decimal_text(data_set.epsilon)} at delta {decimal_text(data_set.delta)} nothing fits.",
            file=home.config_path,
            field="epsilon",
            remedy="Declare a larger epsilon.",
        )
    return alpha, limit


def check_own_file(home: AgentHome, config: AgentConfig, store: Store, data_set_id: str) -> tuple[str, ...]:
    """No other data set was declared with a file of this source, whatever is in it by now; their places' fingerprints.

    Raises:
        InputError: CONFIG_DATA_SET, DATA_SOURCE_AWAY.
        RefusedError: DATA_SET_KNOWN_ELSEWHERE.
    """
    source = config.data_set(data_set_id).source
    where, places = sources.place(source, home.path), sources.place_fingerprints(source, home.path)
    what = "The query of" if source.is_database else "The file"
    declared = {d.data_set for d in store.data_sets()}
    for other in config.data_sets:
        if other.id != data_set_id and other.id in declared and sources.overlap(other.source, source, home.path):
            raise _known_elsewhere(home, f"{what} {where} is", data_set_id, other.id)
    for known in store.data_sets():
        if known.data_set != data_set_id and not set(places).isdisjoint(store.versions(known.data_set)):
            raise _known_elsewhere(home, f"{what} {where} is", data_set_id, known.data_set)
    return places


def check_known_elsewhere(
    home: AgentHome, store: Store, data_set_id: str, fingerprint: str, what: str = "These rows are"
) -> None:
    """No other data set has a version with this fingerprint.

    Raises:
        RefusedError: DATA_SET_KNOWN_ELSEWHERE.
    """
    for other in store.data_sets():
        if other.data_set != data_set_id and fingerprint in store.versions(other.data_set):
            raise _known_elsewhere(home, what, data_set_id, other.data_set)


def _known_elsewhere(home: AgentHome, what: str, data_set_id: str, other: str) -> RefusedError:
    return RefusedError(
        "DATA_SET_KNOWN_ELSEWHERE",
        f"{what} known as data set {other}.",
        file=home.config_path,
        field=f"data set {data_set_id}",
        rule="one source has one budget",
        remedy=f"Use the id {other}: other rows in its file are a new version of it, which inherits what was spent; a "
        "new name buys no budget.",
    )


def _check_fixed_budget(home: AgentHome, store: Store, card: DataSetCard) -> None:
    known = store.declared(card.data_set)
    if known is not None and (known.epsilon, known.delta, known.alpha) != (card.epsilon, card.delta, card.alpha):
        fixed = f"epsilon {decimal_text(known.epsilon)} at delta {decimal_text(known.delta)}"
        raise RefusedError(
            "DATA_SET_BUDGET_FIXED",
            f"agent.toml says epsilon {decimal_text(card.epsilon)} at delta {decimal_text(card.delta)}; the data set's "
            f"first card fixed {fixed}.",
            file=home.config_path,
            field=f"data set {card.data_set}",
            rule="epsilon, delta and alpha are declared once for a data set",
            remedy=f"Write {fixed} again.",
        )


def _too_few(found: int, wanted: int, file: str) -> InputError:
    return InputError(
        "DATA_TOO_FEW_ROWS",
        f"For training {counted(wanted, 'row')} declared, {found} left beside the released ones.",
        file=file,
        field="num_examples",
        rule="train on exactly the contracted number of rows",
        remedy="Declare fewer examples, release fewer rows, or name the source that has more.",
    )
