"""What a test needs of the machine and does not find (a skip with its reason, or a failure), and how much it does."""

import os
from typing import NoReturn

import pytest

REQUIRED = os.environ.get("FEDPACT_REQUIRE") == "1"
"""Set by .ci/run: there, a skip for want of root, a tool, a server or a kernel facility is a failure."""

WHOLE = os.environ.get("FEDPACT_WHOLE") == "1"
"""Set by `make laws`."""


def whole(count: int, part: int) -> int:
    """How many cases of a long law: all of them in `make laws`, a part of them in `make check`."""
    return count if WHOLE else part


def lacking(reason: str) -> NoReturn:
    """End this test: the machine lacks something."""
    if REQUIRED:
        pytest.fail(f"{reason}, and FEDPACT_REQUIRE=1 forbids the skip")
    pytest.skip(reason)
