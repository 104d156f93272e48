"""How many numbers a contract's model has: from the contract alone, for whoever recomputes without the models room."""

from itertools import pairwise

from fedpact_contract.contract import Contract, NumberColumn


def parameter_count(contract: Contract) -> int:
    """Number of parameters P of the contract's model: dense layers, of which the first has no bias of its own.

    The models room builds the model and counts the same (`fedpact_models.registry.parameter_count`).
    """
    data = contract.data
    features = 1 + sum(1 if isinstance(column, NumberColumn) else len(column.values) for column in data.columns)
    widths = (features, *contract.model.hidden, data.label.outputs)
    return sum((inputs + (layer > 0)) * outputs for layer, (inputs, outputs) in enumerate(pairwise(widths)))
