import copy
from dataclasses import replace

import pytest
import torch

from selfflow_robot.flow import TimestepDistribution, interpolate
from selfflow_robot.model import Levels
from selfflow_robot.selfflow import (
    METHODS,
    SelfFlowConfig,
    draw,
    ema_decay,
    loss,
    objective,
    per_token,
    student_levels,
    teacher_levels,
    update_ema,
)
from tests.synthetic import SMALL, make_batch, make_model, make_packer

PACKER = make_packer()
CONFIG = objective("self_flow", levels=TimestepDistribution("logit_normal", 2.0, 0.05), mask_ratio=0.25)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_flow_matching_is_plain_flow_matching_to_the_bit():
    tokens = PACKER.pack(make_batch(4), "pretrain_all")
    ours, plain = make_model(PACKER), make_model(PACKER)
    total, terms = loss(ours, None, tokens, CONFIG.switched_off(), generator())
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
    b, _ = loss(model, None, tokens, off.switched_off(), generator())
    assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["policy", "joint_plan", "world_model"])
def test_what_was_known_is_kept_where_it_is_asked_for(mode):
    """A network that is what it was has no loss in kept windows; in the others it has the labels'."""
    config = replace(CONFIG.switched_off(), draws=3)
    tokens, model, other = PACKER.pack(make_batch(), mode), make_model(PACKER), make_model(PACKER, seed=1)

    def terms(kept, known=model, weight=tokens.weight):
        rows = replace(tokens, kept=torch.tensor(kept)[:, None], weight=weight)
        return loss(model, None, rows, config, generator(), known=known)[1]

    assert terms([True, True])["loss"] < 1e-9  # with and without a gradient, sums round differently
    plain, _ = loss(model, None, tokens, config, generator())
    assert terms([False, False])["loss"] == plain
    second = terms([False, False], weight=tokens.weight * torch.tensor([[0.0], [1.0]]))  # its mean is over one of two
    for name, value in terms([True, False]).items():
        torch.testing.assert_close(value, second[name] / 2)
    assert terms([True, True], known=other)["loss"] > 0


def test_what_is_kept_gives_the_known_network_no_gradient_and_the_student_one():
    tokens, model, known = PACKER.pack(make_batch(), "policy"), make_model(PACKER), make_model(PACKER, seed=1)
    known.requires_grad_(False)
    tokens = replace(tokens, kept=torch.tensor([[True], [True]]))
    loss(model, None, tokens, CONFIG.switched_off(), generator(), known=known)[0].backward()
    assert gradients(model) and not gradients(known) and not any(p.requires_grad for p in known.parameters())


def test_both_methods_draw_the_same():
    tokens = PACKER.pack(make_batch(), "pretrain")
    config = replace(CONFIG, given_noise=0.2)
    generators = []
    for method in ("self_flow", "flow_matching"):
        g = generator()
        loss(make_model(PACKER), make_model(PACKER, seed=1), tokens, replace(config, **METHODS[method]), g)
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


def levels_of(method, mode="joint_plan", samples=20_000, **settings):
    """What the student sees every token at, (samples, N), and the draw."""
    tokens = PACKER.pack(make_batch(), mode)
    many = dict(x=tokens.x[:1].expand(samples, -1, -1)[..., :1], weight=tokens.weight[:1].expand(samples, -1))
    tokens = replace(tokens, **many, text=None, frames=None)
    config = objective(method, levels=TimestepDistribution("uniform"), mask_ratio=0.25, **settings)
    d = draw(tokens, config, generator())
    return per_token(student_levels(d, tokens, config)), d, tokens, config


def distance_to_uniform(x):
    """Kolmogorov-Smirnov."""
    return (x.sort().values - torch.linspace(0, 1, len(x))).abs().max()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full_masking"])
@pytest.mark.parametrize("action_noise", ["shared", "masked", "own"])
def test_every_token_has_the_level_distribution(method, action_noise):
    tau, _, tokens, _ = levels_of(method, action_noise=action_noise, action_mask_ratio=0.3)
    for kind in ("video", "action"):
        span = tokens.rows(kind, "generated")
        for column in (span.start, span.stop - 1):
            assert distance_to_uniform(tau[:, column]) < 0.02


def test_what_sets_the_methods_apart():
    video, action = (PACKER.pack(make_batch(), "joint_plan").rows(kind, "generated") for kind in ("video", "action"))

    def distinct(method, span, **settings):
        tau = levels_of(method, samples=500, **settings)[0][:, span]
        return torch.tensor([len(row.unique()) for row in tau])

    assert (distinct("flow_matching", video) == 1).all() and (distinct("sra", video) == 1).all()
    assert distinct("self_flow", video).max() == 2 and (distinct("self_flow", action) == 1).all()
    assert (distinct("diffusion_forcing", video) == video.stop - video.start).all()
    tau, d, *_ = levels_of("full_masking", samples=2000)
    assert torch.equal(tau[:, video] == 1, d.masked[:, video]) and abs(d.masked[:, video].float().mean() - 0.25) < 0.01
    assert distinct("self_flow", action, action_noise="masked", action_mask_ratio=0.5).max() == 2
    tau, d, *_ = levels_of("self_flow", samples=500, action_noise="own", action_mask_ratio=0.5)
    expected = torch.where(d.masked[:, action], d.action[1], d.action[0])
    assert torch.equal(tau[:, action], expected) and not torch.equal(d.action[0], d.t)
    assert torch.equal(tau[:, video], torch.where(d.masked[:, video], d.s, d.t))


