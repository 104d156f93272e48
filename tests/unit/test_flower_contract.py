"""What Fedpact relies on in flwr, most of it internal: names, signatures, fields, constants, and the patched places.

Where one of these fails after an upgrade, read the changed place in flwr, then `superlink`, `app` and `supernode`.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

PINNED = "1.41.0"


def get(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def source(path):
    return inspect.getsource(get(path))


def test_the_version():
    assert importlib.metadata.version("flwr") == PINNED, "every other test in this file looks at that version's insides"


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        # server
        ("flwr.superlink.main:create_app", ["config", "superlink_lifespan_class"]),
        ("flwr.superlink.cli.flower_superlink:SuperLinkLifespan", ["config", "state_factory"]),
        ("flwr.superlink.auth_plugin:ControlAuthnPlugin.validate_tokens_in_metadata", ["self", "metadata"]),
        ("flwr.superlink.auth_plugin:ControlAuthnPlugin.get_login_details", ["self"]),
        ("flwr.superlink.auth_plugin:ControlAuthnPlugin.get_auth_tokens", ["self", "device_code"]),
        ("flwr.superlink.auth_plugin:ControlAuthnPlugin.refresh_tokens", ["self", "metadata"]),
        (
            "flwr.common.event_log_plugin:EventLogWriterPlugin.compose_log_before_event",
            ["self", "request", "context", "account_info", "method_name"],
        ),
        (
            "flwr.common.event_log_plugin:EventLogWriterPlugin.compose_log_after_event",
            ["self", "request", "context", "account_info", "method_name", "response"],
        ),
        ("flwr.common.event_log_plugin:EventLogWriterPlugin.write_log", ["self", "log_entry"]),
        ("flwr.common.serde:fab_to_proto", ["fab"]),
        ("flwr.common.serde:user_config_to_proto", ["user_config"]),
        ("flwr.supercore.fab:Fab", ["hash_str", "content", "verifications"]),
        ("flwr.supercore.interceptors:RuntimeVersionHttpInterceptor", ["component_name"]),
        (
            "flwr.supercore.protobuf.client:ProtobufClient.from_server_address",
            ["server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"],
        ),
        ("flwr.supercore.error:FlowerError.from_json", ["value"]),
        # ServerApp
        (
            "flwr.superlink.grid:HttpGrid",
            ["runtime_api_address", "insecure", "root_certificates", "token"],
        ),
        ("flwr.superlink.grid:HttpGrid.get_nodes", ["self"]),
        ("flwr.superlink.grid:HttpGrid.push_messages", ["self", "messages"]),
        ("flwr.supercore.inflatable.inflatable_object:iterate_object_tree", ["tree"]),
        ("flwr.supercore.inflatable.inflatable_object:get_object_body", ["object_content", "cls"]),
        (
            "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content",
            ["object_content"],
        ),
        (
            "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
            ["object_id", "object_contents", "keep_object_contents", "objects"],
        ),
        # SuperNode
        (
            "flwr.supernode.start_client_internal:start_client_internal",
            [
                "state_factory",
                "server_address",
                "node_config",
                "root_certificates",
                "insecure",
                "authentication_keys",
                "max_retries",
                "max_wait_time",
                "isolation",
                "runtime_api_address",
                "runtime_certificates",
                "runtime_root_certificates_path",
                "health_server_address",
                "trusted_entities",
                "superexec_auth_secret",
                "runtime_dependency_install",
            ],
        ),
        ("flwr.supernode.main:create_app", ["state_factory", "superexec_auth_secret"]),
        ("flwr.supernode.nodestate:NodeStateFactory", ["objectstore_factory"]),
        ("flwr.supernode.runtime.run_clientapp:push_message", ["client", "message", "context"]),
        (
            "flwr.supernode.runtime.run_clientapp:push_task_output",
            ["client", "context", "sub_status", "details"],
        ),
        ("flwr.supercore.heartbeat:HeartbeatSender", ["heartbeat_fn"]),
        ("flwr.supercore.heartbeat:make_task_heartbeat_fn_http", ["client"]),
        ("flwr.supercore.interceptors:SuperExecAuthHttpInterceptor", ["master_secret", "protected_methods"]),
        ("flwr.supercore.interceptors:RuntimeTokenHttpInterceptor", ["token"]),
        (
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
            ["pull_object_protobuf", "node", "run_id"],
        ),
        (
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_confirm_message_received_fn_protobuf",
            ["confirm_message_received_protobuf", "node", "run_id"],
        ),
    ],
)
def test_signatures(path, parameters):
    assert list(inspect.signature(get(path)).parameters) == parameters


def test_the_lifespan_configuration():
    fields = {each.name for each in dataclasses.fields(get("flwr.superlink.config_loader:SuperLinkLifespanConfig"))}
    assert fields == {
        "artifact_provider",
        "authn_plugin",
        "certificates",
        "control_address",
        "database",
        "enable_event_log",
        "enable_supernode_auth",
        "event_log_plugin",
        "fleet_api_address",
        "fleet_api_type",
        "fleet_event_log_plugin",
        "health_server_address",
        "host",
        "insecure",
        "isolation",
        "port",
        "runtime_dependency_install",
        "simulation",
        "ssl_ca_certfile",
        "ssl_certfile",
        "ssl_keyfile",
        "superexec_auth_secret",
    }


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("flwr.supercore.event_log.typing:LogEntry", ["timestamp", "actor", "event", "status"]),
        ("flwr.supercore.event_log.typing:Actor", ["actor_id", "description", "ip_address"]),
        ("flwr.supercore.event_log.typing:Event", ["action", "run_id", "fab_hash"]),
    ],
)
def test_records(path, fields):
    assert [each.name for each in dataclasses.fields(get(path))] == fields


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "flwr.proto.control_pb2:StartRunRequest",
            {
                "fab",
                "override_config",
                "federation",
                "app_spec",
                "user_prompt",
                "series_id",
                "connector_ids",
                "connector_refs",
            },
        ),
        ("flwr.proto.control_pb2:StartRunResponse", {"run_id"}),
        ("flwr.proto.control_pb2:RegisterNodeRequest", {"public_key", "name"}),
        ("flwr.proto.control_pb2:UnregisterNodeRequest", {"node_id"}),
        ("flwr.proto.control_pb2:ListNodesResponse", {"nodes_info"}),
        ("flwr.proto.control_pb2:ListRunsResponse", {"run_dict"}),
        ("flwr.proto.control_pb2:StopRunRequest", {"run_id"}),
        ("flwr.proto.run_pb2:RunStatus", {"status", "sub_status", "details"}),
        ("flwr.proto.node_pb2:NodeInfo", {"node_id", "public_key", "status"}),
        ("flwr.proto.runtime_pb2:PullAppMessagesRequest", {"message_ids"}),
        ("flwr.proto.runtime_pb2:PullAppMessagesResponse", {"messages_list", "message_object_trees"}),
        ("flwr.proto.runtime_pb2:AcquireTaskRequest", {"supported_task_types"}),
        ("flwr.proto.runtime_pb2:AcquireTaskResponse", {"task", "token"}),
        ("flwr.proto.runtime_pb2:PullTaskInputResponse", {"context", "fab"}),
        ("flwr.proto.message_pb2:PullObjectRequest", {"node", "run_id", "object_id"}),
        ("flwr.proto.message_pb2:PullObjectResponse", {"object_found", "object_available", "object_content"}),
        ("flwr.proto.message_pb2:ConfirmMessageReceivedRequest", {"node", "run_id", "message_object_id"}),
        ("flwr.proto.message_pb2:Message", {"metadata", "error"}),
        ("flwr.proto.error_pb2:Error", {"code", "reason"}),
    ],
)
def test_protobuf_fields(path, fields):
    assert fields <= set(get(path).DESCRIPTOR.fields_by_name)


def test_a_run_that_is_asked_for_can_be_nothing_more_than_we_check():
    """`superlink.check_start` looks at every field of a StartRun by which something else than the bundle could run."""
    checked = {"fab", "override_config", "app_spec", "user_prompt", "series_id", "connector_ids", "connector_refs"}
    harmless = {"federation", "override_federation_config"}
    assert set(get("flwr.proto.control_pb2:StartRunRequest").DESCRIPTOR.fields_by_name) == checked | harmless


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("flwr.common.constant:ISOLATION_MODE_PROCESS", "process"),
        ("flwr.common.constant:SUPERLINK_NODE_ID", 1),
        ("flwr.common.constant:ErrorCode.CLIENT_APP_RAISED_EXCEPTION", 2),
        ("flwr.common.constant:ErrorCode.MESSAGE_UNAVAILABLE", 3),
        ("flwr.common.constant:ErrorCode.REPLY_MESSAGE_UNAVAILABLE", 4),
        ("flwr.common.constant:ErrorCode.NODE_UNAVAILABLE", 5),
        ("flwr.common.constant:Status.PENDING", "pending"),
        ("flwr.common.constant:Status.STARTING", "starting"),
        ("flwr.common.constant:Status.RUNNING", "running"),
        ("flwr.common.constant:Status.FINISHED", "finished"),
        ("flwr.common.constant:SubStatus.COMPLETED", "completed"),
        ("flwr.common.constant:SubStatus.FAILED", "failed"),
        ("flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL", 30),
        ("flwr.common.constant:HEARTBEAT_PATIENCE", 2),
        ("flwr.common.constant:SYSTEM_TIME_TOLERANCE", 5),  # preflight_network.AHEAD_SECONDS
        ("flwr.common.constant:TIMESTAMP_TOLERANCE", 300),  # preflight_network.BEHIND_SECONDS
        ("flwr.common.constant:FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 5 << 20),  # preflight_network.CHUNK_BYTES
        ("flwr.supercore.constant:NodeStatus.ONLINE", "online"),
        ("flwr.supercore.constant:NodeStatus.UNREGISTERED", "unregistered"),
        ("flwr.supercore.constant:TaskType.CLIENT_APP", "flwr-clientapp"),
        ("flwr.supercore.error:ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED", 2004),
    ],
)
def test_constants(path, value):
    assert get(path) == value


@pytest.mark.parametrize(
    "name", ["PUBLIC_KEY_ALREADY_IN_USE", "NODE_NOT_FOUND", "RUN_ID_NOT_FOUND", "RUN_ALREADY_FINISHED"]
)
def test_error_codes_exist(name):
    assert isinstance(get(f"flwr.supercore.error:ApiErrorCode.{name}"), int)


def test_the_calls_that_the_filter_knows_are_flowers_routes():
    from fedpact_server.one_port import CONTROL, RUNTIME

    routes = {path for _, path in get("flwr.supercore.protobuf.translation:PROTOBUF_REQUEST_TYPES")}
    assert {f"/v1/control/{call}" for call in CONTROL} <= routes
    assert {f"/v1/runtime/{call}" for call in RUNTIME} <= routes


def test_flower_has_no_route_that_nobody_looked_at(monkeypatch):
    """A new prefix would be refused by the filter; this says that it is there."""
    from starlette.routing import Route

    monkeypatch.setenv("FLWR_DATABASE", ":flwr-in-memory:")
    application = get("flwr.superlink.main:create_app")()
    paths = {route.path for route in application.routes if isinstance(route, Route)} | {
        path for _, path in get("flwr.supercore.protobuf.translation:PROTOBUF_REQUEST_TYPES")
    }
    known = ("/v1/fleet/", "/v1/control/", "/v1/runtime/")
    assert {p for p in paths if not p.startswith(known)} <= {
        "/health",
        "/docs",
        "/openapi.json",
        "/docs/oauth2-redirect",
    }


def test_the_gate_sees_a_control_request_before_its_handler():
    """The event-log middleware stands inside of authentication and outside of the handler, and passes exceptions on."""
    names = [each.cls.__name__ for each in get("flwr.superlink.main:_get_middleware")()]
    assert names.index("ControlAuthenticationMiddleware") < names.index("ProtobufTranslationMiddleware")
    assert names.index("ProtobufTranslationMiddleware") < names.index("ControlEventLogMiddleware")
    body = source("flwr.superlink.routers.control.middlewares:ControlEventLogMiddleware.dispatch")
    assert body.index("await run_in_threadpool(write_before_event)") < body.index(
        "response = await call_next(request)\n        except"
    )


def test_superexec_reads_its_secret_as_raw_bytes_from_any_path():
    assert "read_bytes()" in source("flwr.supercore.auth:load_superexec_auth_secret")


def test_superexec_takes_what_we_give_it():
    """The options of the command line, and the environment variable for its poll."""
    text = source("flwr.supercore.cli.flower_superexec:_parse_args")
    for option in ("--runtime-api-address", "--root-certificates", "--parent-pid"):
        assert option in text
    assert get("flwr.supercore.superexec.run_superexec:_TASK_POLL_INTERVAL_ENV") == "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
    assert get("flwr.common.constant:RUNTIME_DEPENDENCY_INSTALL") is False


def test_the_serverapp_dies_with_the_superexec():
    assert "parent_pid=os.getpid()" in source("flwr.supercore.superexec.plugin.base_exec_plugin:BaseExecPlugin")
    assert "start_parent_process_monitor(parent_pid)" in source("flwr.superlink.runtime.run_serverapp:run_serverapp")


def test_a_run_is_told_its_contract_and_nothing_else_and_no_agent_reads_even_that():
    """Overrides are not covered by the bundle's hash: Flower takes those of keys that the bundle lists: one.

    Both SuperLink and SuperNode fuse them by this function. At an agent nothing reads what comes of it.
    """
    from fedpact_server import shell

    fuse = get("flwr.common.config:get_fused_config_from_fab")
    run = type("Run", (), {"override_config": {"contract-id": "c" * 64}})
    assert fuse(shell.shell_bundle(), run) == {"contract-id": "c" * 64}
    for key, value in {
        "rounds": 9,
        "epsilon": 1e9,
        "noise_multiplier": 0.0,
        "columns": "all",
        "contract-id.x": 1,
    }.items():
        run.override_config = {key: value}
        with pytest.raises(ValueError, match="not present"):
            fuse(shell.shell_bundle(), run)
    import fedpact_client

    sources = [path.read_text("utf-8") for folder in fedpact_client.__path__ for path in Path(folder).glob("*.py")]
    assert len(sources) > 20
    assert not [text for text in sources if "run_config" in text or "override_config" in text]


def test_flower_is_told_no_seconds_to_send():
    """With each reply it sends what its state says of how long the task ran; this place alone, and our state says 0."""
    from fedpact_client.supernode import tell_no_seconds

    text = source("flwr.supernode.start_client_internal:_push_messages")
    assert text.count("state.get_message_processing_duration(") == 1
    assert "send(message, object_tree, clientapp_runtime)" in text
    state = get("flwr.supernode.nodestate:NodeStateFactory")(
        objectstore_factory=get("flwr.supercore.object_store:ObjectStoreFactory")()
    ).state()
    times = dataclasses.make_dataclass("Times", ["starting_at", "finished_at"])
    state.time_store = {"m": times(10.0, 12.5)}
    state._cleanup_old_message_times = lambda: None
    assert state.get_message_processing_duration("m") == 2.5
    tell_no_seconds(state)
    assert state.get_message_processing_duration("m") == 0.0


class TestPatched:
    """Places that `supernode.patch` changes."""

    def test_the_worker_uses_time_for_these_sleeps_alone(self):
        module = get("flwr.supernode.start_client_internal")
        tree = ast.parse(inspect.getsource(module))
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "time"]
        calls = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and "time." in ast.unparse(node.func)
        ]
        assert sorted(calls) == ["time.sleep(0.5)", "time.sleep(0.5)", "time.sleep(3)"]
        assert len(uses) == len(calls)

    def test_the_backoff_is_a_keyword_default(self):
        utils = get("flwr.supercore.inflatable.inflatable_utils")
        assert (
            inspect.signature(utils.pull_objects).parameters["initial_backoff"].kind is inspect.Parameter.KEYWORD_ONLY
        )
        text = source("flwr.supernode.start_client_internal:_pull_and_store_message")
        assert "pull_objects(\n                obj_ids_to_pull," in text
        assert "initial_backoff" not in text
        assert "initial_backoff" in inspect.signature(utils.pull_and_inflate_object_from_tree).parameters

    def test_the_state_lists_pending_tasks(self):
        states = get("flwr.supernode.nodestate:NodeStateFactory")(
            objectstore_factory=get("flwr.supercore.object_store:ObjectStoreFactory")()
        )
        assert list(states.state().get_tasks(statuses=["pending"])) == []
        assert states.state() is states.state()

    def test_patching_and_what_it_does(self):
        """In a process of its own: a patch cannot be taken back."""
        program = """
