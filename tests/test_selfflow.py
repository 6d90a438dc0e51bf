import copy
from dataclasses import replace

import pytest
import torch

from selfflow_robot.flow import TimestepDistribution
from selfflow_robot.selfflow import SelfFlowConfig, draw, ema_decay, loss, update_ema
from tests.synthetic import make_batch, make_model, make_packer

PACKER = make_packer()
CONFIG = SelfFlowConfig(levels=TimestepDistribution("logit_normal", 2.0, 0.05), mask_ratio=0.25)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_flow_matching_is_plain_flow_matching_to_the_bit():
    tokens = PACKER.pack(make_batch(4), "pretrain_all")
    ours, plain = make_model(PACKER), make_model(PACKER)
    total, terms = loss(ours, None, tokens, replace(CONFIG, method="flow_matching"), generator())
    total.backward()

    # The whole method in five lines, from the same stream of random numbers.
    g = generator()
    t = CONFIG.levels.draw((2, 4, 1), g)[0]
    torch.rand(4, tokens.x.shape[1], generator=g), torch.rand(4, 1, generator=g)  # masks, which it does not use
    noise = torch.randn(tokens.x.shape, generator=g)
    velocity = plain((1 - t[..., None]) * tokens.x + t[..., None] * noise, t.expand(tokens.x.shape[:2]), tokens)[0]
    C = PACKER.channels["video"]
    expected = (velocity - (noise - tokens.x))[..., :C].square().mean(-1).mean()
    expected.backward()

    assert torch.equal(total, expected) and torch.equal(terms["loss_video"], expected)
    a, b = gradients(ours), gradients(plain)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not any("projector" in name for name in a)


def test_terms_off_are_flow_matching():
    """mask_ratio = 0 and feature_weight = 0 leave the baseline's loss, from the same draws."""
    tokens = PACKER.pack(make_batch(), "joint_plan")
    model = make_model(PACKER)
    off = replace(CONFIG, mask_ratio=0.0, feature_weight=0.0)
    a, _ = loss(model, copy.deepcopy(model), tokens, off, generator())
    b, _ = loss(model, None, tokens, replace(off, method="flow_matching"), generator())
    assert torch.equal(a, b)


def test_both_methods_draw_the_same():
    tokens = PACKER.pack(make_batch(), "pretrain")
    config = replace(CONFIG, given_noise=0.2)
    generators = []
    for method in ("self_flow", "flow_matching"):
        g = generator()
        loss(make_model(PACKER), make_model(PACKER, seed=1), tokens, replace(config, method=method), g)
        generators.append(g.get_state())
    assert torch.equal(*generators)


def test_draw_distribution():
    """Every token's level has distribution p(t); the mask is a Bernoulli of the generated video tokens."""
    tokens = PACKER.pack(make_batch(), "joint_plan")
    big = replace(
        tokens,
        x=tokens.x[:1].expand(20_000, -1, -1)[..., :1],
        weight=tokens.weight[:1].expand(20_000, -1),
        frames=None,
    )
    d = draw(big, replace(CONFIG, levels=TimestepDistribution("uniform")), generator())
    video = tokens.where("generated", "video")[0]
    assert not d.masked[:, ~video].any()
    assert abs(d.masked[:, video].float().mean() - 0.25) < 0.005
    assert d.masked[:, video].sum(1).float().std() > 1  # not a fixed count
    tau = torch.where(d.masked, d.s, d.t)[:, video][:, 0].sort().values
    assert (tau - torch.linspace(0, 1, len(tau))).abs().max() < 0.02  # Kolmogorov-Smirnov
    assert abs((d.t > d.s).float().mean() - 0.5) < 0.02  # not sorted


