"""Importing part of a large package."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bare_package(name: str) -> Iterator[None]:
    """While this lasts, modules of a package are imported without the package's own `__init__`.

    For a package whose `__init__` imports far more than the module that is wanted. Afterwards the package counts as
    not imported: whoever imports it gets all of it, with the modules that are there already.

    Raises:
        ModuleNotFoundError: no such package.
    """
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[name]
