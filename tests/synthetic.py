"""Small windows, data sets and networks for the tests of the method."""

import numpy as np
import torch

from selfflow_robot import checkpoint
from selfflow_robot.codec import CodecConfig
from selfflow_robot.data import finalize, write_episode
from selfflow_robot.flow import generator
from selfflow_robot.model import Model, ModelConfig
from selfflow_robot.tokens import Layout, Packer

SMALL = ModelConfig(depth=4, width=32, heads=2)
LAYOUT = Layout(past=(-1, 0), future=(2, 4), horizon=3, text_bytes=16, height=32, width=48)
STATS = {
    "action": {"q01": np.full(7, -0.5), "q99": np.full(7, 1.5)},
    "proprio": {"mean": np.arange(10.0), "std": np.full(10, 2.0)},
}


def make_packer(layout=LAYOUT, codec=CodecConfig(luma=4, chroma=2)):  # noqa: B008 (frozen)
    return Packer(layout, codec).fit_statistics(STATS)


def make_batch(size=2, seed=0, layout=LAYOUT):
    g = generator(seed, 1)
    frames = len(layout.past + layout.future)
    shape = (size, frames, layout.height, layout.width, 3)
    return {
        "video": torch.randint(0, 256, shape, dtype=torch.uint8, generator=g),
        "video_mask": torch.ones(size, frames, dtype=torch.bool),
        "proprio": torch.randn(size, 10, generator=g),
        "action": torch.randn(size, layout.horizon, 7, generator=g),
        "executed": torch.randn(size, layout.horizon, 7, generator=g),
        "action_mask": torch.ones(size, layout.horizon, dtype=torch.bool),
        "instruction": ["open", "place"][:size] + ["open"] * (size - 2),
    }


def make_model(packer, config=SMALL, seed=0, zero=False):
    """`zero`: as initialised, the zero velocity; else heads, gates and modulation are random too."""
    torch.manual_seed(seed)
    model = Model(config, packer.channels)
    if not zero:
        for name, parameter in model.named_parameters():
            if "modulation" in name or "outputs" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_run(folder, layout=LAYOUT, seed=0, **manifest):
    """A run folder with an untrained policy (or, by its manifest, something else) of that layout; returns it."""
    packer = make_packer(layout)
    packer.codec.fit([make_batch(layout=layout)["video"]])
    model = make_model(packer, seed=seed)
    parts = {"model": model, "ema": model, "packer": packer}
    tensors = {k: v.clone() for prefix, part in parts.items() for k, v in checkpoint.collect(prefix, part).items()}
    described = {"kind": "finetune"} | checkpoint.describe(model, packer)
    checkpoint.save(folder / "checkpoint", 1, tensors, described | manifest)
    return folder


def write_dataset(root, episodes=4, length=12, height=32, width=48):
    """A square moving by the action; instructions change half way."""
    for seed in range(episodes):
        rng = np.random.default_rng(seed)
        action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
        action[:, 6] = rng.integers(0, 2, length)
        frames = np.full((length, height, width, 3), 60, np.uint8)
        position = np.clip(8 + np.cumsum(action[:, :2], 0).astype(int), 0, 20)
        for t, (row, col) in enumerate(position):
            frames[t, row : row + 8, col : col + 8] = (200, 40, 40)
        proprio = rng.normal(size=(length, 10)).astype(np.float32)
        instructions = ["open"] * (length // 2) + ["place"] * (length - length // 2)
        write_episode(root, seed, frames, proprio, action, action, instructions, True)
    finalize(root)
    return root
