"""A policy drives a robot at a fixed rate: the loop to copy into your robot's code is `control` below.

    python experiments/control_loop.py                                the newest policy (or the one shipped), 3 Hz
    python experiments/control_loop.py --robot replay --rate 15       recorded pictures, no simulator needed
    python experiments/control_loop.py --checkpoint runs/finetune_self_flow --on_fault slow_stop --seconds 60

Yours needs a class with the three methods of `Robot`. Everything seen, wanted and done goes to --out: log.jsonl (a line
per control step), video.mp4 (what the policy saw), run.json (checkpoint and settings). docs/control.md has every fault
and what happens then.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from policies.realtime import DeadlineMissed, RealTimePolicy, ticks
from policies.safety import FROZEN, MARGIN, MAX_AGE, Guard, Limits, fade, refuse_rate
from selfflow_robot import checkpoint
from selfflow_robot.config import in_one_line
from selfflow_robot.data import encode_video, open_dataset
from selfflow_robot.interfaces import ACTION_NAMES, Observation

ON_FAULT = {"hold": 0.0, "slow_stop": 0.5}  # what is left of the last motion in each step without an action


class Robot(Protocol):
    rate: float | None  # Hz at which it takes commands; None: a command is one control step however fast they come

    def observe(self) -> tuple[Observation, float]:
        """What is seen now, and `time.monotonic()` when the picture was taken. Raises EndOfRun after the last one."""
        ...

    def command(self, action: np.ndarray) -> None:
        """Carry out float32 (7,), see `selfflow_robot/interfaces.py`, in the coming control step. Returns at once."""
        ...

    def close(self) -> None: ...


class EndOfRun(Exception):
    """Of a simulated episode or a recording."""


def control(
    robot: Robot, policy, guard: Guard, limits: Limits, rate: float, seconds: float, record, patience=2.0, stop=0.0
) -> str:
    """Runs until `seconds` have passed, the run ends, or faults last for `patience` seconds; returns which.

    Whatever goes wrong before an action is there, the robot gets the last one, faded: `stop` 0 holds, 0.5 slows down.
    """
    policy.reset()
    action, last_good = None, 0
    try:
        for step, lateness in ticks(rate, seconds):
            observation, wanted, began = None, None, time.monotonic()
            try:
                observation, taken = robot.observe()
                guard.inspect(observation, taken, time.monotonic())
                wanted = policy.act(observation)
                action, reasons = limits.limit(wanted, observation["proprio"])
                last_good = step
            except EndOfRun:
                return "end of run"
            except Exception as fault:  # stale or broken observation, missed deadline, NaN, camera or planner failed
                if not isinstance(fault, DeadlineMissed):
                    policy.hold()  # time passes for its plans too
                action = None if action is None else fade(action, stop)
                reasons = [f"{type(fault).__name__}: {fault}"]
            thought = time.monotonic()
            if action is not None:  # before the first one the robot is left as it stands
                robot.command(action)
            record(step, lateness, thought - began, observation, wanted, action, reasons)
            if step > last_good and (step - last_good) / rate >= patience:
                return f"stopped: {reasons[0]}"
        return "time over"
    finally:
        if action is not None:
            robot.command(fade(action))


class Log:
    """What a run saw, wanted and did, for replay. Lines are written as they come, the video at the end."""

    def __init__(self, folder: Path, view: str, rate: float, about: dict, rerun: bool = False):
        self.folder, self.view, self.rate = folder, view, rate
        self.frames: list[np.ndarray] = []
        self.counts: Counter[str] = Counter()
        self.lateness: list[float] = []
        self.rerun: Any = start_rerun() if rerun else None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(about, indent=1))
        self.lines = open(folder / "log.jsonl", "w", buffering=1)  # noqa: SIM115 (closed in `close`)
        if self.rerun:
            self.rerun.save(str(folder / "run.rrd"))

    def __call__(self, step, lateness, seconds, observation, wanted, action, reasons) -> None:
        """One control step. wanted: the policy's action, None where there was none; action: what the robot got."""
        line: dict = {"step": step, "lateness_ms": 1e3 * lateness, "act_ms": 1e3 * seconds, "reasons": reasons}
        line |= {"wanted": _listed(wanted), "action": _listed(action)}
        image = None
        if observation is not None:
            line |= {"proprio": _listed(observation.get("proprio")), "instruction": observation.get("instruction")}
            image = observation.get("images", {}).get(self.view)
        if image is not None and (not self.frames or image.shape == self.frames[0].shape) and image.dtype == np.uint8:
            line["frame"] = len(self.frames)  # of the video
            self.frames.append(image.copy())
        self.lines.write(json.dumps(line) + "\n")
        self.counts.update({"steps": 1, "without an action": wanted is None, "changed by limits": 0})
        if reasons:
            self.counts["changed by limits" if wanted is not None and np.isfinite(wanted).all() else "refused"] += 1
        self.lateness.append(lateness)
        if self.rerun:
            self._show(line, image)

    def close(self) -> None:
        self.lines.close()
        if self.frames:
            height, width = (side // 2 * 2 for side in self.frames[0].shape[:2])  # H.264 wants even sides
            frames = np.array(self.frames)[:, :height, :width]
            temporary = self.folder / f".video.mp4.{os.getpid()}.tmp"
            temporary.write_bytes(encode_video(frames, max(round(self.rate), 1)))
            os.replace(temporary, self.folder / "video.mp4")

    def _show(self, line: dict, image: np.ndarray | None) -> None:
        self.rerun.set_time("step", sequence=line["step"])
        if image is not None:
            self.rerun.log("camera", self.rerun.Image(image))
        for name, value in zip(ACTION_NAMES, line["action"] or []):
            self.rerun.log(f"action/{name}", self.rerun.Scalars(value))
        self.rerun.log("timing/lateness_ms", self.rerun.Scalars(line["lateness_ms"]))
        for reason in line["reasons"]:
            self.rerun.log("reasons", self.rerun.TextLog(reason))


def start_rerun():
    try:
        import rerun
    except ImportError as error:
        raise ValueError('--rerun needs rerun-sdk: pip install -e ".[rerun]"') from error
    rerun.init("selfflow_robot")
    return rerun


def _listed(value) -> list | None:
    """Numbers as JSON has them; null for those that are not finite."""
    if value is None:
        return None
    return [float(x) if np.isfinite(x) else None for x in np.ravel(value)]


class SimulatedRobot:
    """A SIMPLER task; the simulator takes one control step per command, at whatever rate the loop has."""

    rate = None

    def __init__(self, task: str, seed: int, layout):
        from envs import make_env

        self.env = make_env(task, width=layout.width, height=layout.height)
        self.observation, _ = self.env.reset(seed=seed, options={"reconfigure": True})
        self.over, self.success = False, False

    def observe(self) -> tuple[Observation, float]:
        if self.over:
            raise EndOfRun
        return self.observation, time.monotonic()  # between commands its world stands still

    def command(self, action: np.ndarray) -> None:
        if self.over:
            return
        self.observation, _, _, self.over, info = self.env.step(action)
        self.success = bool(info["success"])

    def close(self) -> None:
        print(f"success at the last step: {'yes' if self.success else 'no'}")
        self.env.close()


class ReplayedRobot:
    """An episode of a data set: shows its pictures one per command and follows none of them."""

    rate = None

    def __init__(self, root: Path, episode: int):
        self.data = open_dataset(root)
        if not 0 <= episode < len(self.data.episodes):
            raise ValueError(f"--episode {episode}: {root} has {len(self.data.episodes)}, numbered from 0")
        self.now = self.data.episodes[episode].start
        self.end = self.now + self.data.episodes[episode].length

    def observe(self) -> tuple[Observation, float]:
        if self.now >= self.end:
            raise EndOfRun
        data, now = self.data, self.now
        observation: Observation = {
            "images": {data.view: data.frames[now]},
            "proprio": data.proprio[now],
            "instruction": data.instructions[data.task[now]],
        }
        return observation, time.monotonic()

    def command(self, action: np.ndarray) -> None:
        self.now += 1

    def close(self) -> None:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or folder (default: the newest fine-tuned run, or the one shipped)")
    parser.add_argument("--robot", choices=("simulator", "replay"), default="simulator", help="default %(default)s")
    parser.add_argument("--task", default="open_and_place", help="simulator: SIMPLER's (default %(default)s)")
    parser.add_argument("--seed", type=int, default=10000, help="simulator: of the episode (default %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="replay (default %(default)s)")
    parser.add_argument("--episode", type=int, default=0, help="replay: which episode (default 0)")
    parser.add_argument("--rate", type=float, help="control steps per second (default: the checkpoint's, which a real "
                        "robot must have; simulator and replay take any, as 3, 15 or 50)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=70.0, help="at most (default %(default)g, a whole episode)")
    parser.add_argument("--execute", type=int, default=4, help="actions of a chunk before the next inference starts")
    parser.add_argument("--delay", type=int, help="control steps an inference takes (default: measured)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch (default 1, on a CPU the fastest; 0: its choice)"
    )
    parser.add_argument("--sample_steps", type=int, default=4, help="of the flow sampler (default %(default)s)")
    parser.add_argument("--on_fault", choices=tuple(ON_FAULT), default="hold", help="default %(default)s")
    parser.add_argument("--patience", type=float, default=2.0, help="s of faults before the run is stopped")
    parser.add_argument("--margin", type=float, default=MARGIN, help="on the speeds of the training data")
    parser.add_argument("--workspace", type=float, nargs=6, metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
                        help="box for the tool centre point, m, base frame (default: none)")  # fmt: skip
    parser.add_argument("--max_age", type=float, default=MAX_AGE, help="of an observation, control periods")
    parser.add_argument("--frozen", type=int, default=FROZEN, help="steps a real camera may show one same picture")
    parser.add_argument("--out", type=Path, default=Path("runs/control"), help="default %(default)s")
    parser.add_argument("--rerun", action="store_true", help="also run.rrd, for the rerun viewer")
    arguments = parser.parse_args()
    with in_one_line():
        sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 where faults stopped the run. Raises ValueError where something does not fit."""
    import torch

    from policies.flow_policy import FlowPolicy

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = checkpoint.chosen(arguments.checkpoint)
    planner = FlowPolicy.load(path, steps=arguments.sample_steps)
    layout, rate = planner.layout, arguments.rate or planner.layout.fps
    corners = arguments.workspace and (arguments.workspace[:3], arguments.workspace[3:])
    limits = Limits.of(planner.packer, arguments.margin, corners)
    if arguments.robot == "simulator":
        robot: Robot = SimulatedRobot(arguments.task, arguments.seed, layout)
    else:
        robot = ReplayedRobot(arguments.data, arguments.episode)
    refuse_rate(layout.fps, rate, robot.rate)
    frozen = None if robot.rate is None else arguments.frozen  # a simulator's pictures have no noise
    guard = Guard(planner.check, layout.view, 1 / rate, arguments.max_age, frozen)
    about = {"checkpoint": str(path), "sha256": planner.manifest.get("sha256"), "rate": rate}
    about |= {"limits": vars(limits), "arguments": {k: v if v is None else str(v) for k, v in vars(arguments).items()}}
    log = Log(arguments.out, layout.view, rate, about, arguments.rerun)
    print(f"{path} at {rate:g} Hz; at most {limits.speed:.3f} m/s and {limits.turn:.2f} rad/s", flush=True)
    with RealTimePolicy(planner, rate, execute=arguments.execute, delay=arguments.delay) as policy:
        try:
            outcome = control(
                robot, policy, guard, limits, rate, arguments.seconds, log,
                patience=arguments.patience, stop=ON_FAULT[arguments.on_fault],
            )  # fmt: skip
        except KeyboardInterrupt:
            outcome = "interrupted"
        finally:
            log.close()
            robot.close()
    late = 1e3 * np.quantile(log.lateness or [0.0], [0.5, 1.0])
    print(f"{outcome}; " + ", ".join(f"{name} {count}" for name, count in log.counts.items()))
    print(f"steps came {late[0]:.1f} ms late (median), {late[1]:.1f} ms at most; an inference took "
          f"{1e3 * max(policy.latencies, default=0):.0f} ms at most, {policy.expected} control steps")  # fmt: skip
    print(arguments.out / "log.jsonl")
    return int(outcome.startswith("stopped"))


if __name__ == "__main__":
    main()
