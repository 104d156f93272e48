"""Arrays beyond memory: in files without a name, which somebody opened beforehand; small ones stay in memory."""

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedpact_contract.errors import FailedError, InputError

IN_MEMORY = 1 << 26
"""Bytes up to which an array stays in memory, where nothing else is asked for."""


class Scratch:
    """A pool of open, empty files. An array that lies in one gives it back when nobody holds it any more.

    Args:
        files: Descriptors, to read and write. Without any, every array lies in memory.
        in_memory: Bytes up to which an array lies in memory.
    """

    def __init__(self, files: Sequence[int] = (), in_memory: int = IN_MEMORY) -> None:
        self._free, self.has_files = list(files), bool(files)
        self.in_memory, self._closed = in_memory, False

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of zeros.

        Raises:
            FailedError: DATA_SCRATCH, the disk is full.
        """
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if size <= self.in_memory or not self.has_files:
            return np.zeros(shape, dtype)
        return self._map(self.take(), size).view(dtype).reshape(shape)

    def take(self) -> int:
        """A file of the pool.

        Raises:
            InputError: DATA_SCRATCH, all are in use.
        """
        if not self._free:
            raise InputError("DATA_SCRATCH", "Too many large data sets are trained on at once.")
        return self._free.pop()

    def mapped(self, file: int, dtype: DTypeLike) -> NDArray[Any]:
        """What was written into a file of the pool, as an array."""
        return self._map(file, os.fstat(file).st_size).view(dtype)

    def _map(self, file: int, size: int) -> NDArray[np.uint8]:
        try:
            os.posix_fallocate(file, 0, size)  # a full disk is an error now, and not a signal later
            mapping = mmap.mmap(file, size)
        except OSError as err:
            self.give_back(file)
            raise disk_full(err) from err
        weakref.finalize(mapping, self.give_back, file)
        return np.frombuffer(mapping, np.uint8)

    def give_back(self, file: int) -> None:
        """Empty a file and put it back into the pool."""
        if self._closed:
            os.close(file)
            return
        os.ftruncate(file, 0)
        self._free.append(file)

    def close(self) -> None:
        """Close the files; one in which an array still lies, once nobody holds that any more."""
        self._closed = True
        while self._free:
            os.close(self._free.pop())


class Growing:
    """An array of one dimension whose length nobody knows yet: appended to, then taken whole."""

    def __init__(self, scratch: Scratch, dtype: DTypeLike) -> None:
        self._scratch, self._dtype = scratch, np.dtype(dtype)
        self._parts: list[NDArray[Any]] = []
        self._bytes, self._file = 0, -1
        self._left: weakref.finalize[..., Any] | None = None

    def append(self, part: NDArray[Any]) -> None:
        """Add values at the end.

        Raises:
            InputError, FailedError: DATA_SCRATCH.
        """
        self._parts.append(part)
        self._bytes += part.nbytes
        if self._file < 0 and (self._bytes <= self._scratch.in_memory or not self._scratch.has_files):
            return
        if self._file < 0:
            self._file = self._scratch.take()
            self._left = weakref.finalize(self, self._scratch.give_back, self._file)
            os.lseek(self._file, 0, os.SEEK_SET)
        for values in self._parts:
            left = memoryview(np.ascontiguousarray(values).tobytes())
            while left:
                try:
                    left = left[os.write(self._file, left) :]
                except OSError as err:
                    raise disk_full(err) from err
        self._parts.clear()

    def whole(self) -> NDArray[Any]:
        """All values."""
        if self._left is not None:
            self._left.detach()
            return self._scratch.mapped(self._file, self._dtype)
        return np.concatenate([np.zeros(0, self._dtype), *self._parts])


def disk_full(err: OSError) -> FailedError:
    """The room beside memory ended."""
    return FailedError(
        "DATA_SCRATCH",
        f"The disk takes no more of the rows' working copies: {err.strerror}.",
        remedy="Make room on the disk of the agent's home: about as much as the encoded rows and 250 bytes a row.",
    )
