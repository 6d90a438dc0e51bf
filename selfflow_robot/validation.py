"""Measured on held-out episodes during training: losses by noise level, and sampled actions in real units."""

import numpy as np
import torch
from torch import Tensor

from selfflow_robot.data import Dataset, windows
from selfflow_robot.flow import interpolate
from selfflow_robot.model import Model
from selfflow_robot.tokens import GENERATED, HIDDEN, Layout, Packer, Tokens, generate

SAMPLE_STEPS = 8
BINS = 5  # of noise levels, of equal width


def held_out(dataset: Dataset, layout: Layout, count: int = 64) -> dict | None:
    """One batch of evenly spread windows of the validation episodes; None where the data set has none."""
    if not dataset.split("validation"):
        return None
    source = windows(dataset, layout.past, layout.future, layout.horizon, "validation")
    return source.gather(np.unique(np.linspace(0, len(source) - 1, count).astype(int)))


def loss_by_level(model: Model, tokens: Tokens, kind: str, bins: int = BINS) -> dict[str, float]:
    """{"validation/loss_<kind>": mean, "validation/loss_<kind>/t0.0-0.2": ...}: flow loss at uniform levels, by level.

    Every window is seen once per bin, at one level for all its tokens; noise and the place within the bin are the same
    in all bins and at every call, so that curves differ by what was learned alone. What is given is clean.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tokens.x.shape, generator=generator).to(tokens.x.device)
    within = torch.rand(len(noise), 1, generator=generator).to(noise.device)  # (B, 1)
    generated, hidden = tokens.where(GENERATED), tokens.where(HIDDEN)
    clean = torch.zeros_like(tokens.x[..., 0])  # (B, N)
    cache = model.prefix_cache(tokens.x, clean, tokens)

    def loss(t: Tensor) -> Tensor:  # (B, 1) -> scalar
        level = torch.where(generated, t, torch.where(hidden, 1.0, clean))
        z, velocity = interpolate(tokens.x, noise, level)
        predicted, _ = model(z, level, tokens, cache=cache)
        span, channels = tokens.rows(kind, GENERATED), model.channels[kind]
        error = (predicted - velocity)[:, span, :channels].square().mean(-1)  # (B, n)
        counted = tokens.weight[:, span]
        return (error * counted).sum() / counted.sum().clamp_min(1)

    losses = [loss((number + within) / bins).item() for number in range(bins)]
    name = f"validation/loss_{kind}"
    by_bin = {f"{name}/t{i / bins:.1f}-{(i + 1) / bins:.1f}": value for i, value in enumerate(losses)}
    return {name: sum(losses) / bins} | by_bin


@torch.no_grad()
def video_loss(model: Model, packer: Packer, batch: dict, mode: str) -> dict[str, float]:
    """Flow loss of the predicted frames, by noise level."""
    return loss_by_level(model, packer.pack(batch, mode), "video")


@torch.no_grad()
def action_following(model: Model, packer: Packer, batch: dict) -> dict[str, float]:
    """How much of its loss the world model owes to the actions: flow loss of the frames given wrong ones less that
    given the true ones, same noise. Zero: it does not listen."""
    loss = {
        name: loss_by_level(model, packer.pack(changed, "world_model"), "video")["validation/loss_video"]
        for name, changed in with_actions(batch).items()
    }
    return {f"validation/action_gap_{name}": loss[name] - loss["true"] for name in ("shuffled", "zero")}


def with_actions(batch: dict) -> dict[str, dict]:
    """The batch under its own actions, under those of other windows, and under none: no motion, the gripper as it is.
    A window gets the actions of the one half a batch further, so that neighbours of one episode do not swap theirs."""
    executed = batch["executed"]  # (B, H, 7)
    still = torch.zeros_like(executed)
    still[..., -1] = executed[:, :1, -1]
    variants = {"true": executed, "shuffled": executed.roll(max(len(executed) // 2, 1), 0), "zero": still}
    return {name: batch | {"executed": actions} for name, actions in variants.items()}


@torch.no_grad()
def action_errors(model: Model, packer: Packer, batch: dict) -> dict[str, float]:
    """Flow loss of the actions by noise level, and mean absolute errors of sampled chunks against the expert, in
    canonical units."""
    tokens = packer.pack(batch, "policy")
    z = generate(model, tokens, SAMPLE_STEPS, torch.Generator().manual_seed(0))
    device = tokens.x.device
    error = packer.actions(tokens, z) - batch["action"].to(device)  # (B, H, 7)
    real = batch["action_mask"].to(device)  # (B, H)
    return loss_by_level(model, tokens, "action") | {
        "validation/action_mm": 1000 * error[..., :3].norm(dim=-1)[real].mean().item(),
        "validation/action_degrees": torch.rad2deg(error[..., 3:6].norm(dim=-1)[real].mean()).item(),
        "validation/action_gripper": error[..., 6].abs()[real].mean().item(),
    }


@torch.no_grad()
def sample_video(model: Model, packer: Packer, batch: dict, mode: str, count: int = 4) -> np.ndarray:
    """The first windows of a batch, real above and as expected below, side by side: uint8 (T, 2 H, count W, 3). What is
    given is real in both."""
    few = {name: value[:count] for name, value in batch.items()}
    tokens = packer.pack(few, mode)
    z = generate(model, tokens, SAMPLE_STEPS, torch.Generator().manual_seed(0))
    real, expected = few["video"], packer.video(tokens, z).cpu()  # (B, T, H, W, 3), (B, F, H, W, 3)
    below = torch.cat([real[:, : real.shape[1] - expected.shape[1]], expected], 1)
    return torch.cat([real, below], 2).permute(1, 2, 0, 3, 4).flatten(2, 3).numpy()
