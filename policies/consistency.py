"""Does a plan agree with itself? Actions and future frames imagined together; then the actions that inverse dynamics
reads from those frames. Where the network knows what it is doing the two agree, without anything real to compare with,
so that a large distance can serve as an alarm while acting.
"""

from collections.abc import Sequence

import numpy as np
import torch

from policies.flow_policy import FlowPolicy, observed
from selfflow_robot.flow import generator
from selfflow_robot.interfaces import Observation
from selfflow_robot.metrics import action_errors
from selfflow_robot.tokens import MODES


def consistency(
    policy: FlowPolicy, histories: Sequence[Sequence[Observation]], keys: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Of B situations: float64 (B, 2), distance in mm and degrees per control step, mean over the chunk; low is good.

    histories: B times observations at the layout's past offsets; keys name their noise, as in `Request`. Rows do not
    influence one another.
    """
    return self_consistency(policy, observed(histories, policy.layout.view), [generator(*key) for key in keys])


def self_consistency(
    policy: FlowPolicy, batch: dict, generators: torch.Generator | Sequence[torch.Generator]
) -> np.ndarray:
    """The same for a batch as `data.Windows.gather` gives it, of which the past alone is used: float64 (B, 2)."""
    past = batch["video"][:, : len(policy.layout.past)]
    seen = {"video": past, "proprio": batch["proprio"], "instruction": batch["instruction"]}
    tokens, z = policy.generate(seen, MODES["joint_plan"], generators)  # roles: in full, whatever the policy's dial
    planned, imagined = policy.packer.actions(tokens, z).cpu().numpy(), policy.packer.video(tokens, z).cpu()
    explained = policy.explain(seen | {"video": torch.cat([past.cpu(), imagined], 1)}, generators)
    errors = action_errors(explained, planned)
    return np.stack([errors["mm"].mean(-1), errors["degrees"].mean(-1)], 1)
