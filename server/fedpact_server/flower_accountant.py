"""Flower's own accountant beside ours: client-level contracts, before each round.

The contract's epsilon is worked out by `fedpact_contract.privacy` and recomputed by everybody. This is the second code
base: it must agree, or no round is opened.
"""

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)

from fedpact_contract.contract import ClientPrivacy, Contract


def accountant(contract: Contract, privacy: ClientPrivacy, released: int) -> tuple[RdpAccountant, GaussianPrivacyEvent]:
    """Flower's accountant after so many released models, and the event that one more is."""
    clients = len(contract.participants)
    config = PrivacyConfig(
        target_delta=float(privacy.delta),
        population_size=clients,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
        max_epsilon=float(privacy.epsilon),
    )
    event = GaussianPrivacyEvent(
        noise_multiplier=float(privacy.noise_multiplier), sample_size=clients, population_size=clients
    )
    ours = RdpAccountant(config)
    if released:
        ours.compose(event, released)
    return ours, event


def would_exceed(contract: Contract, privacy: ClientPrivacy, released: int) -> bool:
    """Whether one more released model, or before the first one the whole plan, costs more than (epsilon, delta)."""
    found, event = accountant(contract, privacy, released)
    return bool(found.would_exceed(event, count=1 if released else contract.planned_steps))
