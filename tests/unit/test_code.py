"""The training code's identity."""

import hashlib
from pathlib import Path

import fedpact_models
from fedpact_models.code import models_digest, tree_digest


def test_the_digest_is_over_every_python_file_of_the_package_and_can_be_worked_out_by_hand() -> None:
    root = Path(fedpact_models.__file__).parent
    parts = b"fedpact.code.v1:"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    assert {"dp.py", "training.py", "code.py", "__init__.py"} <= set(names)
    for name in names:
        content = (root / name).read_bytes()
        parts += f"{len(name)}:{name}:{len(content)}:".encode() + content
    assert models_digest() == hashlib.sha256(parts).hexdigest()


def test_the_digest_moves_with_bytes_names_and_places_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "b.py").write_bytes(b"y = 2\n")
    seen = [tree_digest(tmp_path)]
    (tmp_path / "py.typed").touch()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"0")
    assert tree_digest(tmp_path) == seen[0]
    (tmp_path / "a.py").write_bytes(b"x = 1 \n")
    seen.append(tree_digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    seen.append(tree_digest(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "c.py").rename(tmp_path / "sub" / "c.py")
    seen.append(tree_digest(tmp_path))
    (tmp_path / "sub" / "__init__.py").touch()
    seen.append(tree_digest(tmp_path))
    assert len(set(seen)) == 5
