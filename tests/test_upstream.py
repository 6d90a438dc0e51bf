"""Upstream behind a socket: the client against a fake server with planted faults, and against the real one."""

import importlib.util
import json
import os
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from envs import upstream
from envs.rollout import HoldStill, rollout
from envs.tasks import POSES, get_task
from envs.upstream import Link, episode_options, make_upstream_env

ACTION = np.array([0.01, 0, 0, 0, 0, 0.1, 1], np.float32)
FAKE = """
import os, socket, struct, sys, time
import msgpack

connection = socket.socket(fileno=int(sys.argv[2]))
instruction, elapsed, last = "open top drawer", 0, None

def read(n):
    data = b""
    while len(data) < n:
        piece = connection.recv(n - len(data))
        if not piece:
            sys.exit(0)
        data += piece
    return data

def send(message):
    data = msgpack.packb(message)
    connection.sendall(struct.pack(">I", len(data)) + data)

def seen():
    height, width, _ = shape
    return {
        "ok": True,
        "images": {"overhead": {"shape": shape, "data": bytes(range(256)) * (height * width * 3 // 256)}},
        "proprio": [0.5] * 10,
        "instruction": instruction,
        "final_subtask": instruction != "open top drawer",
        "info": {"success": elapsed == 3, "elapsed_steps": elapsed, "subgoals": {"drawer_opened": 1}, "request": last},
    }

while True:
    last = msgpack.unpackb(read(struct.unpack(">I", read(4))[0]))
    call = last["call"]
    if call == FAULT_CALL:
        FAULT
    if call == "hello":
        shape = [last["height"], last["width"], 3]
        send({"ok": True, "protocol": 1, "view": "overhead", "max_steps": 4})
    elif call == "reset":
        elapsed = 0
        if last["seed"] == 13:
            send({"ok": False, "error": "ValueError", "message": "unlucky"})
        else:
            send(seen())
    elif call == "step":
        elapsed += 1
        send({**seen(), "reward": 0.5, "terminated": elapsed == 3, "truncated": elapsed == 4})
    elif call == "advance_to_next_subtask":
        instruction = "place apple into top drawer"
        send({"ok": True, "final_subtask": True, "instruction": instruction})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Start the client on a fake server: fake(call, code) runs `code` in it when `call` arrives."""
    started = []

    def start(call="", code="pass", **kwargs):
        script = tmp_path / "server.py"
        script.write_text(FAKE.replace("FAULT_CALL", repr(call)).replace("FAULT", code))
        monkeypatch.setattr(upstream, "SERVER", script)
        monkeypatch.setattr(
            upstream, "start_server", lambda python: started.append(start_server(python)) or started[-1]
        )
        return make_upstream_env("open_and_place", 32, 16, python=sys.executable, **kwargs)

    start_server, start.processes = upstream.start_server, started
    yield start
    for server, connection in started:
        connection.close()
        server.stop()


def test_observations_and_requests_cross_the_socket(fake):
    env = fake()
    observation, info = env.reset(seed=7, options={"urdf_version": "", "object_xy": np.array([-0.08, 0.02])})
    assert info["request"] == {"call": "reset", "seed": 7, "options": {"urdf_version": "", "object_xy": [-0.08, 0.02]}}
    picture = observation["images"]["overhead"]
    assert picture.dtype == np.uint8 and np.array_equal(picture, np.arange(16 * 32 * 3).reshape(16, 32, 3) % 256)
    picture[:] = 0  # ours to write to
    assert observation["proprio"].dtype == np.float32 and observation["proprio"].tolist() == [0.5] * 10
    assert observation["instruction"] == "open top drawer" and not env.unwrapped.is_final_subtask()

    _, reward, terminated, truncated, info = env.step(ACTION)
    assert (reward, terminated, truncated, info["elapsed_steps"]) == (0.5, False, False, 1)
    np.testing.assert_array_equal(info["request"]["action"], ACTION.astype(float))
    env.advance_to_next_subtask()
    assert env.is_final_subtask() and env.instruction == "place apple into top drawer"

    env.close()
    env.close()
    assert fake.processes[0][0].process.returncode == 0
    with pytest.raises(RuntimeError, match="closed"):
        env.step(ACTION)