class Recorder(torch.nn.Module):
    """Stands for a network: writes down what it is shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.channels, self.projector = model, model.config, model.channels, model.projector

    def forward(self, z, t, tokens, feature_layer, cache):
        self.seen = z, t, self.frames
        return self.model(z, t, tokens, feature_layer, cache)

    def features(self, z, t, tokens, layer, cache):
        self.seen, self.layer, self.grad = (z, t, self.frames), layer, torch.is_grad_enabled()
        return self.model.features(z, t, tokens, layer, cache)

    def prefix_cache(self, z, t, tokens, layers=None):
        self.frames = tokens.frames
        return self.model.prefix_cache(z, t, tokens, layers)


@pytest.mark.parametrize("mode", ["pretrain", "joint_plan", "video_prediction"])
def test_teacher_sees_the_cleaner_level_of_the_same_noise(mode):
    tokens = PACKER.pack(make_batch(), mode)
    config = replace(CONFIG, given_noise=0.2 if mode == "pretrain" else 0.0)
    student, teacher = Recorder(make_model(PACKER)), Recorder(make_model(PACKER, seed=1))
    loss(student, teacher, tokens, config, generator(3))
    d = draw(tokens, config, generator(3))
    given, generated, hidden = (tokens.where(role)[0] for role in ("given", "generated", "hidden"))
    (z_s, t_s, frames_s), (z_t, t_t, frames_t) = student.seen, teacher.seen
    assert torch.equal(t_t[:, generated], torch.minimum(d.t, d.s).expand(-1, int(generated.sum())))
    assert torch.equal(t_s[:, generated], torch.where(d.masked, d.s, d.t)[:, generated])
    assert torch.equal(t_s[:, given], t_t[:, given]) and torch.equal(z_s[:, given], z_t[:, given])
    assert torch.equal(frames_s, frames_t)
    level = t_s[:, given]
    if mode == "pretrain":
        assert (level > 0).all() and (level < 0.2).all()
        assert not torch.equal(frames_s, tokens.frames)
    else:
        assert not level.any() and torch.equal(frames_s, tokens.frames)
        assert torch.equal(z_s[:, given], tokens.x[:, given])
    for z, t in ((z_s, t_s), (z_t, t_t)):  # one noise for both
        torch.testing.assert_close(z, (1 - t[..., None]) * tokens.x + t[..., None] * d.noise)
    assert (t_s[:, hidden] == 1).all() and (t_t[:, hidden] == 1).all()
    assert teacher.layer == config.layers(4)[1] == 3 and not teacher.grad


def test_gradient_reaches_the_student_only():
    tokens = PACKER.pack(make_batch(), "pretrain")
    student, teacher = make_model(PACKER), make_model(PACKER, seed=1)
    total, _ = loss(student, teacher, tokens, CONFIG, generator())
    total.backward()
    assert not gradients(teacher)
    assert gradients(student)["projector.0.weight"].abs().sum() > 0


def test_feature_loss_is_the_cosine_over_channels():
    tokens = PACKER.pack(make_batch(), "pretrain")
    student, teacher = make_model(PACKER), make_model(PACKER, seed=1)
    features = {}
    student.projector.register_forward_hook(lambda _, __, out: features.update(student=out))
    whole = teacher.features
    teacher.features = lambda *a: features.setdefault("teacher", whole(*a))
    total, terms = loss(student, teacher, tokens, CONFIG, generator())
    a, b = features["student"], features["teacher"]
    cosine = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    torch.testing.assert_close(terms["cosine"], cosine.detach())
    assert a.shape[1] == int((~tokens.where("given")).sum())
    torch.testing.assert_close(total, terms["loss_video"] + 0.8 * (1 - cosine))


@pytest.mark.parametrize("mode", ["policy", "pretrain"])
def test_several_draws_are_a_larger_batch(mode, monkeypatch):
    """Sharing the given tokens between draws changes the work, not the loss nor its gradient."""
    packed = {size: PACKER.pack(repeat(make_batch(), size), mode) for size in (1, 3)}
    config = replace(CONFIG, draws=3, given_noise=0.2)
    d = draw(packed[1], config, generator())
    students = [make_model(PACKER), make_model(PACKER)]
    shared, _ = loss(students[0], make_model(PACKER, seed=1), packed[1], config, generator())
    shared.backward()
    given = packed[1].where("given")[..., None]  # one noise for all draws of a window
    noise = torch.where(given, d.noise[::3].repeat_interleave(3, 0), d.noise)
    same = replace(d, noise=noise, pixel_noise=d.pixel_noise.repeat_interleave(3, 0))
    monkeypatch.setattr("selfflow_robot.selfflow.draw", lambda *_: same)
    repeated, _ = loss(students[1], make_model(PACKER, seed=1), packed[3], replace(config, draws=1), generator())
    repeated.backward()
    torch.testing.assert_close(shared, repeated)
    for (name, a), (_, b) in zip(*(gradients(student).items() for student in students)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=name)


def repeat(batch, times):
    return {
        name: value.repeat_interleave(times, 0) if torch.is_tensor(value) else [v for v in value for _ in range(times)]
        for name, value in batch.items()
    }


def test_losses_are_means_per_modality_times_their_weights():
    tokens = PACKER.pack(make_batch(), "joint_plan")
    config = SelfFlowConfig(method="flow_matching", video_weight=0.5, action_weight=3.0)
    total, terms = loss(make_model(PACKER), None, tokens, config, generator())
    torch.testing.assert_close(total.detach(), 0.5 * terms["loss_video"] + 3 * terms["loss_action"])
    # a masked-out token changes nothing
    weight = tokens.weight.clone()
    rows = tokens.rows("action", "generated")
    weight[1, rows.stop - 1] = 0
    masked = replace(tokens, weight=weight)
    spoiled = replace(masked, x=tokens.x.clone())
    spoiled.x[1, rows.stop - 1] = 9
    zero = make_model(PACKER, zero=True)  # velocity 0 for any input
    a, b = (loss(zero, None, x, config, generator())[1]["loss_action"] for x in (masked, spoiled))
    assert torch.equal(a, b)
    assert not torch.equal(a, loss(zero, None, tokens, config, generator())[1]["loss_action"])


def test_ema():
    student, teacher = make_model(PACKER), make_model(PACKER, seed=1)
    before = copy.deepcopy(teacher)
    update_ema(teacher, student, 0.9)
    for a, b, c in zip(teacher.parameters(), before.parameters(), student.parameters()):
        torch.testing.assert_close(a, 0.9 * b + 0.1 * c)
    assert ema_decay(0, 0.9999) == 0.1
    assert ema_decay(1000, 0.9999) == 1001 / 1010
    assert ema_decay(10**6, 0.9999) == 0.9999


def test_layers_and_bad_settings():
    assert SelfFlowConfig().layers(28) == (8, 20)  # SiT-XL, as in the paper
    assert SelfFlowConfig().layers(8) == (2, 6)
    for bad in ({"method": "fm"}, {"mask_ratio": 0.6}, {"student_layer": 0.8}):
        with pytest.raises(ValueError, match=r"method|mask_ratio"):
            SelfFlowConfig(**bad)
