import contextlib
import itertools
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.finetune import finetune
from experiments.pretrain import pretrain
from selfflow_robot import checkpoint, model, train
from selfflow_robot.checkpoint import CheckpointError
from selfflow_robot.config import FinetuneConfig, PretrainConfig
from selfflow_robot.processes import ALONE, part_loss
from selfflow_robot.selfflow import METHODS, SelfFlowConfig, loss, objective
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


def seeded(seed):
    return make_batch(seed=seed)


def uneven(seed):
    """Four windows that count different numbers of frames and actions."""
    batch = make_batch(4, seed)
    batch["video_mask"][1:3, -1] = False
    batch["action_mask"][0, 1:] = False
    batch["action_mask"][3] = False
    return batch


def objective_of_all_modes(packer, known=None):
    def pack(batch, mode):
        return replace(packer.pack(batch, mode), kept=torch.arange(len(batch["proprio"]))[:, None] % 2 == 0)

    def loss_fn(student, teacher, batch, generator):
        mode = ["joint_plan", "policy", "pretrain_all"][torch.randint(3, (), generator=generator)]
        config = SelfFlowConfig(mask_ratio=0.25, given_noise=0.2, draws=2 if mode == "policy" else 1)
        return part_loss(student, teacher, lambda: pack(batch, mode), config, generator, known=known)

    return loss_fn


def video_and_action(metrics):
    return [metrics.get(name, 0.0) for name in ("loss_video", "loss_action", "cosine")]


def state_of():
    return train.new_state(make_model(make_packer()), CONFIG)


def same(run_a, run_b):
    a, b = (checkpoint.load(run / "checkpoint")[0] for run in (run_a, run_b))
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    fit(tmp_path / "whole", config)
    for stop in (2, 3, 5):  # before, at and after the first save
        run = tmp_path / f"stopped_{stop}"
        with pytest.raises(KeyboardInterrupt):
            fit(run, config, stop=stop)
        fit(run, config)
        assert same(tmp_path / "whole", run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # no line twice
        assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
        assert [line["step"] for line in lines if "validation/x" in line] == [3, 6]
    fit(tmp_path / "other", replace(config, seed=1))
    assert not same(tmp_path / "whole", tmp_path / "other")


def test_compiling_without_a_compiler_names_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model(make_packer())
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler: install g\+\+"):
        train.begin(PretrainConfig(compile=True), model, ALONE)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler: install g\+\+"):
        model.for_inference(torch.device("cpu"), compiled=True)


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


def test_muon_turns_the_blocks_matrices_and_nothing_else():
    """Its steps are orthogonal matrices times 0.2 sqrt(the longer side), the size of AdamW's."""
    packer, config = make_packer(), replace(CONFIG, optimizer="muon", weight_decay=0.0)
    state = train.new_state(make_model(packer), config)
    weight, bias = state.model.blocks[0].up.weight, state.model.blocks[0].up.bias
    before = weight.detach().clone()
    tokens, generator = packer.pack(make_batch(), "joint_plan"), torch.Generator().manual_seed(0)
    loss(state.model, state.teacher, tokens, SelfFlowConfig(), generator)[0].backward()
    muon, adamw = state.optimizers
    muon.step()
    step = (weight - before).detach() / (config.lr * 0.2 * max(weight.shape) ** 0.5)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.3 and singular.max() < 1.3  # five iterations get so far
    owners = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert id(weight) in owners[0] and id(bias) in owners[1]
    assert sorted(owners[0] + owners[1]) == sorted(map(id, state.model.parameters()))
    with pytest.raises(ValueError, match="choose adamw or muon"):
        replace(CONFIG, optimizer="sgd")


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
    plain = objective("flow_matching")
    losses = [
        metrics["loss"]
        for _, metrics in train.train(
            state,
            itertools.repeat(make_batch()),
            lambda m, e, b, g: loss(m, e, tokens, plain, g),
            TrainConfig(steps=150, lr=3e-3, warmup=5),
        )
    ]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def poisoned(packer, at, value=float("nan")):
    """A loss function that is not finite at one step."""
    steps = itertools.count()

    def loss_fn(student, teacher, batch, generator):
        total, terms = loss(student, teacher, packer.pack(batch, "policy"), SelfFlowConfig(), generator)
        return total * (value if next(steps) == at else 1.0), terms

    return loss_fn


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(tmp_path, value):
    packer = make_packer()
    state = train.new_state(make_model(packer), CONFIG)
    arguments = (MANIFEST, lambda start: map(seeded, itertools.count(start)), poisoned(packer, 4, value))
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf).* at step 4: lower the learning rate"):
        train.fit(tmp_path, state, packer, CONFIG, *arguments, lambda m: {}, 2, 3)
    assert all(p.isfinite().all() for p in state.model.parameters())
    assert checkpoint.load(tmp_path / "checkpoint")[1]["step"] == 4  # the same command tries again from here
    kept = load_file(tmp_path / "nonfinite" / "step_00000004_part_0_of_1.safetensors")
    batch = make_batch(seed=4)
    assert all(torch.equal(kept[name], value) for name, value in batch.items() if name != "instruction")
    about = json.loads((tmp_path / "nonfinite" / "step_00000004_part_0_of_1.json").read_text())
    assert about["batch"]["instruction"] == batch["instruction"] and about["seed"] == 0 and about["step"] == 4


