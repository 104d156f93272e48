"""The project as a whole: what it depends on and under which licences, what the wheel holds, what the documents say.

Commands in the documents, in messages and in docstrings are checked against the command lines themselves.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import Distribution, packages_distributions
from itertools import takewhile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import click
import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.support import wheels

from fedpact_contract import __version__, cli
from fedpact_contract.contract import load_toml

ROOT = wheels.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("contract/fedpact_contract", "models/fedpact_models", "client/fedpact_client", "server/fedpact_server")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml asks for with these extras; a mention of fedpact itself is replaced by what it means."""
    found = list(PROJECT["dependencies"])
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            own = Requirement(text)
            found += requirements(*sorted(own.extras)) if own.name == "fedpact" else [text]
    return list(dict.fromkeys(found))


def files_of_the_project() -> Iterator[Path]:
    """Every file but what tools make."""
    made = re.compile(r"\..*|__pycache__|dist|build|fedpact-demo-.*")
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name == ".ci" or not made.fullmatch(name))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith(".coverage"))


RAY = {"jsonschema", "jsonschema-specifications", "msgpack", "ray", "referencing", "rpds-py"}
"""What [ray] alone brings."""


class TestDependencies:
    @staticmethod
    def pins() -> dict[str, str]:
        lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        pins = [line.split("==") for line in lines if line and not line.startswith("#")]
        return {canonicalize_name(name): version for name, version in pins}

    def test_every_pin_is_exact_and_stands_once_in_order(self) -> None:
        lines = [x for x in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not x.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line) for line in lines), lines
        order = [canonicalize_name(line.split("==")[0]) for line in lines]
        assert order == sorted(set(order))

    def test_everything_that_is_installed_is_pinned_and_nothing_else(self) -> None:
        """All extras, transitively; the versions are those of this environment."""
        extras, pins = set(PROJECT["optional-dependencies"]), self.pins()
        if importlib.util.find_spec("ray") is None:  # `make setup-dev` leaves it out
            extras.remove("ray")
            pins = {name: pin for name, pin in pins.items() if name not in RAY}
        found = wheels.closure(requirements(*extras))
        assert {n: d.version.split("+")[0] for n, d in found.items()} == pins, "run `make setup-dev`"

    def test_the_ranges_admit_the_pins(self) -> None:
        pins = self.pins()
        for text in requirements(*PROJECT["optional-dependencies"]):
            wanted = Requirement(text)
            assert wanted.specifier, f"{text} has no range"
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text

    def test_flower_is_pinned_everywhere(self) -> None:
        shell = tomllib.loads((ROOT / "server/fedpact_server/shell/pyproject.toml").read_text("utf-8"))
        asked = {
            text
            for text in (*requirements("agent"), *requirements("server"), *shell["project"]["dependencies"])
            if Requirement(text).name == "flwr"
        }
        assert asked == {"flwr==1.41.0"}

    @pytest.mark.parametrize(
        ("folder", "extras"),
        [
            ("contract/fedpact_contract", ()),
            ("models/fedpact_models", ("server",)),
            ("client/fedpact_client", ("agent", "databases")),
            ("server/fedpact_server", ("server", "ray")),
            ("server/fedpact_server/demo", ("demo",)),
            ("tests", ("dev", "ray")),
            ("scripts", ("demo",)),
        ],
    )
    def test_what_is_imported_is_asked_for(self, folder: str, extras: tuple[str, ...]) -> None:
        """By the project itself: what another package happens to bring may be gone with its next release."""
        asked = {canonicalize_name(Requirement(text).name) for text in requirements(*extras)}
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder != "server/fedpact_server" or "demo" not in path.parts:
                assert not _imported(path) - asked, path

    def test_the_agent_needs_nothing_of_the_operator(self) -> None:
        """All of the models package that an agent imports works with the extra `agent`: release.py alone does not."""
        asked = {canonicalize_name(Requirement(text).name) for text in requirements("agent")}
        for path in (ROOT / "models").rglob("*.py"):
            if path.name != "release.py":
                assert not _imported(path) - asked, path
        for path in (ROOT / "client").rglob("*.py"):
            assert "fedpact_models.release" not in path.read_text("utf-8"), path

    def test_the_version_stands_once_more_in_the_code(self) -> None:
        assert PROJECT["version"] == __version__


