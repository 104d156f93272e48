"""Contracts that are offered to this enterprise: fetched and signed.

Nothing that the operator says about a contract is believed: its id is recomputed and its signatures are verified here;
`review` holds it against everything else that this enterprise knows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpact_client.api import OperatorClient, printable, reply_error
from fedpact_client.home import AgentHome
from fedpact_client.review import Review, agreement, plan_exceeded
from fedpact_client.store import Store
from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import public_hex
from fedpact_contract.parties import NOT_YET, parties_of
from fedpact_contract.record import sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A contract as the operator serves it: its state there, and the verified signatures so far (ids of parties)."""

    contract: Contract
    state: str
    travelling: SignedContract | None
    signed: frozenset[str]

    @property
    def complete(self) -> bool:
        """Whether every party has signed and delegated its run key."""
        return self.signed == frozenset(self.contract.parties())


def fetch_offer(client: OperatorClient, contract_id: str) -> Offer:
    """A contract from the operator, its id recomputed and its signatures verified.

    Raises:
        FaultError: CONTRACT_ID_WRONG, or a signature or delegation that does not hold.
        InputError: the record is malformed.
        ServiceError: the operator does not answer, or not in this form.
    """
    answer = client.contract(contract_id)
    payload, state = answer.get("payload"), answer.get("state")
    if not isinstance(payload, str) or not isinstance(state, str):
        raise reply_error("payload and state are not text")
    if sha256_hex(payload.encode()) != contract_id:
        raise FaultError(
            "CONTRACT_ID_WRONG",
            "The operator sent another contract than was asked for.",
            field="payload",
            rule="contract id = SHA-256 of the canonical bytes",
            remedy="Nothing was signed. Tell the operator.",
        )
    contract = Contract.from_bytes(payload.encode())
    travelling = _travelling(answer, payload.encode())
    signed = frozenset() if travelling is None else verify_signatures(contract, travelling)
    return Offer(contract=contract, state=printable(state), travelling=travelling, signed=signed)


def fetch_signed(client: OperatorClient, contract_id: str) -> SignedContract:
    """The contract as it travels, with the signatures and delegations so far, all verified.

    Raises:
        RefusedError: CONTRACT_NOT_SIGNED, nobody has signed yet.
        FaultError, InputError, ServiceError: as `fetch_offer`.
    """
    travelling = fetch_offer(client, contract_id).travelling
    if travelling is None:
        raise RefusedError(
            "CONTRACT_NOT_SIGNED", "Nobody has signed the contract yet.", remedy="Wait until a party has signed it."
        )
    return travelling


def verify_signatures(contract: Contract, travelling: SignedContract) -> frozenset[str]:
    """Ids of the parties that signed and delegated; a party of whom one is missing has not signed.

    Raises:
        FaultError: a signature or delegation that is there and does not hold.
    """
    _, faults = parties_of(travelling)
    for fault in faults:
        if fault.code not in NOT_YET:
            raise fault
    keys = {s.key for s in travelling.contract.signatures}
    delegated = {Delegation.from_bytes(d.body).party for d in travelling.delegations}
    return frozenset(i for i, party in contract.parties().items() if party.key in keys and i in delegated)


def commit(home: AgentHome, store: Store, client: OperatorClient, review: Review, passphrase: bytes) -> None:
    """Sign what was reviewed: keep it here, then send it. Signing again sends the same bytes again.

    The signature is kept before it leaves: a contract that the operator may hold is one whose plan is counted.

    Raises:
        RefusedError, InputError, FaultError: a check failed; BUDGET_PLAN_EXCEEDED; the operator refuses.
        InputError: a wrong passphrase; RUN_KEY_WRONG, another run key was delegated before.
        ServiceError: OPERATOR_AWAY: signed here, not sent; sign again.
    """
    review.refuse()
    contract = review.contract
    key = home.load_contract_key(passphrase)
    run_key = home.make_run_key(contract.id)
    envelope = sign(contract, key)
    delegation = sign(Delegation(contract_id=contract.id, party=home.participant_id, run_key=public_hex(run_key)), key)
    known = agreement(store, contract.id)
    if known is None:
        travelling = SignedContract(contract=envelope, delegations=(delegation,))
        _keep(home, store, review, canonical_bytes(travelling.plain()), public_hex(run_key))
    elif known.run_public != public_hex(run_key):
        raise InputError(
            "RUN_KEY_WRONG",
            "The run key here is not the one that was delegated when this contract was signed.",
            file=home.run_key_path(contract.id),
            remedy="Restore the key from a backup.",
        )
    client.sign(contract.id, envelope.plain(), delegation.plain())


def keep_beside(record: Path, contract_id: str, signed: bytes) -> None:
    """Lay the contract beside a record that is verified with it, once; not before everybody has signed it.

    Args:
        record: The record's file.
        contract_id: The contract.
        signed: It as it travels (`SignedContract`, canonical bytes).

    Raises:
        OSError: the disk does not take it.
    """
    path = contract_beside(record, contract_id)
    if path.exists():
        return
    travelling = SignedContract.parse(parse_canonical(signed, what="signed contract"), code="SIGNED_CONTRACT")
    if not parties_of(travelling)[1]:
        replace_file(path, signed)


def contract_beside(record: Path, contract_id: str) -> Path:
    """Where the contract stands that a record is verified with."""
    return record.with_name(f"{contract_id}.contract.json")


def _travelling(answer: dict[str, Any], payload: bytes) -> SignedContract | None:
    """The signatures in an answer, on exactly these bytes; None where there are none yet."""
    if answer.get("contract") is None:
        return None
    travelling = SignedContract.parse(
        {"contract": answer["contract"], "delegations": answer.get("delegations") or []}, code="SIGNED_CONTRACT"
    )
    if not travelling.contract.signatures and not travelling.delegations:
        return None
    if travelling.contract.body != payload:
        raise FaultError("CONTRACT_ID_WRONG", "The signatures are on another contract.", field="contract.payload")
    return travelling


def _keep(home: AgentHome, store: Store, review: Review, travelling: bytes, run_public: str) -> None:
    assert review.terms is not None  # noqa: S101 - `refuse` raised where there are none
    name = str(home.run_key_path(review.terms.contract_id).relative_to(home.path))
    try:
        store.add_contract(travelling, review.terms, name, run_public)
    except RefusedError as err:
        raise plan_exceeded(err) from err