def test_rollout_takes_it_like_ours(fake):
    episode = rollout(fake(), HoldStill(), seed=3)
    assert episode.steps == 4 and episode.frames.shape == (4, 16, 32, 3)
    assert (episode.success_any, episode.success_final) == (True, False)
    assert episode.subgoals == {"drawer_opened": True}


def test_a_refused_request_leaves_the_link_alive(fake):
    env = fake()
    with pytest.raises(ValueError, match="unlucky"):
        env.reset(seed=13)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    assert env.reset(seed=14)[1]["request"]["seed"] == 14


FAULTS = {
    "dies": (
        "print('segmentation fault', file=sys.stderr, flush=True); os._exit(3)",
        "status 3(.|\n)*segmentation fault",
    ),
    "dies within a frame": ("connection.sendall(b'\\0\\0\\1\\0half'); os._exit(4)", "hung up during 'step'.*4 of 256"),
    "hangs": ("print('busy', flush=True); time.sleep(60)", "did not answer 'step' within 0.5 s(.|\n)*busy"),
    "sends garbage": ("connection.sendall(b'\\0\\0\\0\\4\\xc1\\xc1\\xc1\\xc1')", "not msgpack"),
    "sends text": ("connection.sendall(b'HTTP/1.1 400 Bad Request')", "more than 16777216"),
    "sends a huge frame": ("connection.sendall(struct.pack('>I', (16 << 20) + 1))", "16777217 bytes, more than"),
    "sends no answer": ("send([1, 2])", "not an answer"),
    "leaves keys out": ("send({'ok': True, 'images': {}})", "without final_subtask, info"),
    "sends another picture": ("shape = [8, 8, 3]", "malformed.*picture of shape"),
    "sends another proprio": (
        "send({**seen(), 'proprio': [1.0], 'reward': 0, 'terminated': 0, 'truncated': 0}); continue",
        "malformed.*proprio",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_is_one_clear_error_and_no_child_is_left(fake, fault):
    code, message = FAULTS[fault]
    env = fake("step", code, timeout=0.5 if fault == "hangs" else 20)
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=message):
        env.step(ACTION)
    assert fake.processes[0][0].process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        env.reset(seed=0)


def test_what_cannot_start_says_why(fake):
    with pytest.raises(RuntimeError, match="speaks protocol 2, we speak 1"):
        fake("hello", "send({'ok': True, 'protocol': 2, 'view': 'overhead', 'max_steps': 4}); continue")
    with pytest.raises(RuntimeError, match=r"No module named 'simpler_env'(.|\n)*git clone"):
        fake("hello", "import simpler_env")
    failure = {"ok": False, "error": "RuntimeError", "message": "vk::createDevice: no device"}
    with pytest.raises(RuntimeError, match="render=False"):
        fake("hello", f"send({failure}); continue")
    assert all(server.process.poll() is not None for server, _ in fake.processes)


def test_not_installed_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SIMPLER_UPSTREAM_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}(.|\n)*git clone(.|\n)*pip install(.|\n)*UPSTREAM_PYTHON"):
        make_upstream_env("open_and_place")
    monkeypatch.setenv("SIMPLER_UPSTREAM_PYTHON", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="/nowhere/python does not exist"):
        make_upstream_env("open_and_place")
    with pytest.raises(ValueError, match="unknown task"):
        make_upstream_env("tidy_up")


def test_options_are_checked_and_translated_before_they_travel():
    task = get_task("open_and_place")
    x, y, yaw = POSES["c0"]
    sent = episode_options(task, {"pose": "c0", "robot_xy": (0.6, 0.1)})
    assert sent == {"robot_xy": [0.6, 0.1], "robot_yaw": yaw, "overlay": "data/real_inpainting/open_drawer_c0.png"}
    assert episode_options(task, {"pose": "c0"})["robot_xy"] == [x, y]
    assert episode_options(get_task("stack_cube"), {"episode_id": np.int64(3), "reconfigure": True}) == {
        "episode_id": 3,
        "reconfigure": True,
    }
    for wrong in ({"pose": "z9"}, {"urdf_version": "blue"}, {"episode_id": 3}, {"object_xy": [1]}):
        with pytest.raises(ValueError):
            episode_options(task, wrong)


