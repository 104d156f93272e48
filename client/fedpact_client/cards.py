"""The card of a data set: what this enterprise declares about it, signed, and the rows it releases for validation.

Only what stands on the card leaves, and the released rows where there are any; both are shown before. The budget on
the card holds for the data set over all contracts and is declared once. Nothing on the card is computed from the data
but the number of released rows, which leave as they are, and counts that a person lets out one by one: both are outside
the privacy guarantee. A data set that breaks a rule of its quality gate gets no card.
"""

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
from fedpact_contract.clauses.clause import Both
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.language import Lang
from fedpact_contract.messages import DataSetCard, check_card_delta
from fedpact_contract.output import counted
from fedpact_contract.quality import ITEMS, Item, Measured, card_lines
from fedpact_contract.record import decimal_text, sign
from fedpact_contract.request import utc_now

if TYPE_CHECKING:
    import polars as pl

    from fedpact_models.profile import Counts
    from fedpact_models.scratch import Scratch
    from fedpact_models.tables import Batch

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

    def items(self, lang: Lang = "en") -> list[tuple[str, str, str]]:
        """The card for people: what, value, where it comes from."""
        card, declared = self.card, Both("declared in agent.toml", "在agent.toml中申报")
        shares = declared + Both("; over all contracts together", "；由全部合约共用")
        entity = declared + Both(": whose a row is; its name alone leaves", "：一行所属的主体；仅列名离开本机")
        key = Both("fingerprint of the contract key", "合约密钥的指纹")
        follows = Both("follows from epsilon and delta", "由epsilon与delta得出")
        outside = Both("counted; these rows are outside the privacy guarantee", "清点得出；这些行不受隐私保障")
        none = Both("none", "无").of(lang)
        items = [
            (Both("data set", "数据集"), card.data_set, declared),
            (Both("participant", "参与方"), card.participant, key),
            (Both("examples", "样本数"), str(card.num_examples), declared),
            (Both("columns", "特征列"), ", ".join(card.columns), declared),
            (Both("label", "标签列"), card.label, declared),
            (Both("entity", "主体列"), card.entity or none, entity),
            (Both("epsilon", "epsilon"), decimal_text(card.epsilon), shares),
            (Both("delta", "delta"), decimal_text(card.delta), declared),
            (Both("alpha", "alpha"), decimal_text(card.alpha), follows),
            (Both("released rows", "交出的行数"), str(card.released_rows), outside),
        ]
        told = [(what.of(lang), value, source.of(lang)) for what, value, source in items]
        return [*told, *card_lines(card.facts, card.measured, lang)]


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
    last = quality.Reference.read(home.profile_path(data_set_id))
    with loading.rows_of(home, data_set) as loaded, sources.scratch(home.scratch, config.limits) as room:
        reading = _Reading(home, data_set, room)
        profile = quality.profile(
            data_set,
            home.path,
            last,
            utc_now().date(),
            loaded=loaded,
            scratch=room,
            keep=True,
            also=reading.add,
            columns=reading.columns,
        )
        whole, left = reading.finish()
    check_known_elsewhere(home, store, data_set_id, whole)
    quality.refuse(profile)
    rows, left, source = reading.release.checked(), left or profile.counts, profile.source
    if left.rows < data_set.num_examples:
        raise _too_few(left.rows, data_set.num_examples, source)
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
        available=left.rows,
        capped={} if data_set.entity is None else {cap: left.entities.capped(cap) for cap in CAPS},
        not_finite={c.name: c.not_finite for c in left.columns if c.name in data_set.names and c.not_finite},
        one_class=left.labels.number == 1,
        duplicates=left.duplicates,
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


def question(draft: Draft, item: Item, lang: Lang = "en") -> str:
    """What a person is asked before a count is put on the card; no is the default."""
    made = draft.letting_out([item]).card.measured or ()
    shown = ", ".join(f"{ITEMS[m.item][1 + (lang == 'zh')]}, {m.words(lang)}" for m in made)
    return Both(
        f"Computed from the data, without noise, outside the privacy guarantee: {shown}. Put it on the card?",
        f"由数据算出，未加噪声，不受隐私保障：{shown}。写入数据集卡片？",
    ).of(lang)


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


