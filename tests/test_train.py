import itertools
import json
from pathlib import Path

import pytest
import torch

from experiments.finetune import finetune
from experiments.pretrain import pretrain
from selfflow_robot import checkpoint, model, train
from selfflow_robot.checkpoint import CheckpointError
from selfflow_robot.config import FinetuneConfig, PretrainConfig
from selfflow_robot.selfflow import SelfFlowConfig, loss
from selfflow_robot.train import TrainConfig
from tests.synthetic import SMALL, make_batch, make_model, make_packer, write_dataset

CONFIG = TrainConfig(steps=6, lr=1e-2, warmup=2)
MANIFEST = {"kind": "pretrain", "method": "self_flow", "identity": {"lr": 1e-2}, "config": {}}
MODES = ["pretrain", "pretrain_all", "joint_plan"]


def fit(run, config=CONFIG, stop=None, manifest=MANIFEST, save_every=3):
    """Six steps on synthetic batches; `stop`: the batch at which the process is killed."""
    packer = make_packer()
    state = train.new_state(make_model(packer), config)
    objective = SelfFlowConfig(mask_ratio=0.25)

    def batches(start):
        for step in itertools.count(start):
            if step == stop:
                raise KeyboardInterrupt
            yield make_batch(seed=step)

    def loss_fn(student, teacher, batch, generator):
        mode = MODES[torch.randint(3, (), generator=generator)]
        return loss(student, teacher, packer.pack(batch, mode), objective, generator)

    train.fit(run, state, packer, config, manifest, batches, loss_fn, lambda m: {"validation/x": 1.0}, save_every, 3)
    return state


def same(run_a, run_b):
    a, b = (checkpoint.load(run / "checkpoint")[0] for run in (run_a, run_b))
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    fit(tmp_path / "whole")
    for stop in (2, 3, 5):  # before, at and after the first save
        run = tmp_path / f"stopped_{stop}"
        with pytest.raises(KeyboardInterrupt):
            fit(run, stop=stop)
        fit(run)
        assert same(tmp_path / "whole", run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # no line twice
        assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
        assert [line["step"] for line in lines if "validation/x" in line] == [3, 6]
    fit(tmp_path / "other", config=TrainConfig(steps=6, lr=1e-2, warmup=2, seed=1))
    assert not same(tmp_path / "whole", tmp_path / "other")


def test_a_finished_run_does_nothing_and_more_steps_continue_it(tmp_path):
    fit(tmp_path)
    before = (tmp_path / "checkpoint" / "step_00000006.safetensors").read_bytes()
    fit(tmp_path, stop=6)
    assert (tmp_path / "checkpoint" / "step_00000006.safetensors").read_bytes() == before
    assert fit(tmp_path, TrainConfig(steps=8, lr=1e-2, warmup=2)).step == 8


def test_other_settings_are_refused_before_anything_is_written(tmp_path):
    fit(tmp_path)
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 there, 0\.5 now"):
        fit(tmp_path, manifest=MANIFEST | {"identity": {"lr": 0.5}})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_truncated_checkpoint_is_refused_and_the_one_before_continues(tmp_path):
    fit(tmp_path / "whole")
    fit(tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoint" / "step_00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step_00000006\.safetensors is truncated"):
        fit(tmp_path / "damaged")
    newest.with_suffix(".json").unlink()
    fit(tmp_path / "damaged")
    assert same(tmp_path / "whole", tmp_path / "damaged")


def test_a_half_written_metrics_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.keep_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_learning_rate_schedule():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, cooldown=0.2)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == rates[80] == 1.0
    assert rates[90] == 0.5 and rates[99] == pytest.approx(0.05)
    longer = TrainConfig(steps=200, lr=1.0, warmup=10, cooldown=0.2)
    assert [train.learning_rate(step, longer) for step in range(80)] == rates[:80]


def test_training_learns_one_batch(tmp_path):
    """The loss on a repeated batch falls far below that of the zero velocity."""
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    state = train.new_state(make_model(packer, zero=True), TrainConfig(steps=150, lr=3e-3, warmup=5))
    tokens = packer.pack(make_batch(), "policy")
    objective = SelfFlowConfig(method="flow_matching")
    losses = [
        metrics["loss"]
        for _, metrics in train.train(
            state,
            itertools.repeat(make_batch()),
            lambda m, e, b, g: loss(m, e, tokens, objective, g),
            TrainConfig(steps=150, lr=3e-3, warmup=5),
        )
    ]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    state = train.new_state(make_model(make_packer()), CONFIG)
    loop = train.train(state, [make_batch()], lambda m, e, b, g: (torch.tensor(float("nan")), {}), CONFIG)
    with pytest.raises(FloatingPointError, match="at step 0: lower the learning rate"):
        next(loop)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a data set; the preset tiny is replaced by a smaller network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.PRESETS, "tiny", SMALL)
    return write_dataset(Path("data/moving"))


PRETRAIN = {"data": "data/moving", "batch_size": 2, "future": [1, 2], "luma": 4, "chroma": 2, "device": "cpu"}
FINETUNE = {"data": "data/moving", "batch_size": 2, "future": [3], "horizon": 3, "device": "cpu"}
COMMON = {"steps": 4, "save_every": 2, "validate_every": 2}


def test_scripts_from_data_to_policy(workplace):
    for method in ("self_flow", "flow_matching"):
        pretrain(PretrainConfig(name=f"p_{method}", method=method, **PRETRAIN, **COMMON))
    run = finetune(FinetuneConfig(name="f", method="flow_matching", **FINETUNE, **COMMON))
    backbone = checkpoint.load("runs/p_flow_matching/checkpoint")[1]
    manifest = checkpoint.load(run / "checkpoint")[1]
    assert manifest["kind"] == "finetune" and manifest["identity"]["pretrained"] == backbone["sha256"]
    assert json.loads((run / "config.json").read_text())["steps"] == 4
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "validation/loss_video", "validation/loss_action", "validation/action_mm"} <= last.keys()
    # a newer pretraining does not change a run that has begun
    pretrain(PretrainConfig(name="newer", method="flow_matching", seed=3, **PRETRAIN, **COMMON))
    finetune(FinetuneConfig(name="f", method="flow_matching", **FINETUNE, **COMMON | {"steps": 5}))
    assert checkpoint.load(run / "checkpoint")[1]["step"] == 5
    with pytest.raises(ValueError, match="is a finetune run"):
        finetune(FinetuneConfig(name="g", pretrained="f", **FINETUNE, **COMMON))
    with pytest.raises(ValueError, match="modes: walking unknown"):
        finetune(FinetuneConfig(name="g", modes={"walking": 1.0}, **FINETUNE, **COMMON))


def test_scripts_resume_to_the_bit(workplace):
    whole, part = (pretrain(PretrainConfig(name=name, **PRETRAIN, **COMMON)) for name in ("whole", "part"))
    for path in (part / "checkpoint").glob("step_00000004*"):
        path.unlink()
    assert not same(whole, part)
    pretrain(PretrainConfig(name="part", **PRETRAIN, **COMMON))
    assert same(whole, part)
    with pytest.raises(CheckpointError, match=r"lr: 0\.001 there, 0.5 now"):
        pretrain(PretrainConfig(name="whole", lr=0.5, **PRETRAIN, **COMMON))


def test_from_scratch_says_so(workplace, capsys):
    finetune(FinetuneConfig(name="f", **FINETUNE, **COMMON | {"steps": 1}))
    assert "starting from scratch" in capsys.readouterr().out
