"""What every test shares: markers that skip with a reason, and the switch under which such a skip is a failure."""

import os

os.environ["FEDPACT_LANG"] = "en"  # whatever the locale of whoever runs the tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is loaded: two test processes share two processors
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tests.support

from tests.support.required import lacking  # noqa: E402 - by the path above

hypothesis.settings.register_profile("fedpact", deadline=None)  # a busy machine is no finding
hypothesis.settings.load_profile("fedpact")

DATA = Path(os.environ.get("FEDPACT_DATA", ROOT.parent / "shared" / "data"))


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("root") is not None:
        if os.geteuid() != 0:
            return "needs root (network namespaces)"
        if shutil.which("ip") is None:
            return "needs the command `ip` (iproute2)"
    if item.get_closest_marker("landlock") is not None:
        from fedpact_client.sandbox import landlock_abi

        if landlock_abi() < 1:
            return "needs a kernel with Landlock"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason:
        lacking(reason)
    marker = item.get_closest_marker("data")
    if marker is not None and not (place := DATA.joinpath(*marker.args)).is_dir():
        pytest.skip(f"needs the public data sets in {place} (FEDPACT_DATA; sources in docs/data.md)")


FEDERATIONS = {
    *("test_by_hand.py", "test_demo.py", "test_demo_tasks.py", "test_egress.py"),
    *("test_guard_process.py", "test_leaving_process.py", "test_packaging.py"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the workers one at most runs whole federations; otherwise a file stays on one worker, with its fixtures."""
    from xdist.scheduler import LoadFileScheduling

    class OneFederationAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "federations" if Path(file).name in FEDERATIONS else file

    return OneFederationAtATime(config, log)


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """A command that a test ran in this process sets up logging for its process: not for the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA
