"""Upstream's SIMPLER behind a socket. Runs in upstream's interpreter and imports nothing of ours: see `upstream.py`.

Needs Python 3.10 or 3.11 with `simpler_env`, `mani_skill2_real2sim` (SAPIEN 2.2.2, numpy < 2) and `msgpack`. Started by
the client, which hands over one end of a socket (`--fd`), or by hand for a client on the same machine (`--port`).

One message is a frame: 4 bytes of length, most significant first, and that many bytes of msgpack. Requests are
{"call": name, ...arguments}; answers {"ok": True, ...} or {"ok": False, "error": type, "message": text}. The first
request is `hello`, which builds the scene. Poses are [x y z qw qx qy qz], world frame, metres.
"""

import argparse
import os
import socket
import struct
import sys
import traceback
import warnings
from collections import OrderedDict
from pathlib import Path

import msgpack
import numpy as np

PROTOCOL = 1  # raise it whenever a message changes its meaning
MAX_FRAME = 16 << 20  # bytes, of one message
CAMERAS = {"google": ("overhead_camera", "overhead"), "widowx": ("3rd_view_camera", "overhead")}
FINGER_RANGE = 1.31  # rad, google: gripper action +-1 is a step of this much
# Boxes from the floor up where a stage's mesh is absent: top, world z; x and y range; upstream's scene offset (m).
STAGES = {
    "google_": (0.887532, (-0.72, 0.06), (-0.15, 0.55), (-1.6616, -3.0337)),
    "bridge_": (0.869532, (-0.70, 0.10), (-0.60, 0.60), (-2.0634, -2.8313)),
}


# -- what upstream needs to run on less than a GPU and all its files ---------------------------------------------------


class NoRenderer:
    """Accepts everything a renderer is asked for while a scene is built, and draws nothing."""

    def __init__(self, **kwargs):
        pass

    def __getattr__(self, name):
        return _nothing


def _nothing(*args, **kwargs):
    pass


def remove_renderer():
    """Physics alone: no renderer, lights or cameras. SAPIEN 2.2.2 starts no renderer on a Mesa older than 26."""
    import sapien.core as sapien
    from mani_skill2_real2sim.envs.sapien_env import BaseEnv

    def no_cameras(env):
        env._cameras, env._render_cameras = OrderedDict(), OrderedDict()

    sapien.SapienRenderer = NoRenderer
    sapien.Engine.set_renderer = _nothing
    for name in ("set_ambient_light", "add_directional_light", "add_point_light"):
        setattr(sapien.Scene, name, _nothing)
    BaseEnv._setup_cameras = no_cameras


def set_shader(name: str):
    """Draw every task with this shader ("ibl": rasteriser, "rt": ray tracing) instead of the one it asks for."""
    from mani_skill2_real2sim.envs.sapien_env import BaseEnv

    build = BaseEnv.__init__

    def build_with_shader(env, *args, **kwargs):
        build(env, *args, **{**kwargs, "shader_dir": name})

    BaseEnv.__init__ = build_with_shader


def tolerate_missing_files() -> set:
    """Put a box where a stage mesh is absent and leave absent looks away; returns the (growing) set of absentees.

    In the visual-matching protocol the stage is hidden behind the real background; only its flat top matters.
    """
    import sapien.core as sapien

    absent, builder = set(), sapien.ActorBuilder
    mesh_collision, mesh_visual = builder.add_nonconvex_collision_from_file, builder.add_visual_from_file

    def add_collision(self, filename, *args, **kwargs):
        if Path(filename).is_file():
            return mesh_collision(self, filename, *args, **kwargs)
        stage = next((STAGES[prefix] for prefix in STAGES if Path(filename).name.startswith(prefix)), None)
        if stage is None:
            raise FileNotFoundError(f"upstream's stage {filename} is absent and no box is known to stand in for it")
        top, (x0, x1), (y0, y1), offset = stage
        centre = [(x0 + x1) / 2 + offset[0], (y0 + y1) / 2 + offset[1], top / 2]
        self.add_box_collision(sapien.Pose(centre), [(x1 - x0) / 2, (y1 - y0) / 2, top / 2])
        absent.add(f"stages/{Path(filename).name}")
        print(f"{filename} is absent: a box with its top at {top} m stands in", file=sys.stderr)

    def add_visual(self, filename, *args, **kwargs):
        if Path(filename).is_file():
            return mesh_visual(self, filename, *args, **kwargs)
        absent.add("/".join(Path(filename).parts[-2:]))

    builder.add_nonconvex_collision_from_file, builder.add_visual_from_file = add_collision, add_visual
    return absent


# -- the scene ---------------------------------------------------------------------------------------------------------


