"""Two processes on the CPU (gloo) take the steps that one takes, and continue each other's runs.

This file is also the script that the processes run: python tests/test_distributed.py '[{"run": ..., "steps": 4}, ...]'.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfflow_robot import checkpoint, data, model, processes, train
from selfflow_robot.processes import Processes, part_loss
from selfflow_robot.selfflow import SelfFlowConfig
from selfflow_robot.train import TrainConfig
from tests.synthetic import SMALL, make_batch, make_model, make_packer, write_dataset

ROOT = Path(__file__).resolve().parent.parent
MODES = ["joint_plan", "policy", "pretrain_all"]


class Uneven:
    """Windows that count different numbers of frames and actions."""

    def __len__(self):
        return 32

    def gather(self, indices):
        rows = [make_batch(1, int(index)) for index in indices]
        batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0] if k != "instruction"}
        for row, index in enumerate(indices):
            batch["video_mask"][row, -1] = bool(index % 3)
            batch["action_mask"][row, index % 4 :] = False
        return batch | {"instruction": [r["instruction"][0] for r in rows]}


def fit(run, steps=4, sharding="ddp", micro_batch=0, nan_at=None, nonfinite="stop"):
    """Batches of four windows, all modes; float32, so that the order of sums is the only difference."""
    team = processes.join("cpu", sharding)
    config = TrainConfig(steps=steps, lr=1e-3, warmup=2, cooldown=0, micro_batch=micro_batch, nonfinite=nonfinite)
    packer = make_packer()
    state = train.new_state(make_model(packer), config, team)

    def loss_fn(student, teacher, batch, generator):
        mode = MODES[torch.randint(3, (), generator=generator)]
        objective = SelfFlowConfig(mask_ratio=0.25, given_noise=0.2, draws=2 if mode == "policy" else 1)
        total, terms = part_loss(student, teacher, lambda: packer.pack(batch, mode), objective, generator)
        poison = state.step == nan_at and team.index == team.count - 1  # in one process only
        return total * (float("nan") if poison else 1.0), terms

    def validate(model):
        with torch.no_grad():
            batch = packer.pack(make_batch(2, 99), "joint_plan")
            t = torch.full(batch.x.shape[:2], 0.5)
            return {"validation/x": model(batch.x, t, batch)[0].square().mean().item()}

    train.fit(
        Path(run), state, packer, config, {"kind": "pretrain", "method": "self_flow", "identity": {}, "config": {}},
        lambda step: data.batches(team.part(Uneven()), 4, 0, step), loss_fn, validate, 2, 2,
    )  # fmt: skip


def pretrain(folder, **settings):
    """The script, on the data set moving/ in `folder`."""
    from experiments import pretrain as script
    from selfflow_robot.config import PretrainConfig

    os.chdir(folder)
    common = {"data": "moving", "batch_size": 4, "future": [1, 2], "luma": 4, "chroma": 2, "device": "cpu", "steps": 3}
    script.pretrain(PretrainConfig(**common, save_every=3, validate_every=3, sample_every=3, **settings))


def run_jobs(jobs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "precision", lambda device: contextlib.nullcontext())
        patch.setitem(model.PRESETS, "tiny", SMALL)
        patch.chdir(Path.cwd())  # as it was, at the end
        for job in jobs:
            pretrain(**job) if "folder" in job else fit(**job)


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "loss_video", "loss_action", "cosine", "validation/x")
    return torch.tensor([[line["step"], *(line.get(name, 0.0) for name in names)] for line in lines])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every job that needs two processes, in one start of them; and the same alone."""
    folder = tmp_path_factory.mktemp("runs")
    names = ["alone", "ddp", "micro", "fsdp", "skip", "one_two_one", "one_fsdp_one"]
    runs = {name: folder / name for name in names}
    mixed = [str(runs[name]) for name in ("one_two_one", "one_fsdp_one")]
    run_jobs([{"run": str(runs["alone"])}] + [{"run": run, "steps": 2} for run in mixed])
    write_dataset(folder / "moving")
    script = {"folder": str(folder)}
    run_jobs([script | {"name": "script_alone"}])
    jobs = [
        script | {"name": "script_two"},
        {"run": str(runs["ddp"])},
        {"run": str(runs["micro"]), "micro_batch": 1},
        {"run": str(runs["fsdp"]), "sharding": "fsdp"},
        {"run": str(runs["skip"]), "nan_at": 2, "nonfinite": "skip"},
        {"run": mixed[0], "steps": 4},
        {"run": mixed[1], "steps": 4, "sharding": "fsdp"},
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command.append(json.dumps(jobs))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    run_jobs([{"run": run, "steps": 6} for run in mixed])
    run_jobs([{"run": str(runs["alone"]), "steps": 6}])
    return runs | {name: folder / "runs" / name for name in ("script_alone", "script_two")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "micro", "fsdp"])
def test_two_processes_give_the_curve_of_one(runs, name):
    torch.testing.assert_close(curve(runs[name]), curve(runs["alone"])[:4], rtol=0, atol=1e-5)
    manifest = checkpoint.load(runs[name] / "checkpoint")[1]
    assert manifest["processes"] == 2 and manifest["step"] == 4


@pytest.mark.slow
def test_the_script_in_two_processes_gives_its_curve_in_one(runs):
    torch.testing.assert_close(curve(runs["script_two"]), curve(runs["script_alone"]), rtol=0, atol=1e-5)
    assert [path.name for path in (runs["script_two"] / "samples").iterdir()] == ["step_00000003.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_two_one", "one_fsdp_one"])
def test_a_run_continues_in_another_number_of_processes(runs, name):
    torch.testing.assert_close(curve(runs[name]), curve(runs["alone"]), rtol=0, atol=1e-5)
    a, b = (checkpoint.load(runs[n] / "checkpoint")[0] for n in (name, "alone"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_in_all(runs):
    lines = [json.loads(line) for line in (runs["skip"] / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, None, 1, 1] and lines[3]["loss"] > 0
    assert len(list((runs["skip"] / "nonfinite").glob("*.safetensors"))) == 2


def test_parts_of_a_batch():
    windows = Uneven()
    whole = windows.gather(range(4))
    parts = [Processes(k, 2).part(windows).gather(range(4)) for k in range(2)]
    for name, value in whole.items():
        if name != "instruction":
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
    assert len(Processes(1, 2).part(windows)) == 32
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided among 3 processes"):
        Processes(0, 3).part(windows).gather(range(4))


def test_alone_without_a_launcher():
    assert processes.join("cpu").count == 1 and processes.join("cpu").main
    with pytest.raises(ValueError, match="choose one of ddp, fsdp"):
        processes.join("cpu", "zero")


if __name__ == "__main__":
    run_jobs(json.loads(sys.argv[1]))
