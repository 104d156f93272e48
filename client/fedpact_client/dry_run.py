"""`fedpact-agent dry-run`: all that a contract would do here, without doing it. No network, no charge, nothing kept.

The rows are read and encoded by a trainer that is closed in as it will be; every check of `sign` is made; bytes are
counted from records like those that would leave, hours from one step on made-up rows. The ledgers are opened to be
read alone, and no key is made.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpact_client import quote, review
from fedpact_client.config import AgentConfig
from fedpact_client.home import AgentHome
from fedpact_client.review import Check
from fedpact_client.store import Store
from fedpact_client.text import check_values
from fedpact_client.trial import Trial, try_rows
from fedpact_client.views import resolve_id
from fedpact_contract.clauses.clause import Both
from fedpact_contract.contract import Contract, Participant
from fedpact_contract.contract_file import read_contract
from fedpact_contract.errors import FedpactError, InputError
from fedpact_contract.language import Lang
from fedpact_contract.request import utc_now

if TYPE_CHECKING:
    from decimal import Decimal

NOTHING = Both(
    "Nothing was sent, charged or kept: this is what would happen.",
    "未发送、未计费、未留存任何内容：以下为将会发生的情形。",
)


def find(store: Store, text: str) -> Contract:
    """The contract in a file or in evidence, or one that was signed here, by its id or a beginning of it.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_AMBIGUOUS, or as `read_contract`.
        FaultError: a signature on it does not hold.
    """
    if Path(text).exists():
        return read_contract(Path(text))[0]
    try:
        return store.contract(resolve_id(text, [a.contract_id for a in store.contracts()])).contract
    except InputError as err:
        if err.code == "CONTRACT_UNKNOWN":
            err.remedy = "Give a contract's file (`fedpact-agent quote ID --keep FILE` writes one), or one signed here."
        raise


def dry_run(
    home: AgentHome, config: AgentConfig, store: Store, contract: Contract, mbit: "Decimal", lang: Lang = "en"
) -> dict[str, Any]:
    """What the contract would read, cost, take and send, as plain values; `accepted`: whether `sign` would sign it.

    `lang` is the language of what is said in sentences.

    Raises:
        InputError: CONTRACT_NOT_A_PARTY, CONFIG_DATA_SET, CARD_BUDGET, CARD_DELTA; a damaged trust file.
        FaultError: RELEASED_DAMAGED.
        RefusedError: BUDGET_PLAN_EXCEEDED, one attempt alone has no bound.
    """
    me = contract.participant(home.participant_id)
    found = review.review(home, config, store, contract, utc_now(), read_data=False)
    rows, tried = _rows(home, config, contract)
    checks = (*found.checks, tried)
    return {
        "contract": contract.id,
        "title": contract.title,
        "accepted": not any(check.error for check in checks),
        "checks": check_values(checks),
        "data": {
            "data_set": me.data_set,
            "columns": [c.name for c in contract.data.columns],
            "label": list(contract.data.label_columns),
            "rows_that_fit": None if rows is None else rows.num_rows,
            "rows_used": me.num_examples,
        },
        "privacy": quote.privacy_cost(home, config, store, contract, me.id),
        "leaves": leaves(contract, me, lang),
        "time": _time(config, contract, me, mbit, lang),
        "nothing": NOTHING.of(lang),
    }


def leaves(contract: Contract, me: Participant, lang: Lang = "en") -> dict[str, Any]:
    """The messages that would leave by kind, as the egress ledger names them: how many, bytes of each and of all."""
    moved = quote.traffic(contract, me, lang)
    out, rounds = moved["out"], contract.training.rounds
    kinds = [
        (
            *("signature", 1, out["signature"]),
            Both("the signed contract, and which key signs for it", "已签署的合约，以及由哪把密钥代签"),
        ),
        *(
            ("measurement", 1, size, Both(f"{kind}, with the contract's noise", f"{kind}，已按合约加噪"))
            for kind, size in out["measurements"].items()
        ),
        (
            *("update", rounds, moved["per_round"]["out"]),
            Both("one a round, or a refusal, which is smaller", "每轮一份，或为更小的拒绝"),
        ),
        (
            *("countersignature", 1, out["countersignature"]),
            Both("at the close, once all was recomputed here", "结算时，本机全部重算之后"),
        ),
    ]
    return {
        "kinds": [
            {"kind": kind, "times": times, "bytes": size, "total": times * size, "what": what.of(lang)}
            for kind, times, size, what in kinds
        ],
        "per_round": moved["per_round"]["out"],
        "total": out["total"],
        "not_counted": moved["not_counted"],
    }


def _rows(home: AgentHome, config: AgentConfig, contract: Contract) -> tuple[Trial | None, Check]:
    name = "rows fit the schema"
    try:
        return try_rows(home, config, contract, traceless=True), Check(name=name)
    except FedpactError as err:
        return None, Check(name=name, error=err)


def _time(config: AgentConfig, contract: Contract, me: Participant, mbit: "Decimal", lang: Lang) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", str(config.limits.threads))  # read when torch is loaded, below

    from fedpact_client.simulation import seconds_a_step
    from fedpact_models.dp import SystemNoise

    moved = quote.traffic(contract, me)
    step = seconds_a_step(contract, me.id, SystemNoise())
    both, threads = moved["in"]["total"] + moved["out"]["total"], config.limits.threads
    return quote.duration(contract, me, step, both, mbit, threads, lang)