import fedpact_client.supernode as ours
from flwr.supernode import start_client_internal as flower
from flwr.supercore.inflatable import inflatable_utils as utils
assert utils.pull_objects.__kwdefaults__["initial_backoff"] == 1
ours.patch(0.1)
assert utils.pull_objects.__kwdefaults__["initial_backoff"] == ours.PATCHED_BACKOFF_SECONDS
assert type(flower.time) is ours.ShortTime
"""
        environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)

    def test_the_idle_wait_grows_with_idleness(self):
        from fedpact_client.supernode import PATCHED_SECONDS, ShortTime

        now, slept = [0.0], []
        clock = ShortTime(0.1, slept.append, lambda: now[0])
        for moment in (0.0, 0.5, 2.0, 10.0, 100.0):
            now[0] = moment
            clock.sleep(3)
        assert slept == [0.1, 0.1, 0.2, 1.0, 3]
        clock.sleep(0.5)
        clock.sleep(3)
        assert slept[-2:] == [PATCHED_SECONDS, 0.1]


def test_an_activation_that_failed_is_known_by_the_exception_behind_the_exit():
    """`flwr_exit` is called while the HTTP error is handled, so that the exit's context is that error."""
    from fedpact_client.supernode import SuperNode

    text = source("flwr.supernode.fleet_http_connection:http_request_response")
    assert text.index("except Exception as exc") < text.index("flwr_exit(")
    assert "sys.exit(" in source("flwr.supercore.exit:flwr_exit")

    def exit_after(body, status=412):
        response = httpx.Response(status, json=body, request=httpx.Request("POST", "https://x"))
        try:
            try:
                response.raise_for_status()
            except httpx.HTTPStatusError:
                sys.exit(1)
        except SystemExit as err:
            return SuperNode.activation_failed(None, err)

    assert exit_after({"code": 2004, "detail": "Failed to activate SuperNode."}) is True
    assert exit_after({"code": 2008, "detail": "other"}) is False
    assert exit_after({"detail": "Invalid SuperNode authentication"}, 401) is False
    assert SuperNode.activation_failed(None, SystemExit(1)) is False


