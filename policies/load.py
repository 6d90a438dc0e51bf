"""From a run folder to a policy."""

from pathlib import Path


def load_policy(
    path: str | Path,
    execute: int = 4,
    steps: int = 8,
    seed: int = 0,
    imagination: float = 0.0,
    cached: bool = True,
):
    """The policy of a fine-tuned run (name, run folder or checkpoint folder), a `chunking.ChunkedPolicy`.

    execute: actions carried out before predicting again, at most the model's horizon; steps: of the flow sampler;
    imagination: from 0, actions alone, to 1, the future frames along with them. Raises ValueError naming the file or
    the setting.
    """
    from policies.chunking import ChunkedPolicy
    from policies.flow_policy import FlowPolicy

    planner = FlowPolicy.load(path, steps=steps, imagination=imagination, cached=cached)
    return ChunkedPolicy(planner, execute=execute, seed=seed)
