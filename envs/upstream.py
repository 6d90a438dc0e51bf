"""The original `simpler_env` behind our Env protocol, in an interpreter of its own (`upstream_server.py`).

    env = make_upstream_env("open_and_place")
    observation, info = env.reset(seed=0)

Upstream needs numpy < 2 and SAPIEN 2.2.2, so the two talk over a local socket, in msgpack. Observations, actions,
options and the rules for `info` are those of `envs/simpler.py`: the same policy runs in both on the same episodes.
"""

import os
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

import msgpack
import numpy as np

from envs.assets import user_cache
from envs.protocol import PICTURE_SIZES
from envs.tasks import Task, get_task
from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_DIM, Observation

PROTOCOL = 1  # as in upstream_server.py
MAX_FRAME = 16 << 20  # bytes, of one message
LAST_LINES = 8  # of the server, in an error
SEEN = ("images", "proprio", "instruction", "final_subtask", "info")  # in every answer that holds an observation
STEPPED = (*SEEN, "reward", "terminated", "truncated")
COMMON_OPTIONS = ("robot_xy", "robot_yaw", "urdf_version", "overlay", "reconfigure")
SERVER = Path(__file__).with_name("upstream_server.py")
REMEDY = """Upstream SIMPLER needs Python 3.10 or 3.11 (there is no SAPIEN 2.2.2 for newer ones):
    git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv
    python3.11 -m venv {cache}
    {cache}/bin/pip install "numpy<2" "opencv-python<4.12" "setuptools<81" msgpack sapien==2.2.2 \\
        -e SimplerEnv/ManiSkill2_real2sim -e SimplerEnv
or name an interpreter that has it: SIMPLER_UPSTREAM_PYTHON=/path/to/python"""


def remedy() -> str:
    return REMEDY.format(cache=user_cache() / "upstream")


def upstream_python(python: str | Path | None = None) -> Path:
    """The interpreter that has upstream: the argument, else SIMPLER_UPSTREAM_PYTHON, else the one in the user cache.

    Raises FileNotFoundError with the commands that install it.
    """
    path = Path(python or os.environ.get("SIMPLER_UPSTREAM_PYTHON") or user_cache() / "upstream/bin/python")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {remedy()}")
    return path


def make_upstream_env(
    task: str = "open_and_place",
    width: int | None = None,
    height: int | None = None,
    python: str | Path | None = None,
    render: bool = True,
    shader: str | None = None,
    port: int | None = None,
    timeout: float = 300.0,
) -> "UpstreamEnv":
    """Start upstream with one scene (upstream or short name) and connect to it.

    width, height: of the picture, shrunk from upstream's own; a quarter of it by default. render: False runs physics
    alone and `images` stays empty; SAPIEN 2.2.2 draws only with a GPU or Mesa 26. shader: "ibl" rasterises the drawer
    tasks too, which otherwise trace rays and need a GPU that can. port: connect to a server already listening on
    127.0.0.1 (`python envs/upstream_server.py --port 5560`) instead of starting one. timeout: s, the longest wait for
    an answer.
    """
    full = PICTURE_SIZES[get_task(task).robot]  # an unknown name fails before anything is started
    width, height = width or full[0] // 4, height or full[1] // 4
    if port is not None:
        server = None
        connection = socket.create_connection(("127.0.0.1", port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        server, connection = start_server(upstream_python(python))
    connection.settimeout(timeout)
    return UpstreamEnv(Link(connection, server), task, width, height, render, shader)


class Server:
    """The child process and what it says on its standard error."""

    def __init__(self, command: list[str], fd: int):
        ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the child; a pipe that is full would block it)
        self.process = subprocess.Popen(
            command, pass_fds=[fd], env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )

    def stop(self, patience: float = 5.0) -> str:
        """Give it this long (s) to notice that we have hung up, else kill it; returns the last lines it printed."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.log.closed:
            return ""
        with self.log:
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-LAST_LINES:]) or "(nothing)"


def start_server(python: Path) -> tuple[Server, socket.socket]:
    """A child with one end of a fresh socket; nobody else can connect to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        # -I: neither our folder nor our environment variables decide what upstream imports
        server = Server([str(python), "-I", str(SERVER), "--fd", str(theirs.fileno())], theirs.fileno())
    return server, ours


class Link:
    """Calls over the socket. Whatever goes wrong below ends the link with one RuntimeError that says what and why."""

    def __init__(self, connection: socket.socket, server: Server | None = None):
        self.connection, self.server = connection, server

    def call(self, name: str, expect: tuple[str, ...] = (), **arguments) -> dict:
        """The answer, which has the keys `expect`. ValueError or FileNotFoundError: the server refused the request."""
        if self.connection is None:
            raise RuntimeError("the upstream environment is closed")
        try:
            self._send({"call": name, **arguments})
            answer = self._receive(expect)
        except TimeoutError:
            self._fail(f"upstream did not answer {name!r} within {self.connection.gettimeout():g} s", hung=True)
        except (OSError, EOFError) as error:
            self._fail(f"upstream hung up during {name!r} ({error})")
        except ValueError as error:
            self._fail(f"upstream answered {name!r} with something else than this protocol: {error}", hung=True)
        except BaseException:  # interrupted: the answer still to come would be taken for the next call's
            self.close()
            raise
        if answer["ok"]:
            return answer
        refusal = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError}.get(answer["error"])
        if refusal:
            raise refusal(answer["message"])
        raise RuntimeError(f"upstream failed in {name!r}: {answer['error']}: {answer['message']}")

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.server is not None:
            self.server.stop()

    def _fail(self, what: str, hung: bool = False):
        self.connection.close()
        self.connection = None
        if self.server is None:
            raise RuntimeError(what) from None
        said = self.server.stop(0.2 if hung else 5.0)
        status = self.server.process.returncode
        raise RuntimeError(f"{what}; exit status {status}; the last it said:\n{said}") from None

    def _send(self, message: dict):
        data = msgpack.packb(message)
        self.connection.sendall(struct.pack(">I", len(data)) + data)

    def _receive(self, expect: tuple[str, ...]) -> dict:
        (length,) = struct.unpack(">I", self._read(4))
        if length > MAX_FRAME:
            raise ValueError(f"a frame of {length} bytes, more than {MAX_FRAME}")
        try:
            answer = msgpack.unpackb(self._read(length))
        except (msgpack.UnpackException, ValueError) as error:
            raise ValueError(f"not msgpack ({error})") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
            raise ValueError(f"not an answer: {str(answer)[:80]}")
        if missing := set(expect if answer["ok"] else ("error", "message")) - set(answer):
            raise ValueError(f"an answer without {', '.join(sorted(missing))}")
        return answer

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.connection.recv(min(length - len(data), 1 << 20))
            if not piece:
                raise EOFError(f"{len(data)} of {length} bytes arrived")
            data += piece
        return bytes(data)


