"""From a run folder to a policy."""

from pathlib import Path


def load_policy(path: str | Path, execute: int = 4, seed: int = 0, **settings):
    """The policy of a fine-tuned run (name, run folder or checkpoint folder), a `chunking.ChunkedPolicy`.

    execute: actions carried out before predicting again, at most the model's horizon. settings: of `FlowPolicy`: steps
    of the flow sampler (4), temperature of the noise it begins with (0: none), imagination from 0, actions alone, to 1,
    the future frames along with them, compiled. Raises ValueError naming the file or the setting.
    """
    from policies.chunking import ChunkedPolicy
    from policies.flow_policy import FlowPolicy

    return ChunkedPolicy(FlowPolicy.load(path, **settings), execute=execute, seed=seed)