def test_flower_interrupts_itself_where_superlink_answers_401():
    """The executor's exit code 77 rests on SIGINT; its own goodbye is SIGTERM."""
    assert "signal.SIGINT" in source("flwr.supercore.retry:make_simple_http_retry_invoker")
    assert "signal.SIGINT" in source("flwr.supernode.fleet_http_connection:http_request_response")
    assert "signal.SIGINT" in source("flwr.supercore.heartbeat:make_task_heartbeat_fn_http")
    handlers = get("flwr.supercore.exit.signal_handler:SIGNAL_TO_EXIT_CODE")
    assert all(0 <= code < 100 for code in handlers.values())  # such exits end with 0


class TestShell:
    def test_it_is_a_bundle_for_flower(self, tmp_path):
        from fedpact_server.shell import shell_bundle, shell_digest

        config = get("flwr.cli.config_utils:get_fab_config")(shell_bundle())
        assert config["tool"]["flwr"]["app"]["components"] == {
            "serverapp": "fedpact_shell.server:app",
            "clientapp": "fedpact_shell.client:app",
        }
        assert config["tool"]["flwr"]["app"]["config"] == {"contract-id": ""}
        installed = get("flwr.cli.install:install_from_fab")(shell_bundle(), tmp_path, skip_prompt=True)
        assert installed.name.endswith(shell_digest()[:8])
        assert (installed / "fedpact_shell" / "server.py").is_file()

    def test_it_is_the_same_everywhere(self, tmp_path):
        """Another process, another folder, other dates and modes, other line ends: the same bytes."""
        from fedpact_server import shell

        folder = Path(shell.__file__).parent
        for name in (*shell.FILES, "__init__.py"):
            copy = tmp_path / "fedpact_shell_copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))
            copy.chmod(0o600)
            os.utime(copy, (1, 1))
        program = "import fedpact_shell_copy as s; print(s.shell_digest())"
        environment = os.environ | {"TZ": "Asia/Shanghai", "PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7"}
        made = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment, timeout=60
        )
        assert made.stdout.strip() == shell.shell_digest()

    def test_it_has_every_file_and_no_other(self):
        from fedpact_server import shell

        folder = Path(shell.__file__).parent
        found = {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.parent != folder
        }
        assert set(shell.FILES) == found | {"pyproject.toml"}

    def test_nothing_in_it_depends_on_the_compressor(self):
        import io
        import zipfile

        from fedpact_server.shell import shell_bundle

        with zipfile.ZipFile(io.BytesIO(shell_bundle())) as archive:
            assert {(i.compress_type, i.date_time, i.create_system, i.external_attr) for i in archive.infolist()} == {
                (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 3, 0o100644 << 16)
            }
