"""A network that was grown computes what it did, and its copies go ways of their own."""

from dataclasses import replace

import pytest
import torch
from synthetic import SMALL, make_batch, make_model, make_packer

from selfflow_robot.flow import generator
from selfflow_robot.grow import copied_blocks, grow
from selfflow_robot.model import PRESETS
from selfflow_robot.tokens import GENERATED, MODES

PACKER = make_packer()
PACKER.codec.fit([make_batch()["video"]])
BASE = replace(SMALL, width=48)
WIDER, DEEPER = replace(BASE, width=96, heads=4), replace(BASE, depth=7)
BOTH = replace(BASE, depth=6, width=144, heads=6)


def noised(mode: str):
    tokens, g = PACKER.pack(make_batch(), mode), generator(0, 7)
    t = torch.rand(2, tokens.x.shape[1], generator=g) * ~tokens.where("given")
    return tokens, torch.randn(tokens.x.shape, generator=g), t


def small():
    """With nothing at its initial zeros."""
    model = make_model(PACKER, BASE).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "offset" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(1, len(name)))
    return model


@pytest.mark.parametrize("config", [BASE, WIDER, DEEPER, BOTH], ids=["same", "wider", "deeper", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_the_outputs_are_the_same(config, mode):
    model, (tokens, z, t) = small(), noised(mode)
    with torch.no_grad():
        before, features = model(z, t, tokens, feature_layer=BASE.depth)
        after, copies = grow(model, config)(z, t, tokens, feature_layer=config.depth)
        taught, learned = model.projector(features), grow(model, config).projector(copies)
    assert before.abs().max() > 0.1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    factor = config.width // BASE.width
    torch.testing.assert_close(copies, features.repeat(1, 1, factor), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(learned, taught.repeat(1, 1, factor), atol=1e-4, rtol=1e-4)


def test_copies_learn_different_things():
    """Of every matrix that has copies, rows or columns of the gradient differ; with equal shares they would not."""
    model = grow(small(), BOTH).train()
    for mode in ("joint_plan", "inverse_dynamics", "world_model"):
        tokens, z, t = noised(mode)
        velocity, features = model(z, t, tokens, feature_layer=2)
        (
            velocity[tokens.where(GENERATED).expand(2, -1)].square().sum() + model.projector(features).square().sum()
        ).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    added = [
        name for name in silent if name.split(".")[2:3] not in (["qkv"], ["up"], ["norm_q"], ["norm_k"], ["offset"])
    ]
    assert added == [] and silent  # a block that adds nothing yet learns to, before it learns what to read
    for block in model.blocks:
        first, second, third = block.down.weight.grad.chunk(3, 0)
        assert not torch.allclose(first, second, rtol=0.01) and not torch.allclose(second, third, rtol=0.01)
    first, second, _ = model.blocks[0].qkv.weight.grad.unflatten(0, (3, 3, -1)).unbind(1)
    assert not torch.allclose(first, second, rtol=0.01)


def test_added_blocks_are_spread():
    assert copied_blocks(8, 10) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert copied_blocks(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3] and copied_blocks(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(SMALL, width=48, heads=3), "same whole factor"),
        (replace(SMALL, width=64, heads=2), "same whole factor"),
        (replace(SMALL, width=16, heads=1), "same whole factor"),
        (replace(SMALL, width=96, heads=6), "8/3 of the width .* not from width 32 to 96"),
        (replace(SMALL, depth=9), "a depth of 4 grows to at most 8, not to 9"),
        (replace(SMALL, depth=3), "to at most 8, not to 3"),
        (replace(SMALL, feature_width=16), "external encoder"),
    ],
)
def test_what_cannot_grow_says_why(config, said):
    with pytest.raises(ValueError, match=said):
        grow(make_model(PACKER), config)


def test_the_smallest_preset_becomes_the_next():
    tiny, small = PRESETS["tiny"], PRESETS["small"]
    assert small.width == 2 * tiny.width and small.heads == 2 * tiny.heads and small.depth <= 2 * tiny.depth
