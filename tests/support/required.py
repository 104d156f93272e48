"""What a test needs of the machine and does not find: a skip with its reason, or a failure where all must be there."""

import os
from typing import NoReturn

import pytest

REQUIRED = os.environ.get("FEDPACT_REQUIRE") == "1"
"""Set by .ci/run: there, a skip for want of root, a tool, a server or a kernel facility is a failure."""


def lacking(reason: str) -> NoReturn:
    """End this test: the machine lacks something."""
    if REQUIRED:
        pytest.fail(f"{reason}, and FEDPACT_REQUIRE=1 forbids the skip")
    pytest.skip(reason)