@pytest.mark.parametrize("action_noise", ["shared", "own"])
def test_the_teachers_level(action_noise):
    """min(t, s) of each modality; in SRA a little below t; never above what the student sees."""
    for method in ("self_flow", "sra"):
        tau, d, tokens, config = levels_of(method, samples=2000, action_noise=action_noise, action_mask_ratio=0.3)
        teacher = per_token(teacher_levels(d, tokens, config))
        rows = {kind: teacher[:, tokens.rows(kind, "generated")] for kind in ("video", "action")}
        drawn = {"video": (d.t, d.s), "action": (d.t, d.s) if action_noise == "shared" else tuple(d.action)}
        for kind, level in rows.items():
            t, s = drawn[kind]
            expected = torch.minimum(t, s) if method == "self_flow" else (t - d.offset).clamp_min(0)
            assert torch.equal(level, expected.expand_as(level))
        assert (teacher <= tau).all()
    assert d.offset.max() <= 0.2 and d.offset.mean() == pytest.approx(0.1, abs=0.01)


def test_few_levels_are_handed_out_exactly():
    """Computing what depends on t for a sample's few levels changes nothing against computing it for every token; one
    level for all equals the scalar path to the bit."""
    tokens = PACKER.pack(make_batch(), "joint_plan")
    model = make_model(PACKER).eval()
    d = draw(tokens, CONFIG, generator())
    levels = student_levels(d, tokens, CONFIG)
    z = interpolate(tokens.x, d.noise, per_token(levels))[0]
    torch.testing.assert_close(
        model(z, levels, tokens)[0], model(z, per_token(levels), tokens)[0], atol=1e-5, rtol=1e-5
    )
    scalar = model(z, torch.full((2, 1), 0.3), tokens)[0]
    one, random = torch.zeros_like(levels.index), torch.randint(3, levels.index.shape, generator=generator())
    for same in (torch.full_like(per_token(levels), 0.3), Levels(torch.full((2, 3), 0.3), one)):
        assert torch.equal(model(z, same, tokens)[0], scalar)
    handed_out = model(z, Levels(torch.full((2, 3), 0.3), random), tokens)[0]
    torch.testing.assert_close(handed_out, scalar, atol=1e-5, rtol=1e-5)


def test_groups_apart_do_not_see_each_other():
    tokens = PACKER.pack(make_batch(), "pretrain")
    model = make_model(PACKER).eval()
    d = draw(tokens, CONFIG, generator())
    t = torch.full(tokens.x.shape[:2], 0.5)
    apart = d.masked
    z = d.noise
    changed = torch.where(apart[..., None], z + 1, z)
    for seen in (apart, None):
        a, b = (model(x, t, tokens, apart=seen)[0] for x in (z, changed))
        rest = ~apart & tokens.where("generated")
        assert torch.equal(a[rest], b[rest]) == (seen is not None)
    whole = model(z, t, tokens, apart=torch.zeros_like(apart))[0]  # one group: as without
    torch.testing.assert_close(whole, model(z, t, tokens)[0], atol=1e-5, rtol=1e-5)
    student, teacher = Recorder(make_model(PACKER)), Recorder(make_model(PACKER, seed=1))
    loss(student, teacher, tokens, replace(CONFIG, apart=1.0), generator())
    assert torch.equal(student.apart, d.masked)


def test_layer_sync_pulls_a_layer_to_a_later_one():
    tokens = PACKER.pack(make_batch(), "pretrain")
    model, config = make_model(PACKER), objective("layer_sync", levels=CONFIG.levels)
    total, terms = loss(model, None, tokens, config, generator())
    d = draw(tokens, config, generator())
    tau = student_levels(d, tokens, config)
    z = interpolate(tokens.x, d.noise, per_token(tau))[0]
    early, late = model(z, tau, tokens, (1, 3))[1]
    cosine = torch.nn.functional.cosine_similarity(early, late.detach(), dim=-1).mean()
    torch.testing.assert_close(total, terms["loss_video"] + 0.5 * (1 - cosine))
    total.backward()
    assert model.projector[0].weight.grad is None


