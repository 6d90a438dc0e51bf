"""A run that was killed, at any moment, ends as the one that was not: same losses, same weights, to the bit."""

import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from selfflow_robot import checkpoint, train
from selfflow_robot.checkpoint import CheckpointError
from selfflow_robot.processes import part_loss
from selfflow_robot.selfflow import SelfFlowConfig
from selfflow_robot.train import TrainConfig
from tests.synthetic import make_batch, make_model, make_packer

MANIFEST = {"kind": "pretrain", "method": "self_flow", "identity": {}, "config": {}}
MODES = ["pretrain", "pretrain_all", "joint_plan"]


def fit(run, steps, largest_file=None, signals=None):
    """largest_file: bytes after which the disk is full. signals {step: signals that come while it is computed}."""
    packer, config = make_packer(), TrainConfig(steps=steps, lr=1e-3, warmup=2, cooldown=0)
    state = train.new_state(make_model(packer), config)
    objective = SelfFlowConfig(mask_ratio=0.25)

    def loss_fn(student, teacher, batch, generator):
        for number in (signals or {}).get(state.step, ()):
            os.kill(os.getpid(), number)
        mode = MODES[torch.randint(3, (), generator=generator)]
        return part_loss(student, teacher, lambda: packer.pack(batch, mode), objective, generator)

    def batches(start):
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        return (make_batch(seed=step) for step in itertools.count(start))

    train.fit(Path(run), state, packer, config, MANIFEST, batches, loss_fn, lambda m: {}, 2, 5)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = ("time/", "step_s", "samples_s")
    return [{k: v for k, v in line.items() if not k.startswith(timing)} for line in lines]


def same_ending(run_a, run_b):
    assert losses(run_a) == losses(run_b)
    (a, about_a), (b, about_b) = (checkpoint.load(run / "checkpoint") for run in (run_a, run_b))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {key.split(".")[0] for key in a} == {"model", "ema", "packer", "optimizer"}
    assert about_a["sha256"] == about_b["sha256"]


def newest(run):
    steps = checkpoint.saved(run / "checkpoint")
    return int(steps[-1].stem.split("_")[1]) if steps else 0


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """kill -9 while it starts, computes, or writes, wherever the moment falls."""
    seed = random.randrange(2**32)
    print("moments of seed", seed)
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # a process per run, which has imported everything
    context.set_forkserver_preload(["tests.test_resume"])
    steps, killed = 120, []
    for _ in range(10):
        before, run = newest(tmp_path / "killed"), str(tmp_path / "killed")
        process = context.Process(target=fit, args=(run, steps))
        process.start()
        soon = moments.random() < 0.2  # at once, while it starts; else after something new was saved
        while not soon and newest(tmp_path / "killed") == before and process.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -9
        killed.append(newest(tmp_path / "killed"))
    print("steps saved at the kills:", killed)
    assert 0 < killed[-1] < steps and len(set(killed)) > 2
    for run in ("killed", "whole"):
        process = context.Process(target=fit, args=(str(tmp_path / run), steps))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert newest(tmp_path / "killed") == steps
    same_ending(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_the_step_it_is_in(tmp_path, number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", 8, signals={4: [number]})
    assert newest(tmp_path / "run") == 5  # while the fifth was computed; regular saves are of even steps
    assert "Stopping: this step is finished and saved first" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    fit(tmp_path / "run", 8)
    fit(tmp_path / "whole", 8)
    same_ending(tmp_path / "run", tmp_path / "whole")


def test_an_interrupt_that_ended_its_reader_too_is_saved(tmp_path, monkeypatch):
    """As in `... 2>&1 | tee log`, where the same Ctrl-C ends tee."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", 8, signals={4: [signal.SIGINT]})
    assert newest(tmp_path / "run") == 5


def test_a_second_interrupt_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", 8, signals={4: [signal.SIGTERM, signal.SIGINT]})
    assert newest(tmp_path / "run") == 4


def test_an_interrupt_in_the_last_step_changes_nothing(tmp_path):
    fit(tmp_path / "run", 3, signals={2: [signal.SIGINT]})
    assert newest(tmp_path / "run") == 3


def test_what_is_told_to_ignore_interrupts_does(tmp_path):
    """As a shell's background job; and a thread cannot listen at all."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(tmp_path / "run", 6, signals={4: [signal.SIGINT]})
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=fit, args=(tmp_path / "thread", 2))
    thread.start()
    thread.join()
    assert newest(tmp_path / "run") == 6 and newest(tmp_path / "thread") == 2


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path):
    """The kernel refuses the checkpoint half way; with room again, the same command goes on from the one before."""
    run, whole = tmp_path / "full", tmp_path / "whole"
    fit(run, 4)
    size = (run / "checkpoint" / "step_00000004.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"step_00000006\.safetensors cannot be written .* make room"):
            fit(run, 8, largest_file=size // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name for path in (run / "checkpoint").iterdir())
    assert names == ["README.md"] + [f"step_0000000{k}.{kind}" for k in (2, 4) for kind in ("json", "safetensors")]
    fit(run, 8)
    fit(whole, 8)
    same_ending(run, whole)
