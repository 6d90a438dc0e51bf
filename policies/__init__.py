"""Trained models as policies: `load_policy(run)`, `reset(instruction)`, `act(observation) -> action`."""

from policies.load import load_policy

__all__ = ["load_policy"]
