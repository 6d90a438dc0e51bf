"""The counts against torch's own counter, the sizes without allocating anything."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfflow_robot import plan
from selfflow_robot.flow import generator
from selfflow_robot.model import PRESETS, ModelConfig
from selfflow_robot.selfflow import loss, objective
from tests.synthetic import SMALL, make_batch, make_model, make_packer

PACKER = make_packer()
MILLIONS = {"tiny": 4.5, "small": 21, "base": 130, "large": 290, "625m": 625, "1b": 1000, "4b": 4000}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_their_names_say(name):
    config = PRESETS[name]
    assert plan.parameters(config) == pytest.approx(MILLIONS[name] * 1e6, rel=0.055)
    assert 64 <= config.width // config.heads <= 128 and config.width // config.heads % 8 == 0


def test_parameters_are_the_models():
    model = make_model(PACKER)
    assert plan.parameters(SMALL, PACKER.channels) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "mode", ("pretrain", "pretrain_all", "joint_plan", "world_model", "video_prediction", "policy")
)
@pytest.mark.parametrize("method", ("self_flow", "flow_matching", "diffusion_forcing", "dual_timesteps"))
def test_flops_are_those_that_torch_counts(mode, method):
    settings = objective(method, mask_ratio=0.5, draws=2 if mode == "policy" else 1)
    model, tokens = make_model(PACKER), PACKER.pack(make_batch(3), mode)
    # The fused kernel of the CPU, used without a gradient, is unknown to the counter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, copy.deepcopy(model).requires_grad_(False), tokens, settings, generator(0))[0].backward()
    blank = plan.blank_tokens(PACKER, mode)
    assert plan.step_flops(SMALL, PACKER.channels, blank, settings, 3) == counter.get_total_flops()


def test_flops_with_a_known_network_are_those_that_torch_counts():
    settings, narrow = objective("flow_matching", draws=2), replace(SMALL, width=16, depth=3)
    model, known = make_model(PACKER), make_model(PACKER, narrow).requires_grad_(False)
    tokens = replace(PACKER.pack(make_batch(3), "policy"), kept=torch.ones(3, 1, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, None, tokens, settings, generator(0), known=known)[0].backward()
    blank = plan.blank_tokens(PACKER, "policy")
    assert plan.step_flops(SMALL, PACKER.channels, blank, settings, 3, narrow) == counter.get_total_flops()
    more, less = (plan.memory(SMALL, PACKER.channels, blank, settings, 3, known=k).total for k in (narrow, None))
    assert more - less == 4 * sum(p.numel() for p in known.parameters())


def test_self_flow_costs_about_what_the_teacher_does():
    """Deep and wide: 1 + 0.7 / 3, and a little for the projector."""
    tokens, config = plan.blank_tokens(PACKER, "pretrain"), PRESETS["4b"]
    ours, plain = (
        plan.step_flops(config, PACKER.channels, tokens, objective(m), 8) for m in ("self_flow", "flow_matching")
    )
    assert 1 + 0.7 / 3 < ours / plain < 1.27


def test_activations_are_about_what_autograd_keeps():
    config = ModelConfig(depth=6, width=192, heads=3)
    model, settings = make_model(PACKER, config), objective("flow_matching")
    tokens, seen = PACKER.pack(make_batch(4), "pretrain_all"), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        total = loss(model, None, tokens, settings, generator(0))[0]
    kept = sum(size for size, _ in seen.values()) - 2 * sum(p.numel() for p in model.blocks.parameters())  # bf16 copies
    blank = plan.blank_tokens(PACKER, "pretrain_all")
    estimate = plan.memory(config, PACKER.channels, blank, settings, 4, quadratic=True).activations
    assert total.isfinite() and estimate == pytest.approx(kept, rel=0.25)


def test_checkpointing_keeps_a_fraction():
    blank, config = plan.blank_tokens(PACKER, "pretrain"), PRESETS["base"]
    whole, less = (
        plan.memory(config, PACKER.channels, blank, objective("self_flow"), 8, checkpointing)
        for checkpointing in (False, True)
    )
    assert less.activations < whole.activations / 8
    assert replace(whole, activations=0) == replace(less, activations=0)
    assert whole.total - whole.activations == 20 * plan.parameters(config, PACKER.channels)


def test_plan_says_what_a_run_takes(capsys):
    modes = plan.by_mode(PACKER, {"pretrain": 0.9, "pretrain_all": 0.1}, objective("self_flow"))
    plan.show("big", PRESETS["625m"], PACKER.channels, modes, 64, 1000, "meta", 3.5)
    text = capsys.readouterr().out
    assert "63" in text and "H200" in text and "GiB" in text and "cost" in text


def test_draws_are_of_policy_and_probabilities_add_up():
    modes = plan.by_mode(PACKER, {"policy": 3.0, "joint_plan": 1.0, "world_model": 0.0}, objective("self_flow"), 4)
    assert [(share, goal.draws) for share, _, goal in modes] == [(0.75, 4), (0.25, 1)]
    each = [plan.step_flops(SMALL, PACKER.channels, tokens, goal, 2) for _, tokens, goal in modes]
    assert plan.mean_step_flops(SMALL, PACKER.channels, modes, 2) == 0.75 * each[0] + 0.25 * each[1]


def test_peak_of_this_processor_is_measured():
    assert 1e9 < plan.peak_flops("cpu") < 1e15


def test_checkpointed_blocks_give_the_same_gradients():
    tokens, settings, found = PACKER.pack(make_batch(), "joint_plan"), objective("self_flow"), []
    for again in (False, True):
        model = make_model(PACKER)
        model.activation_checkpointing = again
        loss(model, copy.deepcopy(model).requires_grad_(False), tokens, settings, generator(0))[0].backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))