class UpstreamEnv:
    """One upstream scene as an `Env`; `rollout` and the evaluation take it like ours.

    `reset(seed=..., options=...)`: the seed draws the episode, without one upstream's chain goes on; options fix parts
    of it: those of the task (`Task.options`) and robot_xy (m), robot_yaw (rad), urdf_version, overlay, reconfigure.
    """

    def __init__(self, link: Link, task: str, width: int, height: int, render: bool, shader: str | None = None):
        self.link, self.task, self.render = link, get_task(task), render
        self.shape = (height, width, 3)
        hello = dict(protocol=PROTOCOL, task=self.task.name, width=width, height=height, render=render, shader=shader)
        try:
            about = link.call("hello", ("protocol", "view", "max_steps"), **hello)
            if about["protocol"] != PROTOCOL:
                raise RuntimeError(f"upstream's server speaks protocol {about['protocol']}, we speak {PROTOCOL}")
        except BaseException as error:
            link.close()
            if "No module named" in str(error):
                raise RuntimeError(f"{error}\n{remedy()}") from error
            if "vk::" in str(error):
                raise RuntimeError(
                    f"{error}: it cannot draw on this machine; render=False needs no pictures"
                ) from error
            raise
        self.view, self.max_steps = about["view"], about["max_steps"]
        self.versions = about.get("versions")
        self._final, self._instruction = True, ""

    @property
    def unwrapped(self) -> "UpstreamEnv":
        return self

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        options = episode_options(self.task, options or {})
        answer = self.link.call("reset", SEEN, seed=None if seed is None else int(seed), options=options)
        return self._observation(answer), answer["info"]

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers [dx dy dz rx ry rz gripper], got {action}")
        answer = self.link.call("step", STEPPED, action=action.tolist())
        observation = self._observation(answer)
        return observation, answer["reward"], answer["terminated"], answer["truncated"], answer["info"]

    def is_final_subtask(self) -> bool:
        return self._final

    def advance_to_next_subtask(self):
        """The policy declares its subtask done; the next observation carries the new instruction."""
        answer = self.link.call("advance_to_next_subtask", ("final_subtask", "instruction"))
        self._final, self._instruction = answer["final_subtask"], answer["instruction"]

    @property
    def instruction(self) -> str:
        return self._instruction

    def state(self) -> dict:
        """Privileged: joint_names, qpos, qvel, base, tcp, objects, drawers; poses [x y z qw qx qy qz], world."""
        return {key: value for key, value in self.link.call("state").items() if key != "ok"}

    def close(self):
        self.link.close()

    def _observation(self, answer: dict) -> Observation:
        try:
            self._final, self._instruction = bool(answer["final_subtask"]), str(answer["instruction"])
            proprio = np.array(answer["proprio"], np.float32)
            images = {view: self._picture(packed) for view, packed in answer["images"].items()}
            if proprio.shape != (PROPRIO_DIM,) or set(images) != ({self.view} if self.render else set()):
                raise ValueError(f"proprio of shape {proprio.shape}, views {list(images)}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.link.close()
            raise RuntimeError(f"upstream's answer is malformed: {error!r}") from error
        return {"images": images, "proprio": proprio, "instruction": self._instruction}

    def _picture(self, packed: dict) -> np.ndarray:
        if tuple(packed["shape"]) != self.shape:
            raise ValueError(f"a picture of shape {packed['shape']} instead of {self.shape}")
        return np.frombuffer(packed["data"], np.uint8).reshape(self.shape).copy()


def episode_options(task: Task, options: dict) -> dict:
    """Our reset options, checked as ours are, as the server takes them. ValueError for what does not exist."""
    known = (*task.options, *COMMON_OPTIONS)
    if unknown := set(options) - set(known):
        raise ValueError(f"unknown reset options {sorted(unknown)} for {task.short}; known: {', '.join(known)}")
    setup = task.setup({**task.draw(0), **options})  # raises ValueError for values that do not exist
    sent = dict(options)
    if sent.pop("pose", None):
        sent = {"robot_xy": setup.robot_xy, "robot_yaw": setup.robot_yaw, "overlay": setup.overlay, **sent}
    return {key: _plain(value) for key, value in sent.items()}


def _plain(value):
    """As msgpack can carry it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
