import shutil
from copy import deepcopy

import pytest
import torch

from selfflow_robot.model import (
    CHANGE,
    Levels,
    ModelConfig,
    attend,
    gaussian_velocity,
    precision,
    preset,
    rotate,
    rotation,
)
from selfflow_robot.selfflow import loss, objective
from selfflow_robot.tokens import GENERATED, GIVEN
from tests.synthetic import SMALL, make_batch, make_model, make_packer

PACKER = make_packer()
MODES = ("policy", "joint_plan", "world_model", "inverse_dynamics", "video_prediction", "pretrain", "pretrain_all")


def noised(mode, seed=0):
    tokens = PACKER.pack(make_batch(), mode)
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(tokens.x.shape[:2], generator=g)
    t[:, : tokens.prefix] = 0
    z = torch.randn(tokens.x.shape, generator=g)
    z[:, : tokens.prefix] = tokens.x[:, : tokens.prefix]
    return tokens, z, t


def test_starts_knowing_that_most_of_a_video_stands_still():
    """Before training: of actions the zero velocity, of frames that of N(latest given frame, CHANGE), the best there is
    for them; where nothing is given, of N(0, 1)."""
    tokens, z, t = noised("joint_plan")
    velocity, _ = make_model(PACKER, zero=True)(z, t, tokens)
    assert velocity.shape == z.shape and not velocity[:, tokens.where(GIVEN)[0]].any()
    assert not velocity[:, tokens.rows("action", GENERATED)].any()
    rows, C = tokens.rows("video", GENERATED), PACKER.channels["video"]
    given = tokens.rows("video", GIVEN)
    places = PACKER.grid[0] * PACKER.grid[1]
    assert tokens.places == places
    before = z[:, given.stop - places : given.stop, :C].repeat(1, (rows.stop - rows.start) // places, 1)
    level = (t if t.shape[1] == 1 else t[:, rows])[..., None]
    # E[noise - x | z] from the joint Gaussian of x and z = (1 - t) x + t noise
    variance = (1 - level) ** 2 * CHANGE + level**2
    off = z[:, rows, :C] - (1 - level) * before
    x = before + (1 - level) * CHANGE / variance * off
    noise = level / variance * off
    torch.testing.assert_close(velocity[:, rows, :C], noise - x, atol=1e-5, rtol=1e-4)


def test_the_velocity_of_a_certain_belief_leads_there():
    """Certain of the token, one step from any level arrives at it; knowing nothing, near data it believes what it
    sees."""
    z, t, mean = torch.randn(2, 3, 4), torch.rand(2, 3, 1).clamp(0.2), torch.randn(2, 3, 4)
    certain = gaussian_velocity(z, t, torch.zeros_like(z), torch.full_like(z, -100.0), mean)
    torch.testing.assert_close(z - t * certain, mean, atol=0.1, rtol=0.0)  # the least spread is not zero
    clean = gaussian_velocity(z, torch.zeros_like(t), torch.randn_like(z), torch.zeros_like(z), None)
    torch.testing.assert_close(clean, -z)
    at_noise = gaussian_velocity(z, torch.ones_like(t), mean, torch.zeros_like(z), None)
    torch.testing.assert_close(at_noise, z - mean)


@pytest.mark.parametrize("mode", MODES)
def test_cached_prefix_gives_the_same_velocity(mode):
    tokens, z, t = noised(mode)
    model = make_model(PACKER).eval()
    with torch.no_grad():
        whole, _ = model(z, t, tokens)
        cached, _ = model(z, t, tokens, cache=model.prefix_cache(tokens.x, torch.zeros_like(t), tokens))
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_given_tokens_do_not_see_the_rest(mode):
    """The prefix's keys and values do not depend on the rest."""
    tokens, z, t = noised(mode)
    model = make_model(PACKER).eval()
    other = torch.where(tokens.where("given")[..., None], z, z + 1)
    caches = [model.prefix_cache(x, t, tokens) for x in (z, other)]
    for one, two in zip(*caches):
        assert (one is None) == (not tokens.prefix)
        if one is not None:
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    given = torch.where(tokens.where("given")[..., None], z + 1, z)  # while the rest sees the prefix
    changed = model(given, t, tokens)[0] != model(z, t, tokens)[0]
    assert changed.any() == (tokens.prefix > 0)


def test_each_token_has_its_own_noise_level():
    tokens, z, t = noised("joint_plan")
    model = make_model(PACKER).eval()
    constant, _ = model(z, torch.full_like(t, 0.3), tokens)
    last = t.clone().fill_(0.3)
    last[:, -1] = 0.9
    changed, _ = model(z, last, tokens)
    assert not torch.allclose(constant[:, -1], changed[:, -1])
    # permuting samples permutes results: a level belongs to its sample
    swapped, _ = model(
        z.flip(0),
        t.flip(0),
        PACKER.pack({k: v.flip(0) if torch.is_tensor(v) else v[::-1] for k, v in make_batch().items()}, "joint_plan"),
    )
    torch.testing.assert_close(swapped.flip(0), model(z, t, tokens)[0], atol=1e-5, rtol=1e-5)


def test_features_of_a_layer_and_of_the_shortened_network_agree():
    tokens, z, t = noised("joint_plan")
    model = make_model(PACKER).eval()
    for layer in (1, 2, 4):
        _, features = model(z, t, tokens, feature_layer=layer)
        assert features.shape == (2, z.shape[1] - tokens.prefix, SMALL.width)
        torch.testing.assert_close(model.features(z, t, tokens, layer), features, atol=1e-5, rtol=1e-5)


def test_shortened_network_does_not_run_later_blocks():
    tokens, z, t = noised("policy")
    model = make_model(PACKER)
    model.blocks[2] = None  # would fail
    assert model.features(z, t, tokens, 2).isfinite().all()


def test_given_frames_are_seen_in_every_pixel():
    """A stripe pattern that the latents drop changes the velocity."""
    batch = make_batch()
    tokens = PACKER.pack(batch, "policy")
    stripes = tokens.frames.clone()
    stripes[:, :, ::2] += 0.5
    stripes[:, :, 1::2] -= 0.5
    model = make_model(PACKER).eval()
    t, z = torch.zeros(tokens.x.shape[:2]), tokens.x
    changed = type(tokens)(**{**vars(tokens), "frames": stripes})
    assert not torch.allclose(model(z, t, tokens)[0], model(z, t, changed)[0])


def test_rotary_depends_on_differences_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 1, 32, generator=g), torch.randn(1, 2, 1, 32, generator=g)
    ids = torch.tensor([[0.0, 1, 2, 3], [4.0, 3, 7, 2]])
    dots = []
    for offset in (0.0, 5.0):
        rotary = rotation(ids + offset, 32)
        dots.append((rotate(q, *rotary)[:, 0] * rotate(k, *rotary)[:, 1]).sum())
    torch.testing.assert_close(dots[0], dots[1])
    assert (rotate(q, *rotation(ids, 32)).norm(dim=-1) - q.norm(dim=-1)).abs().max() < 1e-5