class Scene:
    """One upstream environment; its methods without underscore are the calls a client can make."""

    def __init__(self, task: str, width: int, height: int, render: bool, shader=None):
        import simpler_env

        if task not in simpler_env.ENVIRONMENTS:
            raise ValueError(f"unknown upstream task {task!r}; known: {', '.join(simpler_env.ENVIRONMENTS)}")
        if not render:
            remove_renderer()
        if shader:
            set_shader(shader)
        self._absent = tolerate_missing_files()
        self._width, self._height, self._render = width, height, render
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._env = simpler_env.make(task, **({} if render else {"obs_mode": "none"}))
        self._base = self._env.unwrapped
        self._google = "google" in self._base.robot_uid
        self._camera, self._view = CAMERAS["google" if self._google else "widowx"]
        self._grasped, self._wanted = False, {}
        self._draw = self._base._additional_prepackaged_config_reset
        self._base._additional_prepackaged_config_reset = self._draw_then_override

    def describe(self) -> dict:
        import sapien

        return {
            "view": self._view,
            "max_steps": self._env.spec.max_episode_steps,
            "control_freq": self._base.control_freq,
            "sim_freq": self._base.sim_freq,
            "versions": {"sapien": getattr(sapien, "__version__", "2"), "numpy": np.__version__},
        }

    def reset(self, seed=None, options=None) -> dict:
        """Upstream's draws from the seed, parts of which the options replace; the client has checked them."""
        self._wanted, self._grasped = dict(options or {}), False
        names = {"object_xy": "init_xy", "orientation": "orientation", "episode_id": "episode_id"}
        objects = {names[key]: value for key, value in self._wanted.items() if key in names}
        upstream = {"reconfigure": bool(self._wanted.get("reconfigure")), "obj_init_options": objects}
        if "model" in self._wanted:
            upstream["model_id"] = self._wanted["model"]
        self._observation, info = self._env.reset(seed=seed, options=upstream)
        return self._answer({**info, "success": False, "elapsed_steps": 0})

    def step(self, action) -> dict:
        """Canonical action (7,): metres, rotation vector (rad), absolute gripper opening (1 = open)."""
        action = np.array(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got {action}")
        return self._step(self._to_upstream(action))

    def step_upstream(self, action) -> dict:
        """The same with the action as upstream defines it."""
        return self._step(np.array(action, dtype=np.float64))

    def advance_to_next_subtask(self) -> dict:
        self._base.advance_to_next_subtask()
        return {"final_subtask": bool(self._base.is_final_subtask()), "instruction": self._instruction()}

    def state(self) -> dict:
        """Privileged: robot, objects, drawers, as the simulator has them."""
        robot, base = self._base.agent.robot, self._base
        cabinet = getattr(base, "art_obj", None)
        return {
            "joint_names": [joint.name for joint in robot.get_active_joints()],
            "qpos": robot.get_qpos().tolist(),
            "qvel": robot.get_qvel().tolist(),
            "base": _pose(robot.pose),
            "tcp": _pose(base.tcp.pose),
            "objects": {a.name: _pose(a.pose) for a in base.get_actors() if a.name not in ("arena", "ground", "")},
            "drawers": dict(zip(base.joint_names, cabinet.get_qpos().tolist())) if cabinet else {},
        }

    def _draw_then_override(self, options: dict) -> bool:
        """Stands in for upstream's hook that draws robot pose, background and URDF; True: build the scene anew."""
        rebuild, wanted, base = self._draw(options), self._wanted, self._base
        robot = options["robot_init_options"]
        if "robot_xy" in wanted:
            robot["init_xy"] = wanted["robot_xy"]
        if "robot_yaw" in wanted:  # from the way it faces otherwise, which is world -x
            half = wanted["robot_yaw"] / 2
            robot["init_rot_quat"] = [-np.sin(half), 0.0, 0.0, np.cos(half)]
        if "overlay" in wanted:
            base.rgb_overlay_img = _read_overlay(wanted["overlay"])
        if "drawer" in wanted:
            base.drawer_id = wanted["drawer"]
        if wanted.get("urdf_version", base.urdf_version) != base.urdf_version:
            base.urdf_version, rebuild = wanted["urdf_version"], True
            base._configure_agent()
        return rebuild

    def _to_upstream(self, action: np.ndarray) -> np.ndarray:
        opening = np.clip(action[6], 0, 1)
        if self._google:  # relative to the last angle commanded, +1 = closing
            fingers = self._base.agent.controller.controllers["gripper"]
            commanded = float(np.mean(fingers._last_drive_qpos_targets))
            action[6] = (FINGER_RANGE * (1 - opening) - commanded) / FINGER_RANGE
        else:
            action[6] = 2 * opening - 1
        return action

    def _step(self, action: np.ndarray) -> dict:
        self._observation, reward, terminated, truncated, info = self._env.step(action)
        answer = self._answer(info)
        return {**answer, "reward": float(reward), "terminated": bool(terminated), "truncated": bool(truncated)}

    def _answer(self, info: dict) -> dict:
        info = {
            **{key: _plain(value) for key, value in info.items()},
            "subgoals": self._subgoals(info),
            "seed": int(self._base._episode_seed),
            "instruction": self._instruction(),
            "standin_table": any(name.startswith("stages/") for name in self._absent),
            "standins": [f"{name} is absent" for name in sorted(self._absent)],
        }
        return {
            "images": {self._view: self._picture()} if self._render else {},
            "proprio": self._proprio(),
            "instruction": self._instruction(),
            "final_subtask": bool(self._base.is_final_subtask()),
            "info": info,
        }

    def _subgoals(self, info: dict) -> dict:
        """What has been reached so far, by the names our own scenes use (`envs/success.py`)."""
        base, stats = self._base, self._base.episode_stats
        if hasattr(base, "art_obj") and not hasattr(base, "obj"):
            verb = "closed" if "Close" in type(base).__name__ else "opened"
            return {f"drawer_{verb}": bool(info["success"])}
        thing = base.obj if hasattr(base, "obj") else base.episode_source_obj
        self._grasped |= bool(info["elapsed_steps"] and base.agent.check_grasp(thing))
        grasped = {"object_grasped": self._grasped}
        if "n_lift_significant" in stats:
            return {**grasped, "object_lifted": stats["n_lift_significant"] > 0}
        if "near_tgt_obj" in stats:
            moved = bool(stats["moved_correct_obj"])
            return {**grasped, "right_object_moved": moved, "near": bool(stats["near_tgt_obj"])}
        if "src_on_target" in stats:
            return {**grasped, "on_target": bool(stats["src_on_target"])}
        opened, placed = bool(stats["is_drawer_open"]), bool(stats["has_contact"])
        return {"drawer_opened": opened, **grasped, "object_placed": placed}

    def _instruction(self) -> str:
        return self._base.get_language_instruction()

    def _proprio(self) -> list:
        """As `PROPRIO_NAMES` in our interfaces: TCP in the base frame, two rotation columns, opening."""
        robot, agent = self._base.agent.robot, self._base.agent
        matrix = (robot.pose.inv() * self._base.tcp.pose).to_transformation_matrix()
        opening = float(np.clip(1 - agent.get_gripper_closedness(), 0, 1))
        return [*matrix[:3, 3].tolist(), *matrix[:3, 0].tolist(), *matrix[:3, 1].tolist(), opening]

    def _picture(self) -> dict:
        import cv2

        picture = self._observation["image"][self._camera]["rgb"]
        picture = cv2.resize(picture, (self._width, self._height), interpolation=cv2.INTER_AREA)
        return {"shape": list(picture.shape), "data": np.ascontiguousarray(picture, np.uint8).tobytes()}


def _read_overlay(name: str) -> np.ndarray:
    import cv2
    from mani_skill2_real2sim import ASSET_DIR

    path = ASSET_DIR.parent / name  # an absolute one stays itself
    if not path.is_file():
        raise FileNotFoundError(f"background picture {path} does not exist")
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) / 255


