"""Every clause of a contract, chapter by chapter: the one source of what a lawyer reads and of what enforces it."""

from fedpact_contract.clauses.clause import Chapter, Clause
from fedpact_contract.clauses.contribution import CONTRIBUTION, PARTICIPATION
from fedpact_contract.clauses.data import DATA, TRAINING
from fedpact_contract.clauses.defences import DEFENCES
from fedpact_contract.clauses.money import CODE, EVIDENCE, LIMITS, MONEY
from fedpact_contract.clauses.parties import PARTIES, PURPOSE
from fedpact_contract.clauses.privacy import PRIVACY

CHAPTERS: tuple[Chapter, ...] = (
    PARTIES,
    PURPOSE,
    DATA,
    TRAINING,
    PRIVACY,
    PARTICIPATION,
    CONTRIBUTION,
    DEFENCES,
    MONEY,
    CODE,
    EVIDENCE,
    LIMITS,
)
"""In the document's order; a chapter without a clause in a contract is left out of it."""


def registry() -> dict[str, Clause]:
    """Every clause by its id."""
    return {clause.id: clause for chapter in CHAPTERS for clause in chapter.clauses}
