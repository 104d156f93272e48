"""The commands that the README shows, in their order: a test takes them one after the other, and none may be left."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def commands(text: str, heading: str) -> list[list[str]]:
    """The words of every command in the ```sh blocks of a section (## heading)."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading}"
    blocks = re.findall(r"^```sh\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass
class Script:
    """Commands still to be taken, in order."""

    left: list[list[str]]

    @classmethod
    def of_readme(cls, heading: str) -> "Script":
        return cls(commands(README.read_text("utf-8"), heading))

    def take(self, beginning: str) -> list[str]:
        """The next command, which must be this one."""
        assert self.left, f"the README does not show `{beginning}`"
        words = self.left.pop(0)
        wanted = beginning.split()
        assert words[: len(wanted)] == wanted, f"the README goes on with `{shlex.join(words)}`, not `{beginning}`"
        return words

    def done(self) -> None:
        """Nothing is left."""
        assert not self.left, f"the README shows what no test runs: {[shlex.join(words) for words in self.left]}"


def filled(words: list[str], values: Mapping[str, str]) -> list[str]:
    """The command with the reader's own values in place of the README's."""
    return [values.get(word, word) for word in words]