def _pose(pose) -> list:
    return [*np.asarray(pose.p, float).tolist(), *np.asarray(pose.q, float).tolist()]


def _plain(value):
    """What msgpack can carry; poses become 7 numbers, anything else unknown its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if hasattr(value, "p") and hasattr(value, "q"):
        return _pose(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# -- the wire ----------------------------------------------------------------------------------------------------------


def send(connection: socket.socket, message: dict):
    data = msgpack.packb(message)
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive(connection: socket.socket):
    """The next message, or None when the other side has hung up."""
    header = _read(connection, 4)
    if header is None:
        return None
    (length,) = struct.unpack(">I", header)
    if length > MAX_FRAME:
        raise ValueError(f"frame of {length} bytes; at most {MAX_FRAME} are allowed")
    data = _read(connection, length)
    return None if data is None else msgpack.unpackb(data)


def _read(connection: socket.socket, length: int):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            return None
        data += piece
    return data


def serve(connection: socket.socket):
    """Answer one client until it hangs up; its mistakes are answered, not fatal."""
    scene = None
    while (request := receive(connection)) is not None:
        try:
            call = request.pop("call")
            if call == "hello":
                if request.pop("protocol") != PROTOCOL:
                    raise RuntimeError(f"this server speaks protocol {PROTOCOL}; client and server differ in age")
                scene = Scene(**request)
                answer = {"protocol": PROTOCOL, **scene.describe()}
            elif scene is None or call.startswith("_") or not callable(getattr(scene, call, None)):
                raise ValueError(f"no such call: {call!r}")
            else:
                answer = getattr(scene, call)(**request)
            answer = {"ok": True, **answer}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": type(error).__name__, "message": str(error)}
        send(connection, answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="an inherited, connected socket")
    where.add_argument("--port", type=int, help="serve one client on 127.0.0.1")
    arguments = parser.parse_args()
    os.dup2(2, 1)  # SAPIEN prints; nothing of ours goes over standard output
    if arguments.fd is not None:
        return serve(socket.socket(fileno=arguments.fd))
    with socket.create_server(("127.0.0.1", arguments.port)) as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        connection, _ = listener.accept()
        with connection:
            serve(connection)


if __name__ == "__main__":
    main()
