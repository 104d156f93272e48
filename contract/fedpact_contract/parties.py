"""The contract that everybody signed, opened, and the run key that each party delegated; entry 0 of a log is one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.keys import fingerprint
from fedpact_contract.log import ContractSigned, Entry
from fedpact_contract.record import Envelope, Record, open_signed, signers

R = TypeVar("R", bound=Record)

NOT_YET = frozenset({"CONTRACT_UNSIGNED", "DELEGATION_MISSING"})
"""Codes of what is no forgery: a party has not signed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An entry of the log: where a fault is."""

    index: int
    type: str

    def fault(
        self, code: str, message: str, *, field: str = "", party: str | None = None, rule: str | None = None
    ) -> FaultError:
        """A fault in this entry; its field is `entries.INDEX.FIELD`."""
        path = f"entries.{self.index}" + (f".{field}" if field else "")
        return FaultError(
            code, f"Entry {self.index} ({self.type}): {message}", file="log.jsonl", field=path, party=party, rule=rule
        )

    def within(self, err: FedpactError, *, field: str = "", party: str | None = None) -> FaultError:
        """An error found inside this entry, as a fault of it."""
        path = ".".join(part for part in (field, err.field or "") if part)
        return self.fault(err.code, err.message, field=path, party=err.party or party, rule=err.rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """The contract and who signs what while it runs."""

    contract: Contract
    run_keys: dict[str, str]  # party id -> run key

    @property
    def operator_key(self) -> str:
        """The operator's run key."""
        return self.run_keys[self.contract.operator.id]

    def name(self, party_id: str) -> str:
        """A party's name where it is the only one so called, else its id."""
        parties = self.contract.parties()
        if party_id not in parties:
            return party_id
        name = parties[party_id].name
        return name if sum(p.name == name for p in parties.values()) == 1 else party_id


def opened(envelope: Envelope[R], kind: type[R], key: str) -> R:
    """The record in an envelope that this key, and nobody else, signed once.

    Raises:
        FaultError: another type, a bad, missing or further signature.
        InputError: the record is malformed.
    """
    record = open_signed(envelope, kind, key)
    if len(envelope.signatures) != 1:
        raise FaultError("SIGNATURE_EXTRA", f"A {kind.TYPE} carries more than its one signature.", field="signatures")
    return record


def open_parties(entry: Entry) -> tuple[Parties | None, list[FaultError]]:
    """The parties of entry 0, or None where it holds no readable contract; and every fault in it."""
    place = Place(index=0, type=entry.type)
    try:
        body = entry.open()
    except FedpactError as err:
        return None, [place.within(err)]
    if not isinstance(body, ContractSigned):
        message = "The log must begin with the signed contract."
        return None, [place.fault("LOG_NO_CONTRACT", message, field="type")]
    parties, faults = parties_of(body.signed)
    return parties, [place.within(fault, field="signed") for fault in faults]


def parties_of(signed: SignedContract) -> tuple[Parties | None, list[FaultError]]:
    """The parties of a contract as it travels, or None where not everybody delegated one run key; and every fault."""
    try:
        contract = Contract.from_bytes(signed.contract.body)
    except FedpactError as err:
        return None, [inside(err, "contract")]
    faults = list(_signature_faults(signed.contract, contract))
    run_keys, broken = _delegated(signed, contract)
    faults += broken
    everybody = contract.parties()
    if not broken:
        missing = [party for party_id, party in everybody.items() if party_id not in run_keys]
        message = "A party has delegated no run key."
        faults += [FaultError("DELEGATION_MISSING", message, field="delegations", party=p.name) for p in missing]
    if run_keys.keys() != everybody.keys():
        return None, faults
    return Parties(contract=contract, run_keys=run_keys), faults


def inside(err: FedpactError, field: str, party: str | None = None) -> FaultError:
    """An error found in this field of a record, as a fault; of this party, if one is named."""
    path = ".".join(part for part in (field, err.field) if part)
    return FaultError(err.code, err.message, field=path, party=party or err.party, rule=err.rule)


def _delegated(signed: SignedContract, contract: Contract) -> tuple[dict[str, str], list[FaultError]]:
    """Party id -> run key, of the delegations that hold; and the faults of the others."""
    run_keys: dict[str, str] = {}
    faults = []
    for number, envelope in enumerate(signed.delegations):
        try:
            delegation = _delegation(envelope, contract, run_keys)
        except FedpactError as err:
            faults.append(inside(err, f"delegations.{number}"))
        else:
            run_keys[delegation.party] = delegation.run_key
    return run_keys, faults


def _signature_faults(envelope: Envelope[Contract], contract: Contract) -> Iterator[FaultError]:
    field = "contract.signatures"
    try:
        keys = signers(envelope, Contract)
    except FedpactError as err:
        yield inside(err, "contract")
        return
    due = {party.key: party for party in contract.parties().values()}
    for key, party in due.items():
        if key not in keys:
            message = "A party has not signed the contract."
            yield FaultError("CONTRACT_UNSIGNED", message, field=field, party=party.name, rule="every party signs")
    for key in sorted(keys - due.keys()):
        message = "Somebody who is no party signed the contract."
        yield FaultError("CONTRACT_SIGNED_BY_STRANGER", message, field=field, party=fingerprint(key))
    if len(envelope.signatures) > len(keys):
        yield FaultError("SIGNATURE_EXTRA", "A signature stands twice.", field=field)


def _delegation(envelope: Envelope[Delegation], contract: Contract, run_keys: dict[str, str]) -> Delegation:
    """One delegation, checked against the contract and the delegations before it."""
    party_id = Delegation.from_bytes(envelope.body).party
    parties = contract.parties()
    if party_id not in parties:
        raise FaultError("DELEGATION_STRANGER", "A delegation is by somebody who is no party.", party=party_id)
    party = parties[party_id]
    delegation = opened(envelope, Delegation, party.key)
    if delegation.contract_id != contract.id:
        raise FaultError("DELEGATION_CONTRACT", "A delegation is for another contract.", party=party.name)
    if party_id in run_keys:
        raise FaultError("DELEGATION_TWICE", "A party has delegated two run keys.", party=party.name)
    if delegation.run_key in run_keys.values() or delegation.run_key in {p.key for p in parties.values()}:
        raise FaultError(
            "DELEGATION_KEY",
            "A run key is another party's run key, or a contract key.",
            party=party.name,
            rule="every party has a run key of its own",
        )
    return delegation
