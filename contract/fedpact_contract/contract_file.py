"""A contract as it lies in a file: complete TOML, canonical JSON, an envelope, signed, or in evidence."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpact_contract.canonical import parse_canonical
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import FedpactError, InputError
from fedpact_contract.evidence import LOG
from fedpact_contract.log import ContractSigned, Entry
from fedpact_contract.record import Envelope, read_envelope, signers

_MARKS = ({"participants"}, {"contract", "delegations"}, {"type", "payload", "signatures"})
"""Keys by which the three shapes of JSON are told from anything else."""

_REMEDY = "Give the file that `fedpact contract new --out FILE` wrote, an evidence folder, or complete TOML."
_SHOWN = 5  # of the keys that a file has instead


def read_contract(path: Path) -> tuple[Contract, list[str]]:
    """The contract in a file or an evidence folder, and the ids of the parties whose valid signature is on it.

    Raises:
        InputError: no such file, or no contract in it.
        FaultError: a signature on it does not verify.
    """
    evidence = path.is_dir()
    try:
        data = (path / LOG if evidence else path).read_bytes()
    except FileNotFoundError as err:
        raise InputError(
            "CONTRACT_FILE_MISSING",
            "There is no contract file here, and no folder with evidence.",
            file=path,
            remedy="`fedpact contract new --out FILE` writes a contract, `fedpact evidence` the evidence of one.",
        ) from err
    try:
        if evidence:
            return _in_log(data)
        return _json(data) if _is_json(data) else (_toml(data, path), [])
    except FedpactError as err:
        err.file = err.file or str(path)
        raise


def _toml(data: bytes, path: Path) -> Contract:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise InputError(
            "CONTRACT_ENCODING",
            "The contract file is not UTF-8 text.",
            file=path,
            remedy="Save it as UTF-8, or give the file that `fedpact contract new --out FILE` wrote.",
        ) from err
    try:
        return Contract.from_toml(text, file=path)
    except InputError as err:
        if err.code == "CONTRACT_MISSING_KEY":
            err.remedy = "If this is a template, `fedpact contract new` makes a contract of it."
        raise


def _in_log(data: bytes) -> tuple[Contract, list[str]]:
    """Entry 0 of a log; the rest is not read (`verify` does)."""
    body = Entry.from_bytes(data.partition(b"\n")[0]).open()
    if not isinstance(body, ContractSigned):
        raise InputError(
            "CONTRACT_FILE_FORM",
            "The log does not begin with a signed contract.",
            field="entry 0",
            rule="the first entry of a log is the signed contract",
            remedy="`fedpact verify` says what else is wrong with this evidence.",
        )
    return _signed(body.signed.contract)


def _json(data: bytes) -> tuple[Contract, list[str]]:
    """JSON of three shapes. What is signed is canonical in any case; the file around it may end with a newline."""
    value = _load(data)
    if set(value) == {"contract", "delegations"}:
        return _signed(SignedContract.parse(value, code="CONTRACT_SIGNED_FORM").contract)
    if set(value) == {"type", "payload", "signatures"}:
        return _signed(read_envelope(value))
    return Contract.from_bytes(data.rstrip(b"\n")), []


def _load(data: bytes) -> dict[str, Any]:
    """The values of what looks like a contract, whatever rules of one it may break."""
    with suppress(ValueError, RecursionError):  # `parse_canonical` says what is wrong
        loose = json.loads(data)
        if not isinstance(loose, dict) or not any(set(loose) >= marks for marks in _MARKS):
            raise InputError(
                "CONTRACT_FILE_FORM",
                "The file is JSON, and no contract.",
                field=", ".join(sorted(loose)[:_SHOWN] if isinstance(loose, dict) else []) or "(whole)",
                rule="a contract has participants; a signed one is an envelope, alone or with delegations",
                remedy=_REMEDY,
            )
    try:
        value: dict[str, Any] = parse_canonical(data.rstrip(b"\n"), what="contract")
    except InputError as err:
        err.remedy = _REMEDY
        raise
    return value


def _is_json(data: bytes) -> bool:
    if data.lstrip()[:1] == b"{":
        return True
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _signed(envelope: Envelope[Contract]) -> tuple[Contract, list[str]]:
    keys = signers(envelope, Contract)
    contract = Contract.from_bytes(envelope.body)
    return contract, [party_id for party_id, party in contract.parties().items() if party.key in keys]
