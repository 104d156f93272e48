"""What the parties sign and verify: records, signatures, Merkle proofs, privacy and settlement arithmetic.

No torch, no flwr, no network: an auditor installs this package alone.
"""

__version__ = "0.1.0"
