"""`.ci/run` brings the commands that the tests in network namespaces need, where they are missing."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("bash", "dirname", "env", "grep", "mktemp", "rm", "tail", "tee")


@pytest.mark.parametrize(
    ("there", "installed"),
    [((), "iproute2 nftables"), (("ip",), "nftables"), (("nft",), "iproute2"), (("ip", "nft"), None)],
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
