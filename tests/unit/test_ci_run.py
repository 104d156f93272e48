"""`.ci/run` brings the commands that tests need, where they are missing, and skips no test for want of one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support import required as required_module

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("bash", "dirname", "env", "grep", "mktemp", "rm", "tail", "tee")


@pytest.mark.parametrize(
    ("there", "installed"),
    [
        ((), "iproute2 nftables strace postgresql mariadb-server systemd"),
        (("ip", "pg_ctlcluster"), "nftables strace mariadb-server systemd"),
        (("nft", "strace", "mariadbd", "systemd-analyze"), "iproute2 postgresql"),
        (("ip", "nft", "pg_ctlcluster", "mariadbd", "systemd-analyze"), "strace"),
        (("ip", "nft", "strace", "pg_ctlcluster", "mariadbd", "systemd-analyze"), None),
    ],
)
def test_what_is_missing_is_installed_and_nothing_else(tmp_path, there, installed) -> None:
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    for name in NEEDED:
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in (*there, "apt-get", "make"):
        stub = tools / name
        stub.write_text(f'#!{tools / "bash"}\necho "{name} $*" >> {log}\necho "=== 1 passed ==="\n')
        stub.chmod(0o755)
    script = ROOT / ".ci" / "run"
    done = subprocess.run(
        [str(tools / "bash"), str(script)], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    wanted = [] if installed is None else ["apt-get update -qq", f"apt-get install -y -qq {installed}"]
    assert [line for line in lines if line.startswith("apt-get")] == wanted
    assert [line.split()[1] for line in lines if line.startswith("make")] == ["demo", "check"]


@pytest.mark.parametrize(("required", "end"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)])
def test_there_nothing_is_skipped_for_want_of_root_or_a_tool(monkeypatch, required, end) -> None:
    monkeypatch.setattr(required_module, "REQUIRED", required)
    with pytest.raises(end, match="needs a spoon"):
        required_module.lacking("needs a spoon")


MAY_SKIP = {
    "tests/benchmarks/test_bench_demo.py": 1,  # a busy machine
    "tests/conftest.py": 1,  # public data sets
    "tests/e2e/test_packaging.py": 2,  # a package index, and never under FEDPACT_REQUIRE
    "tests/support/required.py": 1,
    "tests/unit/test_preflight.py": 2,  # another processor's numbers
    "tests/unit/test_quality.py": 1,  # mlcroissant, 360 MB that no set-up brings
    "tests/unit/test_sandbox.py": 2,  # a newer kernel's version, another processor's numbers
    "tests/unit/test_cluster.py": 2,  # Ray, an extra of 220 MB that no set-up brings
}


def test_every_other_skip_goes_by_the_same_way() -> None:
    call = re.compile(r"pytest\.skip\(|mark\.skip\b|mark\.skipif\(|importorskip\(")
    found = {
        str(path.relative_to(ROOT)): len(call.findall(path.read_text("utf-8")))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__)
    }
    assert {place: number for place, number in found.items() if number} == MAY_SKIP