# -- the server's side of the wire, without upstream -------------------------------------------------------------------


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("upstream_server", upstream.__file__.replace(".py", "_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_client_and_server_understand_each_other(server, monkeypatch):
    class Scene:
        def __init__(self, **arguments):
            self._arguments = arguments

        def describe(self):
            return {"task": self._arguments["task"]}

        def step(self, action):
            return {"total": sum(action)}

    assert (server.PROTOCOL, server.MAX_FRAME) == (upstream.PROTOCOL, upstream.MAX_FRAME)
    monkeypatch.setattr(server, "Scene", Scene)
    monkeypatch.setattr(server.traceback, "print_exc", lambda: None)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.serve, args=(theirs,))
    thread.start()
    link = Link(ours)
    with pytest.raises(ValueError, match="no such call"):
        link.call("step", action=[1.0])  # before hello
    with pytest.raises(RuntimeError, match="speaks protocol 1"):
        link.call("hello", protocol=0, task="t")
    assert link.call("hello", protocol=1, task="t") == {"ok": True, "protocol": 1, "task": "t"}
    assert link.call("step", action=[1.0, 2.0])["total"] == 3.0
    for name in ("_arguments", "__init__", "fly"):
        with pytest.raises(ValueError, match="no such call"):
            link.call(name)
    link.close()
    thread.join(5)
    assert not thread.is_alive()
    theirs.close()


def test_the_server_sends_plain_values_only(server):
    class Pose:
        p, q = np.array([1.0, 2, 3], np.float32), np.array([1.0, 0, 0, 0], np.float32)

    given = {"a": np.float32(0.5), "b": (np.bool_(True), None), "c": np.arange(2), "pose": Pose(), 3: Path("x")}
    plain = {"a": 0.5, "b": [True, None], "c": [0, 1], "pose": [1.0, 2, 3, 1, 0, 0, 0], "3": "x"}
    assert server._plain(given) == plain


# -- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.skipif("SIMPLER_UPSTREAM_PYTHON" not in os.environ, reason="upstream's interpreter is not given")
@pytest.mark.skipif("SIMPLER_GOLDEN_DIR" not in os.environ, reason="the recorded rollouts are not given")
def test_real_upstream_replays_its_recordings():
    folder = Path(os.environ["SIMPLER_GOLDEN_DIR"]) / "google_robot_close_top_drawer-20"
    meta, recorded = json.loads((folder / "meta.json").read_text()), np.load(folder / "arrays.npz")
    env = make_upstream_env(meta["task"], render=False)
    try:
        observation, info = env.reset(seed=meta["seed"])
        assert observation["images"] == {} and observation["instruction"] == meta["instruction"]
        np.testing.assert_allclose(env.state()["base"], meta["robot_base"], atol=1e-6)
        for action, tcp in zip(recorded["action"][:15], recorded["tcp"][1:]):
            env.link.call("step_upstream", action=action.tolist())
            np.testing.assert_allclose(env.state()["tcp"], tcp, atol=1e-6)
        observation, _ = env.reset(seed=3, options={"robot_xy": (0.7, 0.1), "robot_yaw": 0.1, "urdf_version": ""})
        np.testing.assert_allclose(env.state()["base"][:2], (0.7, 0.1), atol=1e-6)
        np.testing.assert_allclose(env.state()["base"][3:], (-np.sin(0.05), 0, 0, np.cos(0.05)), atol=1e-6)
        np.testing.assert_allclose(observation["proprio"][:3], (0.439384, -0.218417, 0.961869), atol=1e-5)
        assert observation["proprio"][9] == 1
        for _ in range(2):
            observation, _, terminated, truncated, info = env.step([0, 0, 0.05, 0, 0, 0, 0])
        assert info["elapsed_steps"] == 2 and not truncated and terminated == info["success"]
        assert observation["proprio"][2] > 0.965 and observation["proprio"][9] < 0.8  # up, and the fingers close
    finally:
        env.close()