class _Release:
    """The rows that a card would release, and how large a request they make: no more are kept than one request takes.

    `rows` are those so far; `count` and `size` go on where they are too many.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.rows: list[released.Row] = []
        self._names, self._count, self._size, self._asked = list(names), 0, 1, False

    def add(self, table: "pl.DataFrame") -> list[released.Row]:
        """Release these rows too; they themselves.

        Raises:
            InputError: RELEASE_CELL.
        """
        self._asked, made = True, released.cells(table, self._names)
        for row in made:
            self._count, self._size = self._count + 1, self._size + len(canonical_bytes(row)) + 1
            if self._size <= MAX_RELEASE_BYTES:
                self.rows.append(row)
        return made

    def checked(self) -> list[released.Row]:
        """All of them.

        Raises:
            InputError: RELEASE_EMPTY, RELEASE_TOO_LARGE.
        """
        if self._asked and not self._count:
            raise InputError(
                "RELEASE_EMPTY",
                "No row would be released.",
                field="release_fraction",
                remedy="Raise release_fraction, or remove it.",
            )
        if self._size > MAX_RELEASE_BYTES:
            raise InputError(
                "RELEASE_TOO_LARGE",
                f"{counted(self._count, 'row')} of {self._size} bytes would be released; "
                f"one request carries {MAX_RELEASE_BYTES} bytes.",
                field="release_fraction",
                remedy="Release fewer rows.",
            )
        return self.rows


class _Reading:
    """What a card needs to know of the rows beside their profile, noted batch by batch.

    `release` are the rows that would be released; `columns` those of rows that were released before.
    """

    def __init__(self, home: AgentHome, data_set: DataSet, room: "Scratch") -> None:
        from fedpact_models.features import Entities
        from fedpact_models.profile import Counting
        from fedpact_models.tables import first_line

        self._data_set, self._place = data_set, sources.place(data_set.source, home.path)
        self._first_line = first_line(data_set.source.kind, data_set.source.column_names)
        self._entities = None if data_set.entity is None else Entities(data_set.entity)
        self._fingerprint = sources.TableFingerprint(data_set.names, room)
        self._gone, self.release = released.read(home.released_path(data_set.id)), _Release(data_set.names)
        self.columns = {name for row in self._gone for name in row}
        self._key = None if data_set.release_fraction is None else home.release_key()
        if data_set.release_file is not None:
            source = data_set.source.model_copy(update={"path": data_set.release_file})
            for batch in sources.batches(source, home.path, sources.rows_at_once(len(data_set.names))):
                _check_columns(data_set, batch.frame, data_set.release_file)
                self.release.add(batch.frame)
            self._gone += self.release.rows
        self._left: Counting | None = None
        if self._gone or self._key is not None:
            self._left = Counting(data_set.names, data_set.label, data_set.entity, scratch=room)

    def add(self, batch: "Batch") -> None:
        """Note one batch.

        Raises:
            InputError: DATA_COLUMN_MISSING, RELEASE_CELL, RELEASED_COLUMNS.
        """
        data_set, frame = self._data_set, batch.frame
        _check_columns(data_set, frame, self._place)
        if self._entities is not None:
            self._entities.add(frame, file=batch.file, first_line=self._first_line, before=batch.before)
        self._fingerprint.add(frame)
        if self._left is None:
            return
        now: list[released.Row] = []
        if self._key is not None and data_set.release_fraction is not None:
            names = list(data_set.names)
            now = self.release.add(released.choose(frame, names, data_set.release_fraction, self._key))
        self._left.add(released.exclude(frame, [*self._gone, *now]))

    def finish(self) -> "tuple[str, Counts | None]":
        """The table's fingerprint, and the counts of the rows that are left for training; None: of all.

        Raises:
            InputError: DATA_MISSING_VALUE, DATA_ENTITY_MISSING: of rows that are nobody's: column and count.
        """
        if self._entities is not None:
            self._entities.finish()
        return self._fingerprint.hexdigest(), None if self._left is None else self._left.counts()


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

    The record of the rows that were released from it is there, too: without it they would be trained on.

    Raises:
        InputError: CONFIG_DATA_SET, DATA_SOURCE_AWAY.
        RefusedError: DATA_SET_KNOWN_ELSEWHERE.
        FaultError: RELEASED_DAMAGED.
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
    released.check(home.released_path(data_set_id), store.released_rows(data_set_id))
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
