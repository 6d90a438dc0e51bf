"""The control loop with every fault there is, and as a newcomer would run it."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import control_loop
from experiments.control_loop import EndOfRun, Log, ReplayedRobot, SimulatedRobot, control
from policies.flow_policy import Plan
from policies.realtime import DeadlineMissed, RealTimePolicy
from policies.safety import Guard, Limits
from selfflow_robot.data import decode_video, open_dataset
from tests.synthetic import save_run, write_dataset

SCRIPT = Path(control_loop.__file__)
MOVE = np.array([0.01, 0, 0, 0, 0, 0, 0.5], np.float32)
LIMITS = Limits(fps=10, speed=0.2, turn=1)  # 2 cm per step


class Robot:
    """Step k shows a picture of value k; faults {step: what goes wrong}."""

    rate = 10.0

    def __init__(self, steps=100, **faults):
        self.steps, self.faults, self.now, self.commands = steps, faults, 0, []

    def observe(self):
        step, self.now = self.now, self.now + 1
        fault = self.faults.get(f"at{step}")
        if step >= self.steps:
            raise EndOfRun
        if fault == "unplugged":
            raise OSError("no camera")
        proprio = np.full(10, np.nan if fault == "nan" else 0, np.float32)
        image = np.full((16, 16, 3), 0 if fault == "frozen" else step + 1, np.uint8)
        observation = {"images": {"overhead": image}, "proprio": proprio, "instruction": "go"}
        if fault == "incomplete":
            del observation["proprio"]
        return observation, -10.0 if fault == "stale" else 0.0

    def command(self, action):
        self.commands.append(action)


class Policy:
    """MOVE, unless `faults` says otherwise {number of the picture: what to raise or return}."""

    def __init__(self, **faults):
        self.faults, self.held, self.seen = faults, 0, []

    def reset(self, instruction=""):
        pass

    def hold(self):
        self.held += 1

    def act(self, observation):
        step = int(observation["images"]["overhead"][0, 0, 0]) - 1
        self.seen.append(step)
        fault = self.faults.get(f"at{step}", MOVE)
        if isinstance(fault, Exception):
            raise fault
        return fault


def check(observation):
    if not np.isfinite(observation["proprio"]).all():
        raise ValueError("proprio: not finite")


@pytest.fixture
def run(monkeypatch):
    """run(robot, policy) -> (outcome, lines): no wall clock."""
    monkeypatch.setattr(control_loop, "ticks", lambda rate, seconds: zip(range(round(seconds * rate)), [0.0] * 1000))
    monkeypatch.setattr(control_loop.time, "monotonic", lambda: 0.0)

    def run(robot, policy, steps=10, record=None, frozen=None, **settings):
        lines = []
        guard = Guard(check, "overhead", 0.1, frozen=frozen)
        record = record or (lambda *line: lines.append(line))
        return control(robot, policy, guard, LIMITS, 10, steps / 10, record, **settings), lines

    return run


def test_a_run_without_faults_does_what_the_policy_says(run):
    robot, policy = Robot(), Policy()
    outcome, lines = run(robot, policy, steps=5)
    assert outcome == "time over" and policy.seen == list(range(5)) and policy.held == 0
    assert np.array_equal(robot.commands[:5], [MOVE] * 5)
    assert np.array_equal(robot.commands[5], [0, 0, 0, 0, 0, 0, 0.5])  # at the end: still
    assert [line[0] for line in lines] == list(range(5)) and all(line[-1] == [] for line in lines)


@pytest.mark.parametrize(
    ("robot_fault", "policy_fault", "reason", "asked"),
    [
        ("nan", None, "Refused: proprio: not finite", False),
        ("stale", None, "Refused: observation stale: 10.000 s old", False),
        ("incomplete", None, "Refused: observation lacks 'proprio'", False),
        ("unplugged", None, "OSError: no camera", False),
        (None, DeadlineMissed("late"), "DeadlineMissed: late", True),
        (None, RuntimeError("out of memory"), "RuntimeError: out of memory", True),
        (None, np.full(7, np.nan, np.float32), "Refused: action: not finite", True),
    ],
)
def test_at_any_fault_the_robot_holds_and_goes_on_after_it(run, robot_fault, policy_fault, reason, asked):
    robot = Robot(**({"at2": robot_fault} if robot_fault else {}))
    policy = Policy(**({} if policy_fault is None else {"at2": policy_fault}))
    outcome, lines = run(robot, policy, steps=5)
    assert outcome == "time over" and len(lines) == 5
    assert np.array_equal(robot.commands[2], [0, 0, 0, 0, 0, 0, 0.5])
    assert np.array_equal([robot.commands[k] for k in (0, 1, 3, 4)], [MOVE] * 4)
    assert lines[2][-1][0].startswith(reason) and lines[3][-1] == []
    assert policy.seen == ([0, 1, 2, 3, 4] if asked else [0, 1, 3, 4])
    assert policy.held == (0 if isinstance(policy_fault, DeadlineMissed) else 1)


def test_before_the_first_action_the_robot_is_left_as_it_stands(run):
    """Not even the gripper is touched: nobody has said whether it holds something."""
    robot = Robot(at0="stale", at1="nan")
    outcome, lines = run(robot, Policy(), steps=3)
    assert outcome == "time over" and np.array_equal(robot.commands[:-1], [MOVE])
    assert [line[-2] is None for line in lines] == [True, True, False]
    silent = Robot(**{f"at{k}": "unplugged" for k in range(100)})
    assert run(silent, Policy(), steps=50)[0].startswith("stopped") and silent.commands == []


def test_slow_stop_halves_the_motion_in_every_step_without_an_action(run):
    policy = Policy(**{f"at{k}": DeadlineMissed("late") for k in (2, 3, 4)})
    robot = Robot()
    run(robot, policy, steps=6, stop=0.5)
    assert np.allclose([command[0] for command in robot.commands], [0.01, 0.01, 0.005, 0.0025, 0.00125, 0.01, 0])
    assert all(command[6] == 0.5 for command in robot.commands)


def test_faults_that_last_end_the_run(run):
    robot = Robot(**{f"at{k}": "unplugged" for k in range(3, 100)})
    outcome, lines = run(robot, Policy(), steps=50, patience=0.5)
    assert outcome == "stopped: OSError: no camera" and len(lines) == 3 + 5
    assert not np.any(robot.commands[-1][:6])


def test_a_frozen_camera_stops_the_robot(run):
    robot = Robot(**{f"at{k}": "frozen" for k in range(4, 100)})
    outcome, _ = run(robot, Policy(**{"at-1": MOVE}), steps=50, frozen=3, patience=0.5)
    assert outcome.startswith("stopped: Refused: observation frozen")
    assert sum(command[0] > 0 for command in robot.commands) == 4 + 3  # three more before it can be known


def test_too_fast_is_slowed_down_and_said(run):
    robot, fast = Robot(), np.array([0.1, 0, 0, 0, 0, 0, 2.0], np.float32)
    _, lines = run(robot, Policy(at1=fast), steps=2)
    assert np.allclose(robot.commands[1], [0.02, 0, 0, 0, 0, 0, 1])
    assert lines[1][-1] == ["speed: 1.000 m/s, at most 0.200", "gripper: 2.000"]


def test_the_robot_is_told_to_hold_whatever_ends_the_run(run):
    robot = Robot(steps=3)
    assert run(robot, Policy(), steps=10)[0] == "end of run"
    assert np.array_equal(robot.commands[-1], [0, 0, 0, 0, 0, 0, 0.5])

    def interrupted(*line):
        raise KeyboardInterrupt

    robot = Robot()
    with pytest.raises(KeyboardInterrupt):
        run(robot, Policy(), record=interrupted)
    assert not np.any(robot.commands[-1][:6])


def test_everything_is_logged(run, tmp_path):
    log = Log(tmp_path / "out", "overhead", 10, {"rate": 10})
    robot = Robot(at1="nan", at2="unplugged")
    run(robot, Policy(at3=np.array([0.1, 0, 0, 0, 0, 0, 1], np.float32)), steps=5, record=log)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5))
    assert [line.get("frame") for line in lines] == [0, 1, None, 2, 3]  # what was refused is shown too
    assert lines[1]["proprio"] == [None] * 10 and lines[1]["wanted"] is None
    assert lines[3]["wanted"][0] == pytest.approx(0.1) and lines[3]["action"][0] == pytest.approx(0.02)
    assert log.counts == {"steps": 5, "without an action": 2, "changed by limits": 1, "refused": 2}
    frames = list(decode_video(tmp_path / "out/video.mp4"))
    assert len(frames) == 4 and abs(int(frames[3].mean()) - 5) <= 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.jsonl", "run.json", "video.mp4"]


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", episodes=2, length=12)


def test_a_recording_is_shown_frame_by_frame_and_ends(data):
    recorded, robot = open_dataset(data), ReplayedRobot(data, 1)
    for k in range(12):
        observation, _ = robot.observe()
        assert np.array_equal(observation["images"]["overhead"], recorded.frames[12 + k])
        assert observation["instruction"] == ("open" if k < 6 else "place")
        robot.command(MOVE)
    with pytest.raises(EndOfRun):
        robot.observe()
    with pytest.raises(ValueError, match=r"--episode 2: .* has 2"):
        ReplayedRobot(data, 2)


@pytest.fixture
def checkpoint_folder(tmp_path):
    return save_run(tmp_path / "run")


def run_script(folder, *arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def test_a_newcomer_drives_a_recording_with_an_untrained_checkpoint(tmp_path, data, checkpoint_folder):
    out = tmp_path / "out"
    # horizon 3: one action, one step of inference, one to spare
    done = run_script(
        tmp_path, "--robot", "replay", "--data", data, "--checkpoint", checkpoint_folder, "--execute", 1,
        "--sample_steps", 2, "--rate", 10, "--seconds", 0.8, "--patience", 9, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert 2 <= len(lines) <= 8 and lines[0]["wanted"] is not None  # fewer on a machine that lost steps
    assert len(list(decode_video(out / "video.mp4"))) == len(lines)
    about = json.loads((out / "run.json").read_text())
    # STATS: q01 -0.5, q99 1.5 m; 3 Hz; a margin of 1.25
    assert about["limits"]["speed"] == pytest.approx(1.25 * 3 * 1.5 * np.sqrt(3))
    assert "time over" in done.stdout and str(out / "log.jsonl") in done.stdout


def test_mistakes_are_answered_in_one_line(tmp_path, data):
    done = run_script(tmp_path, "--robot", "replay", "--data", data, "--checkpoint", "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("error: no checkpoint at nowhere")
    assert done.stderr.count("\n") == 1


def test_a_robot_of_another_rate_does_not_start(data, checkpoint_folder, monkeypatch):
    monkeypatch.setattr(ReplayedRobot, "rate", 15.0)
    arguments = SimpleNamespace(
        checkpoint=checkpoint_folder, sample_steps=2, rate=15.0, workspace=None, margin=1.25, robot="replay",
        data=data, episode=0, threads=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="would move 5 times as fast"):
        control_loop.run(arguments)


@pytest.mark.sim
def test_a_simulator_stands_still_until_it_is_commanded():
    """However long whoever drives it takes to begin, and in the size that the checkpoint sees."""
    robot = SimulatedRobot("close_top_drawer", 10000, SimpleNamespace(width=64, height=48))
    began = time.monotonic()
    observation, taken = robot.observe()
    assert taken >= began and observation["images"]["overhead"].shape == (48, 64, 3)
    robot.close()


def test_a_planner_that_hangs_stops_the_run(run):
    """With the real policy: what is left of the chunk, then holding, then the end; nothing waits."""
    gate = threading.Event()

    def plan(history, key, committed=None):
        assert key[1] == 0 or gate.wait(10)
        return Plan(np.tile(MOVE, (8, 1)), None)

    planner = SimpleNamespace(layout=SimpleNamespace(horizon=8, past=(0,)), check=check, plan=plan)
    robot = Robot()
    with RealTimePolicy(planner, 10, execute=4, delay=2) as policy:
        outcome, lines = run(robot, policy, steps=50, patience=1.0)
        gate.set()
    assert outcome == "stopped: DeadlineMissed: no action for step 8: the next chunk is late"
    assert [command[0] > 0 for command in robot.commands] == [True] * 8 + [False] * 11  # 10 steps, and the end
    assert len(lines) == 18