def _imported(path: Path) -> set[str]:
    """The distributions whose packages a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return {canonicalize_name(name) for one in found for name in _distributions().get(one, ())} - {"fedpact"}


@cache
def _distributions() -> Any:
    return packages_distributions()


SPDX = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0"),
    *("PSF-2.0", "Zlib", "LLVM-exception"),
}
CLASSIFIERS = {
    *("Apache Software License", "BSD License", "ISC License (ISCL)", "MIT License", "Public Domain"),
    "Python Software Foundation License",
}
TEXTS = {"3-Clause BSD License", "Apache 2.0", "Apache-2.0", "BSD-3-Clause", "MIT"}
PERMISSIVE = SPDX | CLASSIFIERS | TEXTS
WEAK = {
    "certifi": ("Mozilla Public License 2.0 (MPL 2.0)", "the list of certificate authorities; Flower asks for it"),
    "hypothesis": ("MPL-2.0", "tests only"),
    "pathspec": ("Mozilla Public License 2.0 (MPL 2.0)", "Flower and the tools ask for it"),
}
"""Name -> licence, and why we take it. MPL-2.0 asks for the source of files that one changes; we change none."""


class TestLicences:
    @staticmethod
    def terms(one: Distribution) -> set[str]:
        """The licence terms of a distribution, from the most exact of what its metadata says.

        Every name in an expression counts, those of an OR too, unless one side of it alone is allowed.
        """
        if expression := one.metadata.get("License-Expression"):
            choices = [set(re.split(r"\s+(?:AND|WITH)\s+", side)) for side in re.split(r"\s+OR\s+", expression)]
            if "(" in expression:
                return set(re.findall(r"[\w.+-]+", expression)) - {"AND", "OR", "WITH"}
            return next((side for side in choices if side <= SPDX), set().union(*choices))
        lines = [text for text in one.metadata.get_all("Classifier", []) if text.startswith("License :: ")]
        found = {text.rpartition(" :: ")[2] for text in lines} - {"OSI Approved"}
        return found or {one.metadata.get("License") or "none"}

    def test_all_are_permissive(self) -> None:
        """All that set-up installs. (The wheels of numpy and scipy hold libgfortran, under the GCC exception.)"""
        found = {name: self.terms(one) for name, one in wheels.closure(requirements("dev")).items()}
        assert len(found) > 50
        odd = {name: terms - PERMISSIVE for name, terms in found.items() if terms - PERMISSIVE}
        assert odd == {name: {licence} for name, (licence, _) in WEAK.items()}

    def test_the_lists_hold_no_strong_copyleft(self) -> None:
        words = " ".join([*PERMISSIVE, *(licence for licence, _ in WEAK.values())])
        assert not re.search(r"GPL|GNU|SSPL|BUSL|Commercial", words)

    @pytest.mark.parametrize(
        ("metadata", "allowed"),
        [
            ({"License-Expression": "MIT OR GPL-3.0-only"}, True),
            ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
            ({"License-Expression": "(MIT OR GPL-3.0-only) AND MIT"}, False),
            ({"License-Expression": "Apache-2.0 WITH LLVM-exception"}, True),
            ({"License": "MIT", "Classifier": "License :: OSI Approved :: GNU Lesser General Public License"}, False),
            ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
            ({"License": "GPL"}, False),
            ({}, False),
        ],
    )
    def test_how_terms_are_read(self, tmp_path: Path, metadata: dict[str, str], allowed: bool) -> None:
        text = "".join(f"{key}: {value}\n" for key, value in metadata.items())
        (tmp_path / "METADATA").write_text(f"Metadata-Version: 2.4\nName: x\nVersion: 1\n{text}")
        terms = self.terms(Distribution.at(tmp_path))
        assert (terms <= PERMISSIVE) == allowed

    def test_ours_is_apache(self) -> None:
        assert PROJECT["license"] == "Apache-2.0"
        text = (ROOT / "LICENSE").read_text("utf-8")
        assert "Apache License" in text
        assert "Version 2.0, January 2004" in text


class TestTheWheel:
    @pytest.fixture(scope="class")
    @classmethod
    def wheel(cls, tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
        return ZipFile(wheels.build(tmp_path_factory.mktemp("wheel")))

    def test_it_holds_the_four_packages_whole(self, wheel: ZipFile) -> None:
        wanted = {
            str(path.relative_to((ROOT / package).parent))
            for package in PACKAGES
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert held == wanted
        assert {
            *(f"{Path(package).name}/py.typed" for package in PACKAGES),
            *("fedpact_client/templates/agent.toml", "fedpact_server/templates/contract.toml"),
            *("fedpact_server/templates/report.html.j2", "fedpact_server/shell/pyproject.toml"),
            *("fedpact_server/shell/fedpact_shell/server.py", "fedpact_server/shell/fedpact_shell/client.py"),
        } <= held

    def test_it_brings_two_commands_and_the_operators_entry_point(self, wheel: ZipFile) -> None:
        folder = f"fedpact-{__version__}.dist-info"
        text = wheel.read(f"{folder}/entry_points.txt").decode()
        scripts = re.search(r"\[console_scripts\]\n([^\[]*)", text)
        assert scripts is not None
        assert {line.split(" = ")[0] for line in scripts[1].split("\n") if line} == {"fedpact", "fedpact-agent"}
        assert "[fedpact.commands]" in text
        assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


COPIES = {
    "agent.toml": "client/fedpact_client/templates/agent.toml",
    "contract.toml": "server/fedpact_server/templates/contract.toml",
}
"""Of configs/, and what is installed. (operator.toml is compared in test_server_cli.py.)"""


class TestConfigs:
    @pytest.mark.parametrize(("copy", "original"), COPIES.items())
    def test_a_copy_equals_what_is_installed(self, copy: str, original: str) -> None:
        assert (ROOT / "configs" / copy).read_bytes() == (ROOT / original).read_bytes()

    def test_every_template_has_its_copy(self) -> None:
        templates = [path for package in PACKAGES for path in (ROOT / package / "templates").glob("*.toml")]
        assert {str(path.relative_to(ROOT)) for path in templates} == set(COPIES.values())

    def test_every_description_of_data_is_one(self) -> None:
        from fedpact_server.demo.scenario import DESCRIPTION, Description

        for path in (ROOT / "configs").rglob(DESCRIPTION):
            values = load_toml(path.read_text("utf-8"), file=path)
            assert Description.parse(values, code="DATA_DESCRIPTION", file=path)


class TestMake:
    @staticmethod
    def plan(*arguments: str) -> str:
        """What make would do for a fresh environment."""
        line = ["make", "--no-print-directory", "-n", "-B", "VENV=nowhere", *arguments]
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "TORCH_INDEX", "PYTHON")}
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    def test_setup_asks_for_the_pinned_cpu_build(self) -> None:
        version = TestDependencies.pins()["torch"]
        lines = [line for line in self.plan("setup").splitlines() if f"torch=={version}" in line]
        assert lines
        if sys.platform == "linux":
            assert all(f"torch=={version}+cpu" in line for line in lines), lines
        assert "-c constraints.txt" in lines[0]
        assert '-c constraints.txt -e ".[demo]"' in self.plan("setup")
        assert '-c constraints.txt -e ".[dev]"' in self.plan("setup-dev")

    def test_torch_index_has_the_last_word(self) -> None:
        plan = self.plan("setup", "TORCH_INDEX=https://example.org/cu")
        assert '--extra-index-url "https://example.org/cu"' in plan
        assert "+cpu" not in plan

    def test_another_python_is_refused_by_name(self, tmp_path: Path) -> None:
        stamp = tmp_path / "venv" / ".ready-torch"
        line = ["make", f"VENV={stamp.parent}", "PYTHON=false", str(stamp)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Python 3.11 or 3.12 is needed" in done.stdout
        assert not stamp.parent.exists()

    def test_the_two_commands(self) -> None:
        assert "fedpact demo --rounds 2" in self.plan("demo", "DEMO_ARGS=--rounds 2")
        check = self.plan("check")
        for part in ("ruff check .", "ruff format --check .", "/mypy", "pytest tests"):
            assert part in check, part

    def test_ci_calls_the_two_commands_and_no_other(self) -> None:
        script = ROOT / ".ci" / "run"
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        lines = [line.strip() for line in script.read_text("utf-8").splitlines()]
        assert [line.split()[1] for line in lines if line.startswith("make ")] == ["demo", "check"]
        assert "export FEDPACT_REQUIRE=1" in lines


# Commands in documents and messages

PROGRAMS = ("fedpact", "fedpact-agent")
SHELL = {"sh", "bash", "shell", "console", ""}


@cache
def tree(program: str) -> click.Command:
    """The command line of a program, as click knows it."""
    if program == "fedpact-agent":
        from fedpact_client.cli import app

        return typer.main.get_command(app)
    whole = cli.make_app()
    cli.load_commands(whole)
    return typer.main.get_command(whole)


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    """The fenced blocks of a document in these languages."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield match[2]


