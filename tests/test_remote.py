"""The client: served equals in-process, and every failure says what to do."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading

import numpy as np
import pytest
from fakes import InlineWorkers, LineEnv
from served import Digest, message, observation
from websockets.sync.server import serve

from experiments.eval_simpler import connect, evaluate, identify
from policies import wire
from policies.chunking import ChunkedPolicy
from policies.flow_policy import FlowPolicy
from policies.remote import Foreign, RemotePlanner, ServerError
from policies.server import Limits, describe, serving, tls_context
from selfflow_robot.config import EvalConfig
from tests.synthetic import make_batch, make_model, make_packer


def episode(planner, size=(6, 8), execute=2, seed=0):
    policy = ChunkedPolicy(planner, execute=execute, seed=seed)
    policy.reset("open")
    return np.stack([policy.act(observation(n, "open" if n < 4 else "place", *size)) for n in range(7)])


@contextlib.contextmanager
def pretender(answer, greeting=b"\x80"):
    """A server of someone else: answer(message) -> bytes, text, or None to hang up. Yields address and what it got."""
    got = []

    def talk(connection):
        if greeting is not None:
            connection.send(greeting)
        for data in connection:
            got.append(data)
            if (said := answer(data)) is None:
                connection.socket.shutdown(socket.SHUT_RDWR)
                return
            connection.send(said)

    with serve(talk, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}", got
        server.shutdown()
        thread.join(10)


def test_served_equals_in_process_whatever_the_policy_is_given():
    policy = Digest()
    with serving(policy) as server, RemotePlanner(server.address.removeprefix("ws://")) as planner:
        assert planner.layout == policy.layout
        for seed in (0, 3):
            assert np.array_equal(episode(planner, seed=seed), episode(policy, seed=seed))
        committed = np.arange(14, dtype=np.float32).reshape(2, 7)
        history = [observation(n) for n in range(3)]
        for given in (None, committed):
            assert np.array_equal(
                planner.plan(history, (3, 4), given).actions, policy.plan(history, (3, 4), given).actions
            )


def test_served_equals_in_process_with_a_network():
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    policy = FlowPolicy(make_model(packer), packer, steps=2, imagination=1.0)
    with serving(policy) as server, RemotePlanner(server.address) as planner:
        assert np.array_equal(episode(planner, (32, 48)), episode(policy, (32, 48)))
        history, key = [observation(n, "open", 32, 48) for n in range(2)], (1, 2)
        here, there = policy.plan(history, key), planner.plan(history, key)
        assert np.array_equal(here.actions, there.actions) and np.array_equal(here.video, there.video)
        with pytest.raises(ValueError, match=r"expects uint8 \(32, 48, 3\)"):
            planner.check(observation(0))


def test_a_dropped_connection_is_made_again_once():
    policy = Digest()
    with serving(policy) as server, RemotePlanner(server.address) as planner:
        planner.connection.socket.shutdown(socket.SHUT_RDWR)
        assert np.array_equal(episode(planner), episode(policy))
        (connection,) = server.connections
        server.loop.call_soon_threadsafe(connection.transport.abort)
        assert np.array_equal(episode(planner), episode(policy))
    greeting = wire.pack(describe(policy))
    with pretender(lambda _: None, greeting) as (address, got), RemotePlanner(address) as planner:
        with pytest.raises(ServerError, match="closed the connection twice"):
            episode(planner)
        assert len(got) == 2 and got[0] == got[1]


def test_a_server_that_serves_something_else_by_now():
    greeting = wire.pack(describe(Digest(), "first"))
    with pretender(lambda _: None, greeting) as (address, _), RemotePlanner(address) as planner:
        planner.metadata["checkpoint"] = "another"
        with pytest.raises(ServerError, match="serves something else by now: first"):
            episode(planner)


def test_busy_servers_are_asked_again():
    policy, busy = Digest(), ["busy: 1 requests are waiting; ask again"] * 3
    answer = wire.pack({"actions": np.ones((3, 7), np.float32)})
    with (
        pretender(lambda _: busy.pop() if busy else answer, wire.pack(describe(policy))) as (address, got),
        RemotePlanner(address) as planner,
    ):
        assert planner.plan([observation()] * 3, (0, 0)).actions.sum() == 21
    assert len(got) == 4


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("no such field", "refused: no such field"),
        ("busy: for ever", "refused: busy: for ever"),
        (wire.pack({"actions": np.zeros((2, 7), np.float32)}), r"promised actions float32 \(3, 7\), and sent float32"),
        (wire.pack({"actions": np.zeros((3, 7))}), "sent float64"),
        (wire.pack({}), "sent NoneType"),
        (wire.pack([1]), "answered with a list, not a map"),
        (b"\xc1", "sent what cannot be read"),
    ],
)  # fmt: skip
def test_answers_that_make_no_sense(answer, error):
    with (
        pretender(lambda _: answer, wire.pack(describe(Digest()))) as (address, _),
        RemotePlanner(address) as planner,
        pytest.raises(ServerError, match=error),
    ):
        planner.timeout = 0.3
        planner.plan([observation()] * 3, (0, 0))


def test_no_answer_in_time():
    policy = Digest()
    with serving(policy) as server, RemotePlanner(server.address) as planner:
        policy.gate.clear()
        planner.timeout = 0.1
        with pytest.raises(ServerError, match=r"has not answered within 0\.1 s"):
            planner.plan([observation()] * 3, (0, 0))
        policy.gate.set()
        planner.timeout = 10
        wanted = policy.plan([observation(1)] * 3, (0, 0)).actions  # not the answer to the one before
        assert np.array_equal(planner.plan([observation(1)] * 3, (0, 0)).actions, wanted)


def test_an_interrupted_request_takes_its_answer_with_it():
    """Ctrl-C while a plan is awaited: the next request gets its own answer, not the one that came too late."""
    policy = Digest()
    with serving(policy) as server, RemotePlanner(server.address) as planner:
        planner.plan([observation()] * 3, (0, 0))
        receive = planner.connection.recv
        planner.connection.recv = lambda timeout: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            planner.plan([observation(1)] * 3, (0, 0))
        if planner.connection is not None:  # left open, it would answer the question before
            planner.connection.recv = receive
        for number in (2, 3):
            wanted = policy.plan([observation(number)] * 3, (0, 0)).actions
            assert np.array_equal(planner.plan([observation(number)] * 3, (0, 0)).actions, wanted)


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=r"nothing answers at .*experiments/serve\.py"):
        RemotePlanner(f"127.0.0.1:{port}")
    with pytest.raises(ServerError, match="is no address"):
        RemotePlanner("ftp://127.0.0.1")
    with pytest.raises(ServerError, match="cannot be reached"):
        RemotePlanner("nowhere.invalid:8000")


def test_a_server_that_never_greets():
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(ServerError, match="has not answered within"):
        RemotePlanner(f"127.0.0.1:{mute.getsockname()[1]}", timeout=0.1)
    with pretender(lambda _: None, None) as (address, _), pytest.raises(ServerError, match="has not answered within"):
        RemotePlanner(address, timeout=0.1)
    for greeting in ("hello", b"\x90", b"\xc1"):
        with pretender(lambda _: None, greeting) as (address, _), pytest.raises(ServerError, match=r"metadata|read"):
            RemotePlanner(address)


def test_tokens(monkeypatch):
    monkeypatch.delenv("SELFFLOW_TOKEN", raising=False)
    with serving(Digest(), token="secret") as server:
        with pytest.raises(ServerError, match=r"a token is needed\. Set SELFFLOW_TOKEN"):
            RemotePlanner(server.address)
        with pytest.raises(ServerError, match="the token was refused"):
            RemotePlanner(server.address, token="wrong")
        monkeypatch.setenv("SELFFLOW_TOKEN", "secret")
        with RemotePlanner(server.address) as planner:
            assert planner.ours


def test_a_server_with_too_many_clients():
    with (
        serving(Digest(), limits=Limits(clients=1)) as server,
        RemotePlanner(server.address),
        pytest.raises(ServerError, match="status 503 busy: 1 clients"),
    ):
        RemotePlanner(server.address)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl: install it")
def test_certificates(tmp_path):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key -out cert"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    policy, cert = Digest(), str(tmp_path / "cert")
    with serving(policy, tls=tls_context(cert, str(tmp_path / "key"))) as server:
        with pytest.raises(ServerError, match="name the file"):
            RemotePlanner(server.address)
        with RemotePlanner(server.address, certificate=cert) as planner:
            assert np.array_equal(episode(planner), episode(policy))
        with pytest.raises(ServerError, match="ws:// or wss://"):
            RemotePlanner(server.address.replace("wss", "ws"), timeout=1)


def test_versions_and_contracts_that_differ():
    said = describe(Digest())
    for change, error in (
        ({"version": 2}, "speaks version 2 of the protocol, this is 1"),
        ({"action": {"names": ["x"]}}, "another action contract"),
        ({"layout": {"depth": 3}}, "describes a layout"),
        ({"layout": 3}, "describes a layout"),
    ):
        with (
            pretender(lambda _: None, wire.pack(said | change)) as (address, _),
            pytest.raises(ServerError, match=error),
        ):
            RemotePlanner(address)


# -- servers of others -------------------------------------------------------------------------------------------------


def test_another_projects_server():
    """Names and convention of its own; here the gripper is -1 (open) to 1, and there is an eighth number."""
    chunk = np.arange(32, dtype=np.float64).reshape(4, 8) / 100

    def convert(actions):
        return np.concatenate([actions[:, :6], (1 - actions[:, 6:7]) / 2], 1)

    foreign = Foreign(3, "cam", "joints", "task", "action_chunk", convert=convert)
    answer = wire.pack({"action_chunk": chunk})
    with pretender(lambda _: answer) as (address, got), RemotePlanner(address, foreign=foreign) as planner:
        acted = episode(planner, (9, 5), execute=3)
    assert acted.shape == (7, 7) and acted.dtype == np.float32
    assert np.allclose(acted[:3, :6], chunk[:3, :6]) and np.allclose(acted[:3, 6], (1 - chunk[:3, 6]) / 2)
    first = wire.unpack(got[0])
    assert first.keys() == {"cam", "joints", "task"} and first["task"] == "open"
    assert np.array_equal(first["cam"], observation(0, "", 9, 5)["images"]["overhead"])
    assert np.array_equal(first["joints"], observation(0, "", 9, 5)["proprio"])


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"action": np.zeros((1, 7))}, "sent action and no 'actions'"),
        ({"actions": [[0.0] * 7]}, r"should be numbers \(H, A\), got list"),
        ({"actions": np.zeros((1, 6))}, r"wanted at least \(1, 7\)"),
        ({"actions": np.zeros((0, 7))}, r"wanted at least \(1, 7\)"),
        ({"actions": np.full((1, 7), np.nan)}, "not finite"),
    ],
)
def test_answers_of_others_that_make_no_sense(answer, error):
    with (
        pretender(lambda _: wire.pack(answer)) as (address, _),
        RemotePlanner(address, foreign=Foreign()) as planner,
        pytest.raises(ServerError, match=error),
    ):
        planner.plan([observation()], (0, 0))


def test_a_server_of_others_needs_names():
    with pretender(lambda _: None) as (address, _), pytest.raises(ServerError, match="how it names things"):
        RemotePlanner(address)
    with pretender(lambda _: None) as (address, _), RemotePlanner(address, foreign=Foreign()) as planner:
        with pytest.raises(ValueError, match="there are a, b"):
            planner.check({"images": {"a": None, "b": None}})
        with pytest.raises(ServerError, match="takes no committed actions"):
            planner.plan([observation()], (0, 0), np.zeros((1, 7), np.float32))


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_knows_what_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.eval_simpler.Workers", InlineWorkers)
    policy = Digest(past=(0,))

    def start(cfg, identity, folder):
        from experiments.eval_simpler import partial, run_episode

        chunked = ChunkedPolicy(connect(cfg), execute=cfg.execute)
        return partial(run_episode, LineEnv(width=8, height=6), lambda seed: Seen(chunked), cfg, folder)

    with pytest.raises(ValueError, match="needs --server"):
        identify(EvalConfig(policy="remote"))
    with serving(policy, describe(policy, "my_run") | {"checkpoint_hash": "ab"}) as server:
        cfg = EvalConfig(policy="remote", server=server.address, episodes=1, name="far", width=8, height=6, video=False)
        results = evaluate(cfg, start)
    assert results["policy"] == "remote" and results["checkpoint_hash"] == "ab" and len(results["episodes"]) == 1
    assert results["policy_settings"] == {
        "server": server.address, "execute": 2, "checkpoint": "my_run", "sample_steps": None, "temperature": None,
        "imagination": None,
    }  # fmt: skip
    assert sum(policy.sizes) == results["episodes"][0]["steps"] / 2
    other = describe(policy, "my_run") | {"checkpoint_hash": "cd"}
    error = "measured another checkpoint_hash: ab, now cd"
    with serving(policy, other, port=server.port), pytest.raises(ValueError, match=error):
        evaluate(cfg, start)
    json.loads((tmp_path / "runs/far/results.json").read_text())


class Seen:
    """The line world's observations, as the policy's view names them."""

    def __init__(self, policy):
        self.policy = policy

    def reset(self, instruction=""):
        self.policy.reset("open")

    def act(self, seen):
        image = next(iter(seen["images"].values()))
        proprio = np.resize(np.asarray(seen["proprio"], np.float32), 10)
        return self.policy.act({"images": {"overhead": image}, "proprio": proprio, "instruction": "open"})


def test_requests_are_those_of_the_protocol():
    """What the client sends, field by field."""
    policy = Digest()
    answer = wire.pack({"actions": np.zeros((3, 7), np.float32)})
    with pretender(lambda _: answer, wire.pack(describe(policy))) as (address, got), RemotePlanner(address) as planner:
        planner.plan([observation(n) for n in range(3)], (5, 6), np.ones((1, 7), np.float32))
    sent = wire.unpack(got[0])
    assert sent.keys() == {"images", "proprio", "prompt", "key", "past", "committed"}
    assert sent["key"] == [5, 6] and sent["prompt"] == "open" and sent["committed"].tolist() == [[1] * 7]
    assert [item.keys() for item in sent["past"]] == [{"images", "proprio", "prompt"}] * 2
    assert np.array_equal(sent["proprio"], message(2)["proprio"])
    assert np.array_equal(sent["past"][1]["images"]["overhead"], message(1)["images"]["overhead"])
