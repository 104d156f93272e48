"""What is installed here, as contracts name it."""

from importlib.metadata import version

from fedpact_contract.contract import Software
from fedpact_models.code import models_digest
from fedpact_server.shell import shell_digest


def installed_code() -> Software:
    """The code that is installed here: release, and the digests of training code and Flower bundle."""
    return Software(release=version("fedpact"), models_digest=models_digest(), shell_digest=shell_digest())
