"""Evaluation: what results.json says, resuming, mixing refused. A fake world; one episode in the real one."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
from fakes import LIMIT, InlineWorkers, LineEnv, LineExpert

from envs.rollout import Demonstrator, HoldStill
from envs.tasks import get_task
from experiments.eval_simpler import (
    alarm_quality,
    changed_settings,
    checkpoint_policy,
    count_starts,
    evaluate,
    identify,
    run_episode,
    start_evaluating,
    typed,
    where_it_fails,
)
from policies import judge
from policies.chunking import ChunkedPolicy
from policies.realtime import RealTimePolicy
from selfflow_robot import checkpoint
from selfflow_robot.config import EvalConfig
from selfflow_robot.metrics import wilson_interval
from tests.synthetic import LAYOUT, save_run

FATAL = 13  # a seed whose first attempt kills its worker


def start(cfg, identity, folder):
    env = LineEnv(width=cfg.width, height=cfg.height)
    policies = {
        "expert": lambda seed: Demonstrator(LineExpert(env), np.random.default_rng(seed)),
        "hold": lambda seed: HoldStill(),
        "checkpoint": lambda seed: HoldStill(),
    }
    work = partial(run_episode, env, policies[cfg.policy], cfg, folder)

    def fatal_once(seed):
        with open("tried.txt", "a") as file:
            file.write(f"{seed}\n")
        if seed == FATAL and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(seed)

    return fatal_once


def config(**kwargs):
    line = {"policy": "expert", "name": "line", "width": 32, "height": 16, "first_seed": 10, "episodes": 5}
    return EvalConfig(**{**line, "workers": 1, "video": False, **kwargs})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr("experiments.eval_simpler.Workers", InlineWorkers)


def tried(folder) -> list[int]:
    seeds = [int(line) for line in (folder / "tried.txt").read_text().split()]
    (folder / "tried.txt").unlink()
    return seeds


def test_results_whatever_crashes(folder, capsys):
    results = evaluate(config(workers=2), start)
    assert json.loads((folder / "runs/line/results.json").read_text()) == results
    assert [e["seed"] for e in results["episodes"]] == [10, 11, 12, 13, 14]
    assert [e["success_final"] for e in results["episodes"]] == [True, True, True, True, False]  # 14 fails by design
    assert all(e["steps"] == LIMIT and e["subgoals"]["drawer_opened"] for e in results["episodes"])
    assert sorted(tried(folder)) == [10, 11, 12, 13, 13, 14]
    low, high = wilson_interval(4, 5)
    assert results["summary"]["success_final"] == {"k": 4, "n": 5, "rate": 0.8, "low": low, "high": high}
    assert results["protocol"]["seeds"] == {"first": 10, "count": 5}
    out = capsys.readouterr().out
    assert "4/5" in out and "80.0%" in out and results["protocol_hash"] in out


def test_the_same_command_runs_only_what_is_missing(folder, inline):
    first = evaluate(config(episodes=3), start)
    tried(folder)
    (folder / "runs/line/episodes/seed_000011.json").write_text("{")  # damaged: counts as missing
    second = evaluate(config(episodes=3), start)
    assert tried(folder) == [11]
    assert [e["success_final"] for e in second["episodes"]] == [e["success_final"] for e in first["episodes"]]
    evaluate(config(first_seed=9, episodes=3), start)  # other seeds of the same measurement are welcome
    assert tried(folder) == [9]
    evaluate(config(episodes=2, resume=False), start)
    assert tried(folder) == [10, 11]
    assert not (folder / "runs/line/episodes/seed_000012.json").exists()


@pytest.mark.parametrize("other", [{"policy": "hold"}, {"width": 64}, {"task": "open_top_drawer"}])
def test_another_measurement_under_the_same_name_is_refused(folder, inline, other):
    evaluate(config(episodes=1), start)
    before = (folder / "runs/line/results.json").read_bytes()
    with pytest.raises(ValueError, match=r"measured another .*--name.*--resume false"):
        evaluate(config(episodes=1, **other), start)
    assert (folder / "runs/line/results.json").read_bytes() == before
    assert evaluate(config(episodes=1, resume=False, **other), start)["episodes"]


def save_checkpoint(run: str, value: float, kind="finetune"):
    import torch

    checkpoint.save(f"runs/{run}/checkpoint", 1, {"ema.w": torch.full((2,), value)}, {"kind": kind})


def test_a_checkpoint_is_known_by_its_content(folder, inline):
    save_checkpoint("a", 1.0)
    newest = evaluate(config(policy="checkpoint", episodes=1), start)
    assert newest["checkpoint"] == "runs/a"
    assert newest["policy_settings"] == {"execute": 2, "sample_steps": 4, "temperature": 0.0}
    save_checkpoint("b", 1.0)  # the same tensors elsewhere are the same policy
    evaluate(config(policy="checkpoint", checkpoint="b", episodes=1), start)
    assert tried(folder) == [10]
    save_checkpoint("a", 2.0)
    with pytest.raises(ValueError, match="another checkpoint_hash"):
        evaluate(config(policy="checkpoint", checkpoint="runs/a", episodes=1), start)
    with pytest.raises(ValueError, match="another policy_settings"):
        evaluate(config(policy="checkpoint", checkpoint="b", execute=4, episodes=1), start)


def test_what_cannot_be_evaluated_says_why(folder, inline, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", folder / "nothing")
    with pytest.raises(ValueError, match="unknown task 'fridge'; known: open_and_place"):
        evaluate(config(task="fridge"), start)
    with pytest.raises(ValueError, match="unknown policy 'random'; known: checkpoint, expert, hold"):
        evaluate(config(policy="random"), start)
    for unused in (
        {"policy": "hold", "checkpoint": "x"},
        {"policy": "expert", "execute": 4},
        {"policy": "checkpoint", "server": "gpu:8000"},
        {"policy": "remote", "server": "gpu:8000", "delay": 2},
        {"policy": "checkpoint", "committed": False},
    ):
        with pytest.raises(ValueError, match=f"--{list(unused)[-1]} .*changes nothing"):
            evaluate(EvalConfig(**unused))
    for wrong in ({"policy": "expert"}, {"policy": "hold", "protocol": "variant_aggregation"}):
        with pytest.raises(ValueError, match="not with --simulator upstream"):
            evaluate(EvalConfig(simulator="upstream", **wrong))
    for name, value in (("shader", "rt"), ("physics", "tgs")):
        with pytest.raises(ValueError, match=f"{name} {value}: upstream has its own, leave --{name} out"):
            evaluate(EvalConfig(simulator="upstream", **{name: value}, policy="hold"))
    with pytest.raises(ValueError, match=r"python experiments/finetune\.py"):
        evaluate(config(policy="checkpoint"), start)
    with pytest.raises(ValueError, match="no checkpoint at nowhere"):
        evaluate(config(policy="checkpoint", checkpoint="nowhere"), start)
    save_checkpoint("backbone", 1.0, kind="pretrain")
    with pytest.raises(ValueError, match=r"backbone.*--pretrained backbone"):
        evaluate(config(policy="checkpoint", checkpoint="backbone"), start)


def test_a_command_names_no_folder_of_this_machine():
    script = Path(__file__).resolve().parent.parent / "experiments" / "eval_simpler.py"
    told = typed(["/usr/bin/python3", str(script), "--name", "two words"])
    assert told == "python experiments/eval_simpler.py --name 'two words'"


def test_what_cannot_be_compared_with_published_rates_is_said_first(folder, monkeypatch, capsys):
    class Begun(Exception):
        pass

    monkeypatch.setattr("experiments.eval_simpler.Workers", Mock(side_effect=Begun))
    tasks = {"move_near": True, "move_near_v0": False, "open_top_drawer": True, "close_drawer": False}
    for task, said in tasks.items():
        with pytest.raises(Begun):
            evaluate(config(task=task, protocol="visual_matching", name=task), start)
        assert (f"No rate was published for {task}, only for pick_coke_can" in capsys.readouterr().out) == said
    with pytest.raises(Begun):
        evaluate(config(task="move_near", name="random"), start)
    assert "published" not in capsys.readouterr().out


def test_videos_show_every_step_and_the_outcome(folder):
    run_episode(LineEnv(), lambda seed: HoldStill(), config(video=True), str(folder), 3)
    record = json.loads((folder / "episodes/seed_000003.json").read_text())
    with av.open(str(folder / record["video"])) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert len(frames) == LIMIT + 6
    red = frames[-1][-3, 3].astype(int)  # the bar of a failure
    assert red[0] > red[1] + 60 and red[0] > red[2] + 60
    grey = frames[0][-3, 3].astype(int)
    assert np.ptp(grey) < 20


def test_failures_are_counted_by_where_they_began(folder, inline, capsys):
    begun = [("top", "a0", True), ("bottom", "a2", False), ("top", "a2", False), ("bottom", "a2", False)]
    episodes = [
        {"start": {"model": "apple", "drawer": d, "pose": p, "object_xy": [k, 0]}, "success_final": success}
        for k, (d, p, success) in enumerate([*begun, ("bottom", "a2", True)])
    ]
    assert where_it_fails(episodes) == [("bottom a2", 2, 3), ("top a2", 1, 1)]
    numbered = [{"start": {"episode_id": k % 2}, "success_final": k > 0} for k in range(4)]
    assert where_it_fails(numbered) == [("episode id 0", 1, 2)]
    assert where_it_fails(episodes[1:2]) == []  # one kind of start: nothing to tell apart
    assert where_it_fails([]) == where_it_fails([{"success_final": False}]) == []  # as old records are
    results = evaluate(config(task="open_top_drawer", policy="hold", first_seed=10000, episodes=20), start)
    kinds = where_it_fails(results["episodes"])
    assert len(kinds) == 7 and sum(k for _, k, _ in kinds) == 20
    assert f"fails at the last step from: {kinds[0][0]} {kinds[0][1]} of {kinds[0][2]}, " in capsys.readouterr().out


def test_episodes_say_where_they_begin(folder, inline, capsys):
    drawers = evaluate(config(task="open_top_drawer", first_seed=10000, episodes=20), start)
    assert drawers["episodes"][0]["start"] == {"drawer": "top", "pose": get_task("open_top_drawer").draw(10000)["pose"]}
    assert len({get_task("open_top_drawer").draw(seed)["pose"] for seed in range(10000, 10020)}) == 7
    assert drawers["starts"] == 7 and "20 episodes from 7 different starts" in capsys.readouterr().out
    apples = evaluate(config(name="apples", first_seed=20, episodes=20), start)
    assert apples["starts"] == 20 and "different starts" not in capsys.readouterr().out
    wide = evaluate(config(name="wide", task="open_top_drawer", first_seed=10000, episodes=20, margin=0.05), start)
    assert wide["starts"] == 20 and wide["protocol_hash"] != drawers["protocol_hash"]
    assert [len(e["start"]["robot_xy"]) for e in wide["episodes"]] == [2] * 20
    with pytest.raises(ValueError, match="measured another protocol"):
        evaluate(config(task="open_top_drawer", first_seed=10000, margin=0.05), start)
    assert count_starts([{"seed": 1}, drawers["episodes"][0]]) is None  # measured before episodes said it


@pytest.mark.sim
def test_one_real_episode(folder):
    cfg = config(task="open_top_drawer", width=64, height=48, video=True, policy="expert", margin=0.05)
    record = start_evaluating(cfg, {}, "runs/line")(11)
    assert record["steps"] == 113 and record["success_any"] and set(record["subgoals"]) == {"drawer_opened"}
    results = evaluate(EvalConfig(**{**vars(cfg), "first_seed": 11, "episodes": 1}), start)
    assert results["episodes"] == [record]  # found, not run again


def test_settings_make_the_policy(tmp_path):
    """Each setting arrives where it acts, and only what is not the default goes into the record."""
    run = str(save_run(tmp_path))
    plain, alarm = checkpoint_policy(EvalConfig(), run)
    assert isinstance(plain, ChunkedPolicy) and alarm is None and changed_settings(EvalConfig()) == {}
    changed = dict(delay=1, committed=False, imagination=0.5, cached=False, alarm_every=4)
    cfg = EvalConfig(execute=2, sample_steps=3, temperature=0.5, **changed)
    holding, alarm = checkpoint_policy(cfg, run)
    realtime, planner = holding.policy, alarm.planner
    assert isinstance(realtime, RealTimePolicy) and realtime.planner is alarm and alarm.every == 4
    assert (realtime.delay, realtime.committed, realtime.threaded) == (1, False, False)
    assert (planner.steps, planner.temperature, planner.imagination, planner.cached) == (3, 0.5, 0.5, False)
    assert changed_settings(cfg) == changed
    with pytest.raises(ValueError, match=r"no judge. Make it"):
        checkpoint_policy(EvalConfig(samples=2), run)


def test_a_policy_with_a_delay_outlives_a_change_of_instruction(tmp_path, folder):
    """Its running chunk is cut there while the next is still being made: the robot holds still, and the record says
    for how long."""
    run = str(save_run(tmp_path, replace(LAYOUT, horizon=8)))
    env = LineEnv(width=48, height=32)
    env.task = get_task("open_and_place")
    held = []
    for execute, delay in ((2, 1), (1, 3), (2, 2), (2, 3), (2, 4), (4, 4)):
        cfg = EvalConfig(execute=execute, sample_steps=1, delay=delay, video=False)
        policy, _ = checkpoint_policy(cfg, run)
        record = run_episode(env, lambda seed, policy=policy: policy, cfg, "runs/held", 10000)
        assert record["steps"] == LIMIT
        held.append(record["held"])
        policy.policy.close()
    assert held[0] == 0 and max(held) > 0


def test_another_judge_is_another_policy(tmp_path, folder):
    run = save_run(tmp_path)
    for digest in ("a" * 64, "b" * 64):
        (Path(run) / "judge.json").write_text(json.dumps({"format": judge.FORMAT, "sha256": digest}))
        assert identify(EvalConfig(samples=4, checkpoint=str(run)))["policy_settings"]["judge"] == digest
    assert "judge" not in identify(EvalConfig(checkpoint=str(run)))["policy_settings"]


def test_the_alarm_reads_every_few_steps_and_changes_nothing(tmp_path):
    run = str(save_run(tmp_path))
    rng = np.random.default_rng(0)
    seen = [
        {
            "images": {"overhead": rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)},
            "proprio": np.zeros(10, np.float32),
            "instruction": "open",
        }
        for _ in range(7)
    ]
    policy, _ = checkpoint_policy(EvalConfig(execute=1, sample_steps=2), run)
    watched, alarm = checkpoint_policy(EvalConfig(execute=1, sample_steps=2, alarm_every=3), run)
    for _ in range(2):  # a second episode starts anew
        for p in (policy, watched):
            p.reset("open")
        assert all(np.array_equal(policy.act(o), watched.act(o)) for o in seen)
        assert [step for step, *_ in alarm.readings] == [0, 3, 6]
        assert np.isfinite(alarm.readings).all() and min(mm for _, mm, _ in alarm.readings) > 0


def test_alarm_quality_is_the_area_under_the_curve():
    def episode(success, opened, *readings):
        return {"success_final": success, "subgoals": {"opened": opened}, "alarm": [[0, mm, 0] for mm in readings]}

    episodes = [episode(True, True, 1, 3), episode(False, True, 4), episode(True, True, 6), episode(False, True, 9)]
    quality = alarm_quality(episodes)  # means 2, 4, 6, 9: of four pairs, three are in order
    assert quality["success_final"]["value"] == 0.75 and quality["success_final"]["failures"] == 2
    assert "opened" not in quality  # never missed
    assert alarm_quality([{"success_final": True, "subgoals": {}}]) == {} == alarm_quality([])