def spans(text: str) -> Iterator[str]:
    """What stands between backticks on one line, outside the fenced blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", outside)


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a block of shell, as words; lines that are none, such as a drawing's, are passed over."""
    for line in block.replace("\\\n", " ").splitlines():
        if not re.match(r"\s*(\$ )?([A-Z_]+=\S+ )*([\w./-]*/)?(fedpact|fedpact-agent|make|python3?)\s", line + " "):
            continue
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                if words:
                    yield [Path(words[0]).name, *words[1:]]
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)


def check_command(words: list[str], *, whole: bool) -> None:
    """The command exists, and so do its options; a whole one also has all that it needs, of the right kind.

    Raises:
        click.UsageError: it would be refused.
    """
    command, rest = tree(words[0]), words[1:]
    context = click.Context(command, info_name=words[0])
    if not whole:  # a name may stand for several
        rest = list(takewhile(lambda word: not re.search(r"[{…]|\.\.\.", word), rest))
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, *rest = rest
        if "|" in name and not whole:
            for one in name.split("|"):
                check_command([*context.command_path.split(), one, *rest], whole=False)
            return
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"{context.command_path} has no command {name}")
        command, context = found, click.Context(found, info_name=name, parent=context)
    options = {text for param in command.get_params(context) for text in (*param.opts, *param.secondary_opts)}
    for word in rest:
        if word.startswith("-") and (option := word.partition("=")[0]) not in options:
            raise click.UsageError(f"{context.command_path} has no option {option}")
    if isinstance(command, click.Group):
        if whole and not rest:
            raise click.UsageError(f"{context.command_path} asks for a command")
    elif whole and "--help" not in rest:
        command.make_context(context.info_name, list(rest), parent=context.parent)