def test_repa_predicts_what_the_encoder_says():
    tokens = PACKER.pack(make_batch(), "joint_plan")
    span = tokens.rows("video", "generated")
    model = make_model(PACKER, replace(SMALL, feature_width=12))
    config = objective("repa", levels=CONFIG.levels, draws=2)
    targets = torch.randn(2, span.stop - span.start, 12, generator=generator())
    total, terms = loss(model, None, tokens, config, generator(), targets)
    model.projector.register_forward_hook(lambda *_: targets.repeat_interleave(2, 0))
    perfect = loss(model, None, tokens, config, generator(), targets)[1]
    assert terms["cosine"] < 0.5 and perfect["cosine"] == pytest.approx(1)
    torch.testing.assert_close(total.detach() - 0.5 * (1 - terms["cosine"]), terms["loss_video"] + terms["loss_action"])


def test_dropped_conditions_are_dropped_for_both():
    tokens = PACKER.pack(make_batch(16), "policy")
    student, teacher = Recorder(make_model(PACKER)), Recorder(make_model(PACKER, seed=1))
    config = replace(CONFIG, condition_dropout=0.5, draws=2)
    loss(student, teacher, tokens, config, generator())
    dropped = draw(tokens, config, generator()).dropped[::2, 0]
    assert 2 < dropped.sum() < 14
    for network in (student, teacher):
        proprio = network.tokens.x[:, tokens.rows("proprio", "given"), :10]
        assert not proprio[dropped].any() and proprio[~dropped].all()
        assert not network.tokens.text[dropped].any()
        assert torch.equal(network.tokens.text[~dropped], tokens.text[~dropped])


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_draw_what_the_whole_does(method):
    """The loss of two halves on two machines averages to the loss of the whole."""
    tokens = PACKER.pack(make_batch(4), "joint_plan")
    config = replace(objective(method), given_noise=0.2, draws=2)
    whole = draw(tokens, config, generator())
    halves = [
        draw(replace(tokens, x=x, frames=frames), config, generator(), (k, 2))
        for k, (x, frames) in enumerate(zip(tokens.x.chunk(2), tokens.frames.chunk(2)))
    ]
    for name, value in vars(whole).items():
        parts = [getattr(half, name) for half in halves]
        if value is not None:
            assert torch.equal(torch.cat(parts, 1 if name == "action" else 0), value), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    tokens = PACKER.pack(make_batch(), "joint_plan")
    span = tokens.rows("video", "generated")
    target = torch.randn(2, span.stop - span.start, 32, generator=generator()) if method == "repa" else None
    student, teacher = make_model(PACKER), make_model(PACKER, seed=1)
    config = objective(method)
    total, terms = loss(student, teacher if config.needs_teacher else None, tokens, config, generator(), target)
    total.backward()
    assert all(g.isfinite().all() for g in gradients(student).values())
    assert ("cosine" in terms) == (config.features != "none")
    plain, same = (loss(make_model(PACKER), None, tokens, c, generator())[0]
                   for c in (objective("flow_matching"), config.switched_off()))  # fmt: skip
    assert torch.equal(plain, same)


class Recorder(torch.nn.Module):
    """Stands for a network: writes down what it is shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.channels, self.projector = model, model.config, model.channels, model.projector

    def forward(self, z, t, tokens, feature_layer, cache, apart):
        self.seen, self.apart = (z, per_token(t), self.frames), apart
        return self.model(z, t, tokens, feature_layer, cache, apart)

    def features(self, z, t, tokens, layer, cache):
        self.seen, self.layer, self.grad = (z, per_token(t), self.frames), layer, torch.is_grad_enabled()
        return self.model.features(z, t, tokens, layer, cache)

    def prefix_cache(self, z, t, tokens, layers=None):
        self.frames, self.tokens = tokens.frames, tokens
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
    prefix = d.noise[:, : packed[1].prefix].unflatten(0, (-1, 3))
    assert (prefix == prefix[:, :1]).all()  # one noise for all draws of a window
    same = replace(d, pixel_noise=d.pixel_noise.repeat_interleave(3, 0))
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
    config = objective("flow_matching", video_weight=0.5, action_weight=3.0)
    total, terms = loss(make_model(PACKER), None, tokens, config, generator())
    torch.testing.assert_close(total.detach(), 0.5 * terms["loss_video"] + 3 * terms["loss_action"])
    # a masked-out token changes nothing
    weight = tokens.weight.clone()
    rows = tokens.rows("action", "generated")
    weight[1, rows.stop - 1] = 0
    masked = replace(tokens, weight=weight)
    spoiled = replace(masked, x=tokens.x.clone())
    spoiled.x[1, rows.stop - 1] = 9
    zero = make_model(PACKER, zero=True)  # its features do not reach its velocity
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
    with pytest.raises(ValueError, match="method 'fm': choose one of self_flow, flow_matching"):
        objective("fm")
    for bad in ({"scheduling": "both"}, {"mask_ratio": 0.6}, {"action_mask_ratio": 0.6}, {"student_layer": 0.8}):
        with pytest.raises(ValueError, match=r"scheduling|mask_ratio|student_layer"):
            SelfFlowConfig(**bad)
