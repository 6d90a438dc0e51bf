"""From a run folder to a policy."""

from pathlib import Path


def load_policy(path: str | Path, execute: int = 4, steps: int = 8, seed: int = 0, mode: str = "policy"):
    """The policy of a fine-tuned run (name, run folder or checkpoint folder), a `chunking.ChunkedPolicy`.

    execute: actions carried out before predicting again, at most the model's horizon; steps: of the flow sampler; mode:
    "policy", or "joint_plan", which imagines the future frames along with the actions. Raises ValueError naming the
    file or the setting.
    """
    from policies.chunking import ChunkedPolicy
    from policies.flow_policy import FlowPolicy

    return ChunkedPolicy(FlowPolicy.load(path, steps=steps, mode=mode), execute=execute, seed=seed)