def test_a_skipped_step_is_counted_and_changes_no_weight(tmp_path):
    packer, config = make_packer(), replace(CONFIG, nonfinite="skip")
    state, seen = train.new_state(make_model(packer), config), []

    def validate(model):
        weights = [
            *state.model.parameters(),
            *model.parameters(),
            *(s["exp_avg"] for optimizer in state.optimizers for s in optimizer.state.values()),
        ]
        seen.append([w.detach().clone() for w in weights])
        return {}

    arguments = (MANIFEST, lambda start: map(seeded, itertools.count(start)), poisoned(packer, 3))
    train.fit(tmp_path, state, packer, config, *arguments, validate, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, None, None, 1, 1, 1]
    assert lines[3]["loss"] is None and lines[4]["loss"] > 0  # null: JSON has no NaN
    assert checkpoint.load(tmp_path / "checkpoint")[1]["skipped"] == 1
    with pytest.raises(ValueError, match="choose stop or skip"):
        TrainConfig(nonfinite="ignore")


@pytest.mark.parametrize("known", [False, True])
def test_micro_batches_take_the_same_steps(tmp_path, monkeypatch, known):
    """Gradients of parts add up to those of the whole, also where the parts count different numbers of tokens."""
    monkeypatch.setattr(train, "precision", lambda device: contextlib.nullcontext())
    losses = {}
    for micro_batch in (0, 4, 2, 1):
        packer, config = make_packer(), replace(CONFIG, micro_batch=micro_batch, steps=4)
        state = train.new_state(make_model(packer), config)
        loss_fn = objective_of_all_modes(packer, make_model(packer, seed=1) if known else None)
        loop = train.train(state, map(uneven, itertools.count()), loss_fn, config)
        losses[micro_batch] = torch.tensor([[m["loss"], m["grad_norm"], *video_and_action(m)] for _, m in loop])
    for micro_batch in (4, 2, 1):
        torch.testing.assert_close(losses[micro_batch], losses[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match=r"micro_batch 3 does not divide a process's 4 windows"):
        next(train.train(state_of(), map(uneven, itertools.count()), loss_fn, replace(CONFIG, micro_batch=3)))


def test_the_next_batch_is_read_ahead_in_order():
    read = []

    def source():
        for number in range(4):
            read.append(number)
            yield {"index": number}

    batches = train.ahead(source())
    assert next(batches)["index"] == 0
    assert [batch["index"] for batch in batches] == [1, 2, 3] and read == [0, 1, 2, 3]


def test_what_is_logged(tmp_path):
    packer = make_packer()
    state = train.new_state(make_model(packer), CONFIG)
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    arguments = (
        MANIFEST,
        lambda start: map(seeded, itertools.count(start)),
        poisoned(packer, None),
        lambda m: {},
        6,
        6,
    )
    train.fit(
        tmp_path,
        state,
        packer,
        CONFIG,
        *arguments,
        "disabled",
        lambda m: frames,
        4,
        flops_per_step=1e9,
        peak_flops=1e12,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        parts = [line[f"time/{name}_s"] for name in ("data", "forward_backward", "optimizer", "ema")]
        assert line["step_s"] == pytest.approx(sum(parts)) and line["samples_s"] == pytest.approx(2 / line["step_s"])
        assert line["mfu"] == pytest.approx(1e-3 / line["step_s"])
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000004.mp4", "step_00000006.mp4"]
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: selfflow_robot") and "| steps of training | 6 |" in card


def test_wandb_gets_what_the_file_gets(tmp_path, monkeypatch):
    started, logged = {}, []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: started.clear())
    fake = types.SimpleNamespace(
        init=lambda **settings: started.update(settings) or run, Video=lambda path, format: path
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with train.Reporter(tmp_path / "mine", 2, 0, "offline") as report:
        assert started["mode"] == "offline" and started["id"] == "mine" and started["resume"] == "allow"
        report(1, {"loss": 2.0})
        report.video(1, np.zeros((2, 32, 32, 3), np.uint8))
    assert logged == [(1, {"loss": 2.0}), (1, {"samples": str(tmp_path / "mine" / "samples" / "step_00000001.mp4")})]
    assert not started  # finished
    with train.Reporter(tmp_path / "silent", 2, 0, "offline", writes=False) as report:  # not the main process
        report(1, {"loss": 2.0})
    assert not (tmp_path / "silent").exists() and not started


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
    with pytest.raises(ValueError, match="method 'flow': choose one of self_flow, flow_matching"):
        finetune(FinetuneConfig(name="g", method="flow", **FINETUNE, **COMMON))
    with pytest.raises(ValueError, match="modes: walking unknown"):
        finetune(FinetuneConfig(name="g", modes={"walking": 1.0}, **FINETUNE, **COMMON))


def test_a_policy_goes_on_with_other_data(workplace):
    """It keeps its scales, so that its numbers mean what they meant."""
    first = finetune(FinetuneConfig(name="f", pretrained="none", **FINETUNE, **COMMON))
    write_dataset(Path("data/more"), episodes=6, length=15)
    other = FINETUNE | {"data": "data/more"}
    second = finetune(FinetuneConfig(name="g", pretrained="f", lr=0.0, **other, **COMMON | {"steps": 1}))
    (old, old_packer, manifest), (new, packer, _) = map(checkpoint.load_model, (first, second))
    assert all(torch.equal(a, b) for a, b in zip(packer.buffers(), old_packer.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters()))  # at a learning rate of 0
    assert checkpoint.load(second / "checkpoint")[1]["identity"]["pretrained"] == manifest["sha256"]
    with pytest.raises(ValueError, match=r"f was trained on windows of .*horizon=3.* not .*horizon=2"):
        finetune(FinetuneConfig(name="h", pretrained="f", **other | {"horizon": 2}, **COMMON))


def test_a_policy_goes_on_as_a_larger_network(workplace, monkeypatch):
    larger = replace(SMALL, depth=5, width=64, heads=4)
    monkeypatch.setitem(model.PRESETS, "small", larger)
    first = finetune(FinetuneConfig(name="f", pretrained="none", **FINETUNE, **COMMON))
    how = dict(name="g", pretrained="f", model="small", lr=0.0, **FINETUNE)
    with pytest.raises(ValueError, match="f is not of preset small: give --model, or --grow true"):
        finetune(FinetuneConfig(**how, **COMMON))
    with pytest.raises(ValueError, match=r"--grow true needs a smaller network .*--pretrained"):
        finetune(FinetuneConfig(**how | {"pretrained": "none"}, grow=True, **COMMON))
    second = finetune(FinetuneConfig(**how, grow=True, **COMMON))
    assert checkpoint.load_model(second)[0].config == larger
    lines = [(run / "metrics.jsonl").read_text().splitlines()[-1] for run in (first, second)]
    acting, larger_acting = (json.loads(line)["validation/action_mm"] for line in lines)
    assert larger_acting == pytest.approx(acting, rel=1e-3)  # at a learning rate of 0 it acts as before
    finetune(FinetuneConfig(**how, grow=True, **COMMON | {"steps": 5}))
    finetune(FinetuneConfig(**how | {"pretrained": None}, **COMMON | {"steps": 6}))  # what it began as is known
    assert checkpoint.load(second / "checkpoint")[1]["step"] == 6


def test_a_policy_keeps_what_it_does_where_it_is_asked_to(workplace, monkeypatch):
    """At its first step nothing is to be learned there, whatever the labels say, also as a larger network."""
    monkeypatch.setitem(model.PRESETS, "small", replace(SMALL, depth=5, width=64, heads=4))
    finetune(FinetuneConfig(name="f", pretrained="none", **FINETUNE, **COMMON))
    pretrain(PretrainConfig(name="p", **PRETRAIN, **COMMON))
    how = dict(pretrained="f", model="small", grow=True, **FINETUNE | {"batch_size": 16})
    losses = {}
    for name, keep in (("none", []), ("some", ["op"]), ("all", ["op", "place"])):
        run = finetune(FinetuneConfig(name=name, keep=keep, **how, **COMMON))
        losses[name] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["all"] < 1e-3 * losses["none"] and 0.2 < losses["some"] / losses["none"] < 0.8
    part = finetune(FinetuneConfig(name="part", keep=["op"], **how, **COMMON | {"steps": 2, "cooldown": 0.0}))
    whole = finetune(FinetuneConfig(name="whole", keep=["op"], **how, **COMMON | {"cooldown": 0.0}))
    assert not same(whole, part)
    finetune(FinetuneConfig(name="part", keep=["op"], **how, **COMMON | {"cooldown": 0.0}))
    assert same(whole, part)  # continued, it has what was known again
    card = (checkpoint.export(whole, Path("exported")) / "README.md").read_text()
    assert "| as before, not by labels | op ... |" in card
    with pytest.raises(ValueError, match=r"keep walk: no instruction of data/moving begins so; it has open, place"):
        finetune(FinetuneConfig(name="g", keep=["op", "walk"], **how, **COMMON))
    for pretrained in (None, "none", "p"):
        with pytest.raises(ValueError, match="--keep is of what a policy does already: name it with --pretrained"):
            finetune(FinetuneConfig(name="g", keep=["op"], pretrained=pretrained, **FINETUNE, **COMMON))


def test_scripts_resume_to_the_bit(workplace):
    whole, part = (pretrain(PretrainConfig(name=name, **PRETRAIN, **COMMON)) for name in ("whole", "part"))
    for path in (part / "checkpoint").glob("step_00000004*"):
        path.unlink()
    assert not same(whole, part)
    pretrain(PretrainConfig(name="part", **PRETRAIN, **COMMON))
    assert same(whole, part)
    with pytest.raises(CheckpointError, match=r"lr: 0\.001 there, 0.5 now"):
        pretrain(PretrainConfig(name="whole", lr=0.5, **PRETRAIN, **COMMON))


def test_zero_is_once_at_the_end(workplace):
    run = pretrain(PretrainConfig(name="p", **PRETRAIN, steps=3, save_every=0, validate_every=0))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/loss_video" in line] == [3]
    assert checkpoint.load(run / "checkpoint")[1]["step"] == 3


def test_from_scratch_says_so(workplace, capsys):
    finetune(FinetuneConfig(name="f", **FINETUNE, **COMMON | {"steps": 1}))
    assert "starting from scratch" in capsys.readouterr().out


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("self_flow", "flow_matching")])
def test_every_method_trains_switches_off_and_is_fine_tuned(workplace, method):
    settings = PRETRAIN | COMMON | {"switch_off": 3}
    if method == "repa":
        pytest.importorskip("transformers")
        from transformers import Dinov2Config, Dinov2Model

        tiny = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, patch_size=14, image_size=28)
        Dinov2Model(tiny).save_pretrained("dino")
        settings["encoder"] = "dino"
    run = pretrain(PretrainConfig(name=method, method=method, **settings))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    features = objective(method).features != "none"
    assert ["cosine" in line for line in lines] == [features] * 3 + [False]
    finetune(FinetuneConfig(name="f", pretrained=method, **FINETUNE, **COMMON | {"steps": 1}))
