"""Measured on held-out episodes during training: losses at uniform noise levels, and sampled actions in real units."""

import numpy as np
import torch

from selfflow_robot.data import Dataset, windows
from selfflow_robot.flow import TimestepDistribution
from selfflow_robot.model import Model
from selfflow_robot.selfflow import SelfFlowConfig, loss
from selfflow_robot.tokens import Layout, Packer, generate

UNIFORM = SelfFlowConfig(method="flow_matching", levels=TimestepDistribution("uniform"))
SAMPLE_STEPS = 8


def held_out(dataset: Dataset, layout: Layout, count: int = 64) -> dict | None:
    """One batch of evenly spread windows of the validation episodes; None where the data set has none."""
    if not dataset.split("validation"):
        return None
    source = windows(dataset, layout.past, layout.future, layout.horizon, "validation")
    return source.gather(np.unique(np.linspace(0, len(source) - 1, count).astype(int)))


@torch.no_grad()
def video_loss(model: Model, packer: Packer, batch: dict, mode: str) -> dict[str, float]:
    """Flow loss of the predicted frames, the same noise every time."""
    _, terms = loss(model, None, packer.pack(batch, mode), UNIFORM, torch.Generator().manual_seed(0))
    return {"validation/loss_video": terms["loss_video"].item()}


@torch.no_grad()
def action_errors(model: Model, packer: Packer, batch: dict) -> dict[str, float]:
    """Flow loss of the actions, and mean absolute errors of sampled chunks against the expert, in canonical units."""
    tokens = packer.pack(batch, "policy")
    _, terms = loss(model, None, tokens, UNIFORM, torch.Generator().manual_seed(0))
    z = generate(model, tokens, SAMPLE_STEPS, torch.Generator().manual_seed(0))
    device = tokens.x.device
    error = packer.actions(tokens, z) - batch["action"].to(device)  # (B, H, 7)
    real = batch["action_mask"].to(device)  # (B, H)
    return {
        "validation/loss_action": terms["loss_action"].item(),
        "validation/action_mm": 1000 * error[..., :3].norm(dim=-1)[real].mean().item(),
        "validation/action_degrees": torch.rad2deg(error[..., 3:6].norm(dim=-1)[real].mean()).item(),
        "validation/action_gripper": error[..., 6].abs()[real].mean().item(),
    }
