"""Where sampling and noise come from. Without torch, so that the operator's own noise needs none."""

import math
import os
import sys
from collections.abc import Callable
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedpact_models.features import Floats

NOISE_CHUNK = 2**16
"""Numbers drawn at a time: bounds memory, and stays in a cache."""


class Noise(Protocol):
    """A source of randomness for sampling and noise. `label` goes into the signed update: csprng or test."""

    @property
    def label(self) -> str:
        """What the update says of its noise."""
        ...

    def uniform(self, n: int) -> Floats:
        """Draw n independent numbers, uniform in (0, 1), float64."""
        ...

    def normal(self, n: int) -> Floats:
        """Draw n independent standard normal numbers, float64."""
        ...


class SystemNoise:
    """The only source in production: AES-256 in counter mode under a key from the operating system.

    It cannot be seeded. A forked child takes a new key before its first number, so parent and child share none. A
    normal number is half the sum of four Box-Muller draws, which hides the floating-point grid of a single one
    (Holohan and Braghin 2021, "Secure random sampling in differential privacy", arXiv:2107.10138).
    """

    def __init__(self) -> None:
        self._process = -1
        self._stream: CipherContext

    @property
    def label(self) -> str:
        """The label csprng."""
        return "csprng"

    def uniform(self, n: int) -> Floats:
        """Draw n numbers, uniform on the odd multiples of 2^-53 in (0, 1)."""
        out = np.empty(n)
        for start in range(0, n, NOISE_CHUNK):
            part = out[start : start + NOISE_CHUNK]
            part[:] = self._uniform(len(part))
        return out

    def normal(self, n: int) -> Floats:
        """Draw n standard normal numbers."""
        out = np.empty(n)
        for start in range(0, n, NOISE_CHUNK):
            part = out[start : start + NOISE_CHUNK]
            part[:] = self._normal(len(part))
        return out

    def _uniform(self, n: int) -> Floats:
        if self._process != os.getpid():
            self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
            self._process = os.getpid()
        words = np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8")
        return (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53

    def _normal(self, n: int) -> Floats:
        half = (n + 1) // 2
        out = np.zeros(2 * half)
        cos, sin = _trigonometry()
        for _ in range(4):
            u = self._uniform(2 * half)
            radius, angle = np.sqrt(-2.0 * np.log(u[:half])), (2.0 * math.pi) * u[half:]
            out[:half] += radius * cos(angle)
            out[half:] += radius * sin(angle)
        return out[:n] * 0.5


def _trigonometry() -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """Cosine and sine of many angles: torch's where a trainer has loaded it (1 ns each), else numpy's (6 to 8 ns)."""
    torch = sys.modules.get("torch")
    if torch is None:
        return np.cos, np.sin

    def of(name: str) -> Callable[[Floats], Floats]:
        function = getattr(torch, name)
        return lambda angle: np.asarray(function(torch.from_numpy(angle)).numpy())

    return of("cos"), of("sin")