class TestTheCheckItself:
    @pytest.mark.parametrize(
        "line",
        [
            "fedpact nonsense",
            "fedpact contract nonsense x",
            "fedpact verify",
            "fedpact verify x --trus y",
            "fedpact verify x --trust",
            "fedpact run start",
            "fedpact run",
            "fedpact demo --rounds zero",
            "fedpact demo --rounds 0",
            "fedpact-agent init --home agent",
            "fedpact-agent enrol one two",
        ],
    )
    def test_a_wrong_command_is_noticed(self, line: str) -> None:
        with pytest.raises(click.UsageError):
            check_command(shlex.split(line), whole=True)

    def test_a_block_is_read_as_a_shell_reads_it(self) -> None:
        block = """
            $ fedpact verify a --trust b   # why
            FEDPACT_HOME=x .venv/bin/fedpact run start "3f 2a" && make demo | tee log
            fedpact model 3f2a \\
              --out m
            │ fedpact drawing │
            fedpact's words
        """
        assert list(commands(block)) == [
            ["fedpact", "verify", "a", "--trust", "b"],
            ["fedpact", "run", "start", "3f 2a"],
            ["make", "demo"],
            ["tee", "log"],
            ["fedpact", "model", "3f2a", "--out", "m"],
        ]

    def test_part_of_a_command_may_be_mentioned(self) -> None:
        for line in (
            "fedpact run",
            "fedpact participant invite|approve",
            "fedpact verify --trust",
            "fedpact --version",
        ):
            check_command(line.split(), whole=False)
        with pytest.raises(click.UsageError):
            check_command(["fedpact", "participant", "invite|shoot"], whole=False)


class TestDocuments:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
    def test_every_command_of_a_block_would_be_taken(self, path: Path) -> None:
        for block in blocks(path.read_text("utf-8"), SHELL):
            for words in commands(block):
                try:
                    self.check(words)
                except click.UsageError as err:
                    pytest.fail(f"{path.name}: `{shlex.join(words)}`: {err.format_message()}")

    @staticmethod
    def check(words: list[str]) -> None:
        if words[0] in PROGRAMS:
            check_command(words, whole=True)
        elif words[0] == "make":
            targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
            assert targets is not None
            assert {word for word in words[1:] if "=" not in word} <= set(targets[1].split()), words
        elif words[0].startswith("python") and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
    def test_every_command_that_the_text_mentions_exists(self, path: Path) -> None:
        _check_mentions(path)

    def test_the_readme_has_the_two_commands(self) -> None:
        found = [words for block in blocks((ROOT / "README.md").read_text("utf-8"), SHELL) for words in commands(block)]
        assert ["make", "demo"] in found
        assert ["make", "check"] in found
        assert sum(words[0] in PROGRAMS for words in found) > 10

    def test_every_extra_that_is_mentioned_exists(self) -> None:
        for path in DOCUMENTS:
            for extras in re.findall(r"fedpact\[([\w,]+)\]", path.read_text("utf-8")):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), f"{path.name}: {extras}"

    def test_links_lead_somewhere(self) -> None:
        for path in DOCUMENTS:
            for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8")):
                assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"

    def test_toml_in_the_documents_is_toml(self) -> None:
        from fedpact_server.demo.scenario import Description

        for path in DOCUMENTS:
            for block in blocks(path.read_text("utf-8"), {"toml"}):
                values = load_toml(block, file=path)
                if path.name == "own-data.md" and "participants" in values:
                    values["participants"] *= 2  # one stands for two
                    assert Description.parse(values, code="DATA_DESCRIPTION", file=path)

    def test_the_changelog_has_its_own_heading_for_what_moves_privacy_or_money(self) -> None:
        text = (ROOT / "CHANGELOG.md").read_text("utf-8")
        assert re.search(r"^#+ Privacy and settlement$", text, re.MULTILINE)
        assert re.search(rf"^## \[(Unreleased|{re.escape(__version__)})\]", text, re.MULTILINE)

    def test_decisions_are_numbered_and_have_a_status(self) -> None:
        found = sorted((ROOT / "docs" / "adr").iterdir())
        assert len(found) >= 6
        for number, path in enumerate(found, start=1):
            assert re.fullmatch(rf"{number:04d}-[a-z0-9-]+\.md", path.name), path
            text = path.read_text("utf-8")
            assert text.startswith(f"# {number:04d}: "), path
            assert re.search(r"^Status: (proposed|accepted|rejected|deprecated|superseded by \d{4})$", text, re.M), path