def test_attention_for_training_equals_torchs():
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attend(q, k, v)
    torch.testing.assert_close(attend(q.requires_grad_(), k, v), expected, atol=1e-5, rtol=1e-5)


def test_a_frame_is_told_what_was_done_until_then():
    """Frames 2 and 4 steps ahead, three actions: the third is news for the later frame alone."""
    tokens, z, _ = noised("world_model")
    model, span = make_model(PACKER), tokens.spans[-1]
    assert (span.kind, span.role) == ("video", GENERATED)
    changed, rows = z.clone(), tokens.rows("action", GIVEN)
    changed[:, rows.stop - 1] += 1
    before, after = (model._done(x, tokens, span) for x in (z, changed))
    assert torch.equal(before[:, : tokens.places], after[:, : tokens.places])
    assert not torch.isclose(before[:, tokens.places :], after[:, tokens.places :]).all()
    for mode in ("pretrain", "video_prediction"):  # nothing was done, or nobody says what
        tokens, z, _ = noised(mode)
        assert model._done(z, tokens, tokens.spans[-1]) == 0.0


def test_every_parameter_learns():
    """In some mode, after the zero initialisation is left."""
    model = make_model(PACKER)
    for mode in ("joint_plan", "inverse_dynamics", "world_model"):
        tokens, z, t = noised(mode)
        velocity, features = model(z, t, tokens, feature_layer=2)
        (
            velocity[tokens.where(GENERATED).expand(2, -1)].square().sum() + model.projector(features).square().sum()
        ).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("mode", ["policy", "pretrain_all"])
def test_blocks_compile_whole_and_mean_the_same(mode):
    """Traced without a break in the graph; the code that a compiler would make of it is not at stake here."""
    tokens, z, t = noised(mode)
    plain, compiled = make_model(PACKER), make_model(PACKER)
    compiled.compile_blocks(backend="eager", fullgraph=True)
    levels = Levels(
        torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(t.numel()).view_as(t) % 3
    )
    apart = torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    gradients = []
    for model in (plain, compiled):
        outputs = [model(z, t, tokens)[0], model(z, levels, tokens, apart=apart)[0]]
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([*outputs, model.blocks[0].qkv.weight.grad])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_compiled_fine_tuning_leaves_no_batch_uncompiled():
    """Every role, with and without committed actions, of student and teacher: more shapes than torch keeps by default,
    beyond which it says so once and runs the blocks as they are."""
    student = make_model(PACKER)
    teacher = deepcopy(student).eval().requires_grad_(False)
    torch.compiler.reset()
    for model in (student, teacher):
        model.compile_blocks(backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in MODES:
            for committed in (0, 1, 2) if mode in ("policy", "joint_plan") else (0,):
                config = objective("self_flow", action_noise="own", draws=4 if mode == "policy" else 1)
                tokens = PACKER.pack(make_batch(), mode, committed)
                loss(student, teacher, tokens, config, torch.Generator().manual_seed(0))[0].backward()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="choose one of tiny, small"):
        preset("huge")
    with pytest.raises(ValueError, match="multiple of 8"):
        ModelConfig(width=100, heads=5)


def test_the_copy_to_sample_with_computes_the_same():
    """Casting once or at every use: the same bits; and the original keeps its precision."""
    tokens, z, t = noised("joint_plan")
    model = make_model(PACKER).eval()
    copied = model.for_inference(torch.device("cpu"))
    with torch.no_grad(), precision("cpu"):
        assert torch.equal(model(z, t, tokens)[0], copied(z, t, tokens)[0])
    assert model.modulation.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in copied.parameters())
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_computes_the_same():
    tokens, z, t = noised("policy")
    model = make_model(PACKER).eval()
    compiled = model.for_inference(torch.device("cpu"), compiled=True)
    with torch.no_grad(), precision("cpu"):
        expected, _ = model(z, t, tokens, cache=model.prefix_cache(z, t, tokens))
        found, _ = compiled(z, t, tokens, cache=compiled.prefix_cache(z, t, tokens))
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0.05)  # bf16, fused
