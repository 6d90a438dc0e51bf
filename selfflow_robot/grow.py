"""A small network grown into a larger preset with the same outputs: what it has learned need not be learned again.

Width grows by a whole factor r (after Net2Net, arXiv:1511.05641): every channel and every head is there r times, and a
weight that read a channel once reads its r copies with r shares that sum to it. Shares are drawn at random, for with
equal ones the copies would stay copies. LayerNorm sees the same mean and variance and every head the same keys, so the
outputs are the same but for rounding. Depth grows by blocks that read as an earlier one does and, with zero outputs,
add nothing yet.
"""

import torch
from torch import Tensor

from selfflow_robot.model import Model, ModelConfig

PARTS = {"qkv": 3, "up": 2, "modulation": 6, "last_modulation": 2}  # what the outputs of a layer are cut into
SPREAD = 0.5  # of the shares, in standard deviations of the layer's weights: with r = 2 that of a fresh layer as wide


def grow(model: Model, config: ModelConfig, seed: int = 0) -> Model:
    """`model` as a network of `config` with the same outputs; a feature is there r times.

    Raises ValueError unless width and heads grow by the same whole factor r, and the depth to at most twice.
    """
    old, factor = model.config, config.width // model.config.width
    if (config.width, config.heads) != (factor * old.width, factor * old.heads):
        raise ValueError(f"width and heads must grow by the same whole factor: {old} does not become {config}")
    if config.width * 8 // 3 != factor * (old.width * 8 // 3):
        raise ValueError(f"8/3 of the width (SwiGLU) must grow by it too, not from width {old.width} to {config.width}")
    if not old.depth <= config.depth <= 2 * old.depth:
        raise ValueError(f"a depth of {old.depth} grows to at most {2 * old.depth}, not to {config.depth}")
    if old.feature_width != config.feature_width:
        raise ValueError("a network with the features of an external encoder does not grow")
    grown, generator = Model(config, model.channels), torch.Generator().manual_seed(seed)
    state, origins = model.state_dict(), copied_blocks(old.depth, config.depth)
    for name, target in grown.state_dict().items():
        layers, added = name.split("."), False
        if layers[0] == "blocks":
            block, layers = int(layers[1]), layers[2:]
            added = block > 0 and origins[block] == origins[block - 1]
            name = ".".join(["blocks", str(origins[block]), *layers])
        if added and layers[0] in ("out", "down"):
            target.zero_()
        else:
            target.copy_(widened(state[name], target.shape, layers[0], factor, generator))
    return grown.train(model.training)


def copied_blocks(old: int, new: int) -> list[int]:
    """Of which of `old` blocks each of `new` is a copy: all of them in order, some twice, evenly spread."""
    twice = {(i + 1) * old // (new - old) - 1 for i in range(new - old)}
    return [block for block in range(old) for _ in range(1 + (block in twice))]


def widened(weight: Tensor, shape: torch.Size, layer: str, factor: int, generator: torch.Generator) -> Tensor:
    """A tensor of `layer`, (outputs,), (outputs, inputs, ...) or the offsets (6, D), at the larger `shape`."""
    if layer == "offset":
        return weight.repeat(1, factor)
    if weight.shape[0] != shape[0]:  # outputs: copies of each part lie side by side
        weight = weight.unflatten(0, (PARTS.get(layer, 1), -1))
        weight = torch.cat([weight] * factor, 1).flatten(0, 1)
    if weight.ndim > 1 and weight.shape[1] != shape[1]:  # inputs: channels first; proprioception, after them, stays
        count = (shape[1] - weight.shape[1]) // (factor - 1)
        read, rest = weight[:, :count], weight[:, count:]
        apart = torch.randn(factor, *read.shape, generator=generator)
        apart = (apart - apart.mean(0)) * (factor / (factor - 1)) ** 0.5  # variance 1, sum 0
        weight = torch.cat([*(read / factor + SPREAD * read.std() * apart), rest], 1)
    return weight
