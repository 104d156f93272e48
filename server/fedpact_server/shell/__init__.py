"""The bundle that Flower carries to every node: a shell, the same bytes on every machine.

Flower Application Bundle: a zip file with `pyproject.toml`, the application's files and `.info/CONTENT`, which lists
each file with its SHA-256 and its size in bits. Flower's own builder compresses, so that its bytes depend on the
zlib at hand; here nothing is compressed, and dates, modes and order are fixed.
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable

_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


@functools.cache
def shell_bundle() -> bytes:
    """The installed shell as a bundle."""
    folder = resources.files(__name__)
    return bundle({name: _text(folder.joinpath(name)) for name in FILES})


@functools.cache
def shell_digest() -> str:
    """SHA-256 of the installed shell's bundle, in hexadecimal: what Flower calls the FAB hash."""
    return hashlib.sha256(shell_bundle()).hexdigest()


FILES = (
    "pyproject.toml",
    "fedpact_shell/__init__.py",
    "fedpact_shell/client.py",
    "fedpact_shell/server.py",
)


def bundle(files: Mapping[str, bytes]) -> bytes:
    """A Flower Application Bundle with these files (POSIX path -> content), the same bytes wherever it is made."""
    manifest = [f"{name},{hashlib.sha256(data).hexdigest()},{len(data) * 8}" for name, data in files.items()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [*files.items(), (".info/CONTENT", "\n".join(manifest).encode())]:
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = _UNIX
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return out.getvalue()


def _text(file: Traversable) -> bytes:
    """A text file's bytes with Unix line ends: a checkout may have changed them."""
    return file.read_bytes().replace(b"\r\n", b"\n")
