"""Which language people are addressed in. The data is the same in both; codes, keys and JSON stay as they are."""

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

Lang = Literal["en", "zh"]

VARIABLE = "FEDPACT_LANG"
"""Remembers the choice: in a shell's profile, or in a service's unit."""
_LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")


def language(
    asked: Lang | None = None,
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Lang:
    """What a command line asks for by --lang; else FEDPACT_LANG, else the locale; English where none is Chinese.

    Args:
        asked: The option's value, where the command has read it.
        arguments: The command line, where it has not; the process's own without it.
        environment: Of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    said = [
        asked,
        *(word.removeprefix("--lang=") for word in words if word.startswith("--lang=")),
        *(value for option, value in pairwise(words) if option == "--lang"),
        environment.get(VARIABLE),
    ]
    for value in said:
        if value in ("en", "zh"):
            return "zh" if value == "zh" else "en"
    locale = next((value for name in _LOCALE if (value := environment.get(name))), "")
    return "zh" if locale.startswith("zh") else "en"
