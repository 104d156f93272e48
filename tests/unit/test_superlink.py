"""What SuperLink is asked and answers, as far as it can be tried without one."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab

from fedpact_contract.errors import FailedError
from fedpact_server import superlink
from fedpact_server.superlink import CONTRACT_KEY, SuperLinkConfig, SuperLinkServer, check_start

BUNDLE = b"the one bundle"
DIGEST = hashlib.sha256(BUNDLE).hexdigest()


def asked(content: bytes = BUNDLE, digest: str = DIGEST, config: Any = None, **more: Any) -> StartRunRequest:
    fab = Fab(hash_str=digest, content=content)
    return StartRunRequest(fab=fab, override_config=user_config_to_proto(config or {CONTRACT_KEY: "ab"}), **more)


def test_the_bundle_with_a_contracts_id_is_started() -> None:
    assert check_start(asked(), DIGEST) is None


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"content": b"another"}, "BUNDLE_NOT_INSTALLED"),
        ({"digest": "0" * 64}, "BUNDLE_NOT_INSTALLED"),
        ({"app_spec": "@somebody/app"}, "BUNDLE_NOT_INSTALLED"),
        ({"config": {"other": "x"}}, "RUN_CONFIG"),
        ({"config": {CONTRACT_KEY: "ab", "other": "x"}}, "RUN_CONFIG"),
        ({"user_prompt": "do something else"}, "RUN_CONFIG"),
    ],
)
def test_anything_else_is_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(HTTPException) as refused:
        check_start(asked(**changes), DIGEST)
    assert (refused.value.status_code, refused.value.detail) == (403, code)


def test_an_answer_that_nobody_foresaw_has_failed() -> None:
    request = httpx.Request("POST", "https://127.0.0.1/")
    answer = httpx.Response(500, text="{}", request=request)
    with pytest.raises(FailedError, match=r"CONTROL_ERROR.*answered 500"), superlink._control_errors():
        raise httpx.HTTPStatusError("", request=request, response=answer)


def test_a_server_that_is_not_open_has_no_address(tmp_path: Path) -> None:
    config = SuperLinkConfig(home=tmp_path, port=0, ca=tmp_path, certificate=tmp_path, key=tmp_path, database="")
    with pytest.raises(FailedError, match="SERVER_CLOSED"):
        _ = SuperLinkServer(config, lambda *_: None, bundle=b"").internal
