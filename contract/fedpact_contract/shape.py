"""How many numbers a contract's rows and model have: from the contract alone, for every room."""

from itertools import pairwise

from fedpact_contract.contract import Contract, Data, NumberColumn


def feature_count(data: Data) -> int:
    """Number of features d: one a number, one a vocabulary value, and the constant."""
    return 1 + sum(1 if isinstance(column, NumberColumn) else len(column.values) for column in data.columns)


def parameter_count(contract: Contract) -> int:
    """Number of parameters P of the contract's model: dense layers, of which the first has no bias of its own.

    For whoever recomputes without the models room, which builds the model and counts what it built.
    """
    widths = (feature_count(contract.data), *contract.model.hidden, contract.data.label.outputs)
    return sum((inputs + (layer > 0)) * outputs for layer, (inputs, outputs) in enumerate(pairwise(widths)))
