"""Ratios of the benchmark: the arithmetic, and one tiny round of everything."""

import sys

import pytest
import torch

from experiments import benchmark
from selfflow_robot.model import PRESETS
from tests.synthetic import SMALL

PUBLISHED = """
import torch

class SelfFlowPerTokenDiT(torch.nn.Module):
    def __init__(self, hidden_size, **sizes):
        super().__init__()
        self.line = torch.nn.Linear(16, 16)

    def forward(self, x, timesteps, vector):
        assert x.shape[1:] == (256, 16) and timesteps.shape == x.shape[:2] and len(vector) == len(x)
        return self.line(x) * timesteps[..., None]
"""


def test_ratios_are_taken_round_by_round():
    assert benchmark.spread([2.0, 6.0, 8.0], [1.0, 2.0, 2.0]) == {"low": 2.5, "median": 3.0, "high": 3.5}


def test_variants_take_turns_and_the_first_round_does_not_count():
    seen = []
    samples = benchmark.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, 2, "cpu")
    assert seen == list("ababab") and [len(times) for times in samples.values()] == [2, 2]


def test_one_object_with_the_ratios_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.py").write_text(PUBLISHED)
    result = benchmark.benchmark_train("test", 2, 2, "cpu", tmp_path)
    keys = ("selfflow_step_ratio", "per_token_ratio", "draws_speedup", "muon_speedup", "reference_forward_speedup")
    assert all(result[key] > 0 for key in (*keys, "reference_step_speedup"))
    assert ("bf16_speedup" in result) == (result["precision"] == "bf16")  # not against an emulated bf16
    assert 1 < result["selfflow_flops_ratio"] < 1.5
    assert all(0 < share < 1.5 for share in result["mfu"].values())
    assert len(benchmark.lines(result)) > len(keys)


def test_a_step_of_the_benchmark_is_a_training_step(monkeypatch):
    from selfflow_robot.tokens import Layout
    from tests.synthetic import make_batch, make_model, make_packer

    packer = make_packer(Layout(future=(2, 4), height=32, width=48))
    model = make_model(packer)
    before = [p.clone() for p in model.parameters()]
    take = benchmark.training_steps(model, packer, make_batch(layout=packer.layout), "self_flow")
    take()
    take()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # a copy is trained


def test_a_missing_checkout_says_what_is_needed(tmp_path):
    with pytest.raises(SystemExit, match="black-forest-labs"):
        benchmark.load_reference(tmp_path)


def test_a_missing_package_of_the_published_network_is_named(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.py").write_text("import no_such_package")
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        benchmark.load_reference(tmp_path)
    sys.modules.pop("published_self_flow", None)


def test_the_policy_benchmark_says_what_was_asked_for(monkeypatch):
    monkeypatch.setitem(PRESETS, "test", SMALL)
    result = benchmark.benchmark_policy("test", None, 3, 2, "cpu")
    assert result["chunk_ms_p95"] >= result["chunk_ms_p50"] > 0
    assert result["cache_speedup"] > 0 and result["full_speedup"] > 0 and result["actions"] == 8
    stages = {name.removeprefix("stage: ") for name in result["milliseconds"] if name.startswith("stage: ")}
    assert stages == {"pack", "given tokens", "one sampling step", "all of the sampler", "unpack"}
    assert {"1 steps", "10 steps", "imagination 1.0"} <= set(result["milliseconds"])
    assert any("cache_speedup" in line for line in benchmark.policy_lines(result))
