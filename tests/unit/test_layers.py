"""The layer test: who may import whom, and where torch, opacus and flwr may stand (docs/adr/0001)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fedpact_contract": ROOT / "contract" / "fedpact_contract",
    "fedpact_models": ROOT / "models" / "fedpact_models",
    "fedpact_client": ROOT / "client" / "fedpact_client",
    "fedpact_server": ROOT / "server" / "fedpact_server",
}
MAY_IMPORT = {
    "fedpact_contract": set(),
    "fedpact_models": {"fedpact_contract"},
    "fedpact_client": {"fedpact_contract", "fedpact_models"},
    "fedpact_server": {"fedpact_contract", "fedpact_models"},
}
ONLY_IN = {
    "opacus": {"models/fedpact_models/dp.py"},
    "torch": {
        "models/fedpact_models/audit.py",
        "models/fedpact_models/dp.py",
        "models/fedpact_models/registry.py",
        "models/fedpact_models/training.py",
        "models/fedpact_models/weights.py",
        "models/fedpact_models/windows.py",
        "client/fedpact_client/trainer.py",
        "server/fedpact_server/demo/lift.py",
    },
    "ray": {"server/fedpact_server/cluster.py"},  # when the operator's setting asks for it
    "flwr": {
        "client/fedpact_client/supernode.py",  # in the executor, which imports it once it is fenced
        "server/fedpact_server/app.py",  # in the ServerApp, a process of its own
        "server/fedpact_server/flower_accountant.py",  # there too: client-level contracts ask it before each round
        "server/fedpact_server/superlink.py",  # in `serve`
        "server/fedpact_server/shell/",
    },
}
AT_TOP_ONLY_IN = {
    "torch": {
        "models/fedpact_models/audit.py",
        "models/fedpact_models/dp.py",
        "models/fedpact_models/training.py",
        "models/fedpact_models/windows.py",
    }
}
"""Where importing the module may load the library; elsewhere a function does, when it is called."""
AUDITOR = {"cryptography", "dp_accounting", "pydantic", "pydantic_core", "rfc8785", "rich", "typer", "click"}
"""Third-party imports of the contract package: the base dependencies of the wheel."""


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top package, whether at module level) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            yield name.split(".")[0], id(node) in top


def _modules() -> list[tuple[str, Path]]:
    return [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize(("package", "path"), _modules(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_a_package_imports_only_what_lies_below_it(package: str, path: Path) -> None:
    for name, _ in _imports(path):
        if name in PACKAGES and name != package:
            assert name in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("package", "path"), _modules(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_heavy_libraries_stand_at_the_edges(package: str, path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for name, at_top in _imports(path):
        assert not at_top or place in AT_TOP_ONLY_IN.get(name, {place}), f"{place} imports {name} at module level"
        allowed = ONLY_IN.get(name)
        assert allowed is None or any(place == a or (a.endswith("/") and place.startswith(a)) for a in allowed), (
            f"{place} imports {name}"
        )


@pytest.mark.parametrize("walls", [ONLY_IN, AT_TOP_ONLY_IN], ids=["anywhere", "at module level"])
def test_no_wall_has_a_door_that_nobody_uses(walls: dict[str, set[str]]) -> None:
    for library, places in walls.items():
        for place in places:
            files = sorted((ROOT / place).rglob("*.py")) if place.endswith("/") else [ROOT / place]
            found = {(name, at_top or walls is ONLY_IN) for path in files for name, at_top in _imports(path)}
            assert (library, True) in found, f"{place} does not import {library}"


def test_the_guard_has_neither_torch_nor_flower() -> None:
    program = "import sys, fedpact_client.guard as guard; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "fedpact_client" in loaded
    assert loaded & {"torch", "flwr", "opacus"} == set()


def test_the_contract_package_needs_the_base_dependencies_alone() -> None:
    for path in sorted(PACKAGES["fedpact_contract"].rglob("*.py")):
        for name, at_top in _imports(path):
            known = name in sys.stdlib_module_names or name in AUDITOR or name == "fedpact_contract"
            assert known, f"{path.name} imports {name}"
            assert not (name == "dp_accounting" and at_top), f"{path.name} imports dp_accounting at module level"
            assert name not in ("socket", "http", "urllib"), f"{path.name} reaches for the network: {name}"


def test_a_wall_that_moves_is_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from fedpact_server import db\n    import flwr.app\n")
    assert {name for name, _ in _imports(bad)} == {"fedpact_server", "flwr"}
