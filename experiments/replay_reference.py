"""How closely our scene reproduces recorded upstream rollouts: `python experiments/replay_reference.py DIR...`

Each DIR is one recording (meta.json, arrays.npz, frame_*.png, overlay.png) or a folder of them. Every recording of a
task we have is replayed twice: open loop from its first state, and with the state set back to the recording every
`--resync` steps (the controller's plan is recomputed from the recorded states, so nothing is lost at the seam).
Pictures are compared with the scene put into the recorded state, so that they measure the renderer alone.
"""

import argparse
import json
import os
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sapien
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from envs.google_robot import FINGER_CLOSED, FINGERS
from envs.scenes import body_of
from envs.simpler import ROBOTS, SimplerEnv
from envs.tasks import BY_NAME, Setup, Task, get_task
from selfflow_robot.config import in_one_line

CONTACT_IMPULSE = 1e-6  # N s in one physics step
FINGERS_MEET = 2 * FINGER_CLOSED - 0.02  # rad, sum of both
HELD_MOTION, HELD_SLIP = 0.002, 0.005  # m in one control step: an object moving with the hand is held


@dataclass
class Recording:
    """One upstream rollout of T control steps."""

    name: str
    folder: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    def state(self, t: int) -> dict:
        names, drawers = self.meta["joint_names"], self.meta["drawer_joints"] or []
        qvel = dict(zip(names, self.arrays["qvel"][t]))
        if set(FINGERS) <= set(names) and sum(self.arrays["qpos"][t, names.index(f)] for f in FINGERS) > FINGERS_MEET:
            qvel.update(dict.fromkeys(FINGERS, 0.0))  # +-13 rad/s in the recordings: chatter of finger on finger
        return {
            "qpos": dict(zip(names, self.arrays["qpos"][t])),
            "qvel": qvel,
            "drawers": dict(zip(drawers, self.arrays["drawer"][t])),
            "drawer_speeds": dict(zip(drawers, self._drawer_speeds(t))),
            "object_poses": self.objects(t),
        }

    @property
    def object_names(self) -> list[str]:
        """Of the recorded arrays, in the order of the scene's things."""
        numbered = sorted(k for k in self.arrays if k.startswith("obj/episode_objs_"))
        return numbered or [k for k in self.arrays if k == "obj/obj"]

    def objects(self, t):  # (things, 7) xyz wxyz
        return np.array([self.arrays[name][t] for name in self.object_names]).reshape(-1, 7)

    def _drawer_speeds(self, t):  # (3,) m/s, central difference: velocities of drawers are not recorded
        before, after = max(t - 1, 0), min(t + 1, len(self.arrays["drawer"]) - 1)
        moved = self.arrays["drawer"][after] - self.arrays["drawer"][before]
        return moved * self.meta["control_freq"] / max(after - before, 1)

    def tcp(self, t):  # (3,) m, world
        return self.arrays["tcp"][t, :3]

    def drawer(self, t):  # m
        if not self.meta["drawer_joints"]:
            return 0.0
        return self.arrays["drawer"][t, self.meta["drawer_joints"].index(f"{self.meta['drawer_id']}_drawer_joint")]