def _check_mentions(path: Path) -> None:
    """Check every command that stands between backticks in a file."""
    for span in spans(path.read_text("utf-8")):
        if re.match(r"fedpact(-agent)? [a-z-]", span):
            try:
                check_command(span.split(), whole=False)
            except click.UsageError as err:
                pytest.fail(f"{path.relative_to(ROOT)}: `{span}`: {err.format_message()}")


class TestTheTree:
    def test_every_command_in_a_message_or_docstring_exists(self) -> None:
        folders = [ROOT / folder for folder in (*PACKAGES, "configs", "scripts")]
        paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".j2")]
        assert len(paths) > 50
        for path in paths:
            _check_mentions(path)

    def test_a_base_install_knows_the_operators_commands(self) -> None:
        """It names the missing extra for each of them."""
        base = typer.main.get_command(cli.make_app())
        for place, known in cli.SERVER_COMMANDS.items():
            whole, alone = ((one if not place else one.commands[place]) for one in (tree("fedpact"), base))
            assert set(known) == set(whole.commands) - set(alone.commands), place

    def test_nothing_points_to_where_it_was_written(self) -> None:
        """Paths of the machine that this was written on; the default folder of the tests' data is the one exception."""
        places = re.compile(r"(?<![\w.])/(work|root)/|/opt/|\bshared/(?!data\b)|\bwork" + "shop")
        bad = [
            f"{path.relative_to(ROOT)}: {match[0]}"
            for path in files_of_the_project()
            if path != Path(__file__)
            for match in places.finditer(path.read_bytes().decode("utf-8", errors="replace"))
        ]
        assert bad == []


class TestDemoData:
    """scripts/demo_data.py"""

    @staticmethod
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(ROOT / "scripts" / "demo_data.py"), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)

    def test_it_writes_a_file_of_each_kind_and_the_validation_rows(self, tmp_path: Path) -> None:
        done = self.run(tmp_path / "data", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert [line["kind"] for line in result["participants"]] == ["csv", "parquet", "sqlite", "ndjson"]
        assert [line["rows"] for line in result["participants"]] == [450, 200, 350, 350]
        csv, _, sqlite, ndjson = (Path(line["file"]) for line in result["participants"])
        assert len(csv.read_text().splitlines()) == 451
        assert len(ndjson.read_text().splitlines()) == 350
        with sqlite3.connect(sqlite) as connection:
            assert connection.execute("SELECT count(*) FROM digits").fetchone() == (350,)
        connection.close()
        assert len(Path(result["validation"]).read_text().splitlines()) == 441

    def test_text_names_every_file(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "--participants", 3)
        assert done.returncode == 0, done.stderr
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(written) == 4
        assert all(str(path) in done.stdout for path in written)

    def test_nothing_is_overwritten_and_bad_numbers_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("x")
        for arguments, code in (
            ((tmp_path,), "DEMO_FOLDER"),
            ((tmp_path / "mine",), "DEMO_FOLDER"),
            ((tmp_path / "new", "--participants", 2), "DEMO_PARTICIPANTS"),
            ((), "USAGE"),
        ):
            done = self.run(*arguments)
            assert done.returncode == 2, arguments
            assert done.stderr.startswith(f"{code}: "), done.stderr
            assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]
