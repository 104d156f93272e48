"""The wheel, and environments made for one test; the checkout and the environment of the tests stay as they are."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> Path:
    """The wheel, built from a source distribution as an index would get it, without fetching anything."""
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_venv(folder: Path) -> Path:
    """An empty virtual environment, without pip; its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the pip of this environment upon another one."""
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


def installed(python: Path) -> dict[str, str]:
    """Normalised name -> version of everything in an environment."""
    done = pip(python, "list", "--format", "json")
    assert done.returncode == 0, done.stderr
    return {canonicalize_name(found["name"]): found["version"] for found in json.loads(done.stdout)}


def closure(requirements: Sequence[str]) -> dict[str, Distribution]:
    """Everything that these requirements bring, transitively, as it is installed here; by normalised name.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    found: dict[str, Distribution] = {}
    todo, done = [Requirement(text) for text in requirements], set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) not in done:
                done.add((name, extra))
                found[name] = distribution(name)
                todo += [r for r in _needs(found[name]) if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def link(distributions: Sequence[Distribution], python: Path) -> None:
    """Give an environment of the same Python the files of these distributions: hard links, or copies.

    Scripts are written anew, for they name their Python. Symbolic links would not do: the trainer may read what lies
    in its own environment, and they would point out of it.
    """
    source, target = Path(sysconfig.get_path("purelib")), _purelib(python)
    for one in distributions:
        for file in one.files or ():
            path = Path(os.path.normpath(str(file.locate())))
            if path.is_relative_to(source) and path.exists():
                _link(path, target / path.relative_to(source))
            elif path.parent == Path(sys.prefix) / "bin":
                _write_script(path, python.parent / path.name)


def _needs(one: Distribution) -> Iterator[Requirement]:
    return map(Requirement, one.requires or ())


def _purelib(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    line = [str(python), "-I", "-c", code]
    return Path(subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _write_script(source: Path, target: Path) -> None:
    data = source.read_bytes()
    if data.startswith(b"#!"):
        data = data.replace(os.fsencode(sys.prefix), os.fsencode(target.parent.parent))
    target.write_bytes(data)
    target.chmod(0o755)