def read_recording(folder: Path) -> Recording:
    """Raises ValueError naming the file when the recording is incomplete or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        with np.load(folder / "arrays.npz") as archive:
            arrays = {key: archive[key] for key in archive.files}
        steps = len(arrays["action"])
        for key in ("qpos", "qvel", "tcp", "drawer"):
            if len(arrays[key]) != steps + 1 or not np.isfinite(arrays[key]).all():
                raise ValueError(f"{key} must hold {steps + 1} finite rows")
        meta["task"], meta["joint_names"], meta["robot_base"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder} is not a complete recording: {error}") from error
    return Recording(folder.name, folder, meta, arrays)


def find_recordings(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder")
    return [
        f
        for path in paths
        for f in ([path] if (path / "meta.json").exists() else sorted(path.iterdir()))
        if (f / "meta.json").exists()
    ]


def recorded_setup(recording: Recording) -> Setup:
    """The episode of a recording: what its seed draws, corrected by what the recording says."""
    meta, task = recording.meta, get_task(recording.meta["task"])
    x, y, _, w, *_, z = recording.meta["robot_base"]
    choices = {
        **task.draw(int(meta["seed"])),
        "robot_xy": (x, y),
        "robot_yaw": 2 * np.arctan2(z, w) - np.pi,
        "urdf_version": meta["urdf_version"] or "",
    }
    if (recording.folder / "overlay.png").exists():
        choices["overlay"] = str((recording.folder / "overlay.png").resolve())
    if task.drawers:
        choices["drawer"] = meta["drawer_id"]
    models = [meta["objects"][name.removeprefix("obj/")] for name in recording.object_names]
    if task.models:
        choices["model"] = models[0]
    if task.episodes:
        choices["episode_id"] = min(range(task.episodes), key=lambda n: mismatch(task, choices, n, models, recording))
    return replace(task.setup(choices), recorded_table=bool(recording.meta.get("standin_table")))


def mismatch(task: Task, choices: dict, number: int, models: list[str], recording: Recording) -> float:
    """How badly a numbered episode fits the recording, m and rad; infinite where other objects are meant."""
    setup = task.setup({**choices, "episode_id": number})
    if [thing.model for thing in setup.things] != models or setup.instructions[0] != recording.meta["instruction"]:
        return np.inf
    poses = recording.objects(0)
    away = sum(np.linalg.norm(pose[:2] - thing.xy) for pose, thing in zip(poses, setup.things))
    return away + sum(angle_between(pose[3:], thing.quat) for pose, thing in zip(poses, setup.things))


def angle_between(q, other) -> float:
    """rad, between two orientations (wxyz)."""
    return 2 * float(np.arccos(np.clip(abs(np.dot(q, other)), 0, 1)))


def reset_to(env: SimplerEnv, recording: Recording) -> tuple[float, float]:
    """Reset with the recording's robot, background and objects, then take its exact first state.

    Returns how far (mm, degrees, the worst of all objects) ours came to rest from the recorded ones; 0 without objects.
    """
    env.reset(seed=int(recording.meta["seed"]), options={"setup": recorded_setup(recording)})
    poses = recording.objects(0)
    away = [1000 * np.linalg.norm(thing.pose.p - pose[:3]) for thing, pose in zip(env.things, poses)]
    turned = [np.degrees(angle_between(thing.pose.q, pose[3:])) for thing, pose in zip(env.things, poses)]
    env.set_state(**recording.state(0))
    env.agent.controller.reset()
    return float(max(away, default=0.0)), float(max(turned, default=0.0))


def robot_contacts(env: SimplerEnv) -> set[frozenset]:
    """Pairs of entities, one of them a robot link, that push against each other in this physics step."""
    links = env.robot_entities
    return {
        frozenset(body.entity for body in contact.bodies)
        for contact in env.scene.px.get_contacts()
        if contact.points
        and any(body.entity in links for body in contact.bodies)
        and np.linalg.norm(np.sum([p.impulse for p in contact.points], axis=0)) > CONTACT_IMPULSE
    }


def control_step(env: SimplerEnv, action, known: set | None = None) -> set[frozenset]:
    """One control step; returns what the robot touched in any of its physics steps, but for `known` pairs."""
    controller, touched = env.agent.controller, set()
    controller.set_action(action)
    for _ in range(env._sim_steps_per_control):
        controller.before_simulation_step()
        env.scene.px.step()
        touched |= robot_contacts(env)
    return touched - (known or set())


def errors(env: SimplerEnv, recording: Recording, t: int) -> tuple[float, float, float]:
    """(TCP, drawer, worst object) error in mm after t control steps; object NaN where there is none."""
    tcp = np.linalg.norm(env.agent.controller.tcp.entity_pose.p - recording.tcp(t))
    drawer = abs(env.drawer_qpos() - recording.drawer(t)) if env.cabinet else 0.0
    objects = [np.linalg.norm(thing.pose.p - pose[:3]) for thing, pose in zip(env.things, recording.objects(t))]
    return 1000 * tcp, 1000 * drawer, 1000 * max(objects, default=np.nan)


def replay(env: SimplerEnv, recording: Recording, resync: int | None = None) -> dict:
    """Replay the recorded actions. Returns errors (T, 3) mm, touched (T,) bool, success (T,) bool."""
    settled = reset_to(env, recording)
    advance_at, rows, touched, success = recording.meta.get("advance_at"), [], [], []
    own: set = set()  # links of the robot that rub against each other all the time
    for t, action in enumerate(recording.arrays["action"]):
        if resync and t and t % resync == 0:
            synchronise(env, recording, t)
        if t == advance_at or (not env.is_final_subtask() and t >= 100):
            env.advance_to_next_subtask()
        contacts = control_step(env, action, own)
        if t == 0:
            own = {pair for pair in contacts if pair <= env.robot_entities}
            contacts -= own
        touched.append(bool(contacts))
        rows.append(errors(env, recording, t + 1))
        success.append(bool(env.evaluate()["success"]))
    return {
        "drawer": env.drawer_qpos() if env.cabinet else 0.0,
        "settled": settled,
        "errors": np.array(rows),
        "touched": np.array(touched),
        "success": np.array(success),
    }


def synchronise(env: SimplerEnv, recording: Recording, t: int):
    """State t of the recording, with the plan the controller would have had there.

    The object's velocity is not recorded: where it kept its place in the hand it moves with the hand, else it rests.
    """
    controller = env.agent.controller
    env.set_state(**recording.state(0))
    controller.reset()
    for k in range(t):
        env.set_state(**recording.state(k))
        controller.set_action(recording.arrays["action"][k])
    env.set_state(**recording.state(t))
    hand_before, hand = (sapien.Pose(p[:3], p[3:]) for p in recording.arrays["tcp"][t - 1 : t + 1])
    for thing, *poses in zip(env.things, recording.objects(t - 1), recording.objects(t)):
        before, now = (sapien.Pose(p[:3], p[3:]) for p in poses)
        slipped = np.linalg.norm((hand_before.inv() * before).p - (hand.inv() * now).p)
        if np.linalg.norm(now.p - before.p) > HELD_MOTION and slipped < HELD_SLIP:
            tcp, body = controller.tcp, body_of(thing)
            body.linear_velocity = tcp.linear_velocity + np.cross(tcp.angular_velocity, now.p - tcp.entity_pose.p)
            body.angular_velocity = tcp.angular_velocity


def psnr_db(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def compare_frames(env: SimplerEnv, recording: Recording) -> dict[int, float]:
    """PSNR (dB) of every recorded frame against ours in the recorded state."""
    reset_to(env, recording)
    env.hide_standins = True  # upstream shows nothing of an object without a picture
    result = {}
    for path in sorted(recording.folder.glob("frame_*.png")):
        t = int(path.stem.split("_")[1])
        try:
            theirs = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} is not a readable picture: {error}") from error
        env.set_state(**recording.state(t))
        result[t] = psnr_db(env.render_picture()[0], theirs)
    return result


def report(recording: Recording, free: dict, synced: dict, frames: dict[int, float]) -> dict:
    contact = np.flatnonzero(free["touched"])
    first = int(contact[0]) if len(contact) else len(free["touched"])
    phase = synced["errors"][first:] if first < len(synced["errors"]) else synced["errors"]
    last = free["errors"][-1]
    return {
        "episode": recording.name,
        "steps": len(free["touched"]),
        "settled_mm": free["settled"][0],
        "settled_degrees": free["settled"][1],
        "first_contact": first if len(contact) else None,
        "free_tcp_mm_max": float(free["errors"][:first, 0].max()) if first else 0.0,
        "tcp_mm_final": float(last[0]),
        "drawer_mm_final": float(last[1]),
        "drawer_m_final": free["drawer"],
        "recorded_drawer_m_final": float(recording.drawer(-1)),
        "object_mm_final": None if np.isnan(last[2]) else float(last[2]),
        "resync_tcp_mm_median": float(np.median(phase[:, 0])),
        "resync_object_mm_median": None if np.isnan(last[2]) else float(np.median(phase[:, 2])),
        "resync_object_mm_max": None if np.isnan(last[2]) else float(phase[:, 2].max()),
        "success": bool(free["success"][-1]),
        "recorded_success": bool(recording.arrays["success"][-1]),
        "psnr_reset_db": frames.get(0),
        "psnr_db": frames,
        "tcp_mm": [round(float(e), 3) for e in free["errors"][:, 0]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    golden = os.environ.get("SIMPLER_GOLDEN_DIR")
    parser.add_argument("dirs", nargs="*", type=Path, metavar="DIR", help="recordings (default: $SIMPLER_GOLDEN_DIR)")
    parser.add_argument("--resync", type=int, default=10, help="steps between resets to the recording (default 10)")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    arguments = parser.parse_args()
    paths = arguments.dirs or ([Path(golden)] if golden else [])
    if not paths:
        parser.error("name a folder of recordings, or set SIMPLER_GOLDEN_DIR")
    console = Console(stderr=True)
    try:
        recordings = [read_recording(folder) for folder in find_recordings(paths)]
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    skipped = [r.name for r in recordings if r.meta["task"] not in BY_NAME]
    recordings = [r for r in recordings if r.meta["task"] in BY_NAME]
    if skipped:
        console.print(f"not our tasks yet, skipped: {', '.join(skipped)}")
    if not recordings:
        sys.exit("error: no recording of a known task found")

    results, env = [], None
    for recording in track(recordings, "replaying", console=console):
        if env is None or env.task != get_task(recording.meta["task"]):
            env = SimplerEnv(recording.meta["task"], *ROBOTS[get_task(recording.meta["task"]).robot].picture_size)
        free = replay(env, recording)
        synced = replay(env, recording, arguments.resync)
        results.append(report(recording, free, synced, compare_frames(env, recording)))

    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(title=f"errors in mm; resync every {arguments.resync} steps")
    columns = (
        "settled_mm", "settled_degrees", "first_contact", "free_tcp_mm_max", "tcp_mm_final", "resync_tcp_mm_median",
        "resync_object_mm_median", "resync_object_mm_max", "drawer_mm_final", "object_mm_final", "success",
        "recorded_success", "psnr_reset_db",
    )  # fmt: skip
    for column in ("episode", *columns):
        table.add_column(column.replace("_", " "))
    for r in results:
        table.add_row(r["episode"].removeprefix("google_robot_"),
                      *(f"{r[c]:.2f}" if isinstance(r[c], float) else str(r[c]) for c in columns))  # fmt: skip
    Console(width=200).print(table)
    for r in results:
        every = ", ".join(f"{t}: {r['tcp_mm'][t]:.2f}" for t in range(0, r["steps"], 10))
        pictures = ", ".join(f"{t}: {db:.1f}" for t, db in r["psnr_db"].items())
        print(f"{r['episode']}\n  TCP error mm at step {every}\n  PSNR dB of frame {pictures}")


if __name__ == "__main__":
    with in_one_line():
        main()
