"""The identity of the training code, which the contract names."""

import hashlib
from pathlib import Path


def models_digest() -> str:
    """SHA-256 (hexadecimal) over this package's .py files, sorted by path: relative path, length and bytes of each.

    Nothing is imported: the digest says what would run, and is worked out before it runs.
    """
    return tree_digest(Path(__file__).parent)


def tree_digest(root: Path) -> str:
    """The digest of the .py files under a folder (`models_digest`)."""
    digest = hashlib.sha256(b"fedpact.code.v1:")
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(b"%d:%b:%d:" % (len(name.encode()), name.encode(), len(content)))
        digest.update(content)
    return digest.hexdigest()
