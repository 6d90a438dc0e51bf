"""The policy server: right answers whoever else is connected, and no message that takes it down."""

import logging
import os
import pickle
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import msgpack
import numpy as np
import pytest
from served import Digest, message, observation
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from experiments.serve import exposed, read_token
from policies import wire
from policies.server import Limits, describe, serving, tls_context

ROOT = Path(__file__).resolve().parent.parent


def dial(server, token=None, **settings):
    """A client, and the metadata it was greeted with."""
    headers = {"Authorization": token} if token else None
    client = connect(
        server.address, additional_headers=headers, compression=None, max_size=None, **settings
    ).__enter__()
    return client, wire.unpack(client.recv(timeout=10))


@contextmanager
def client(server, **settings):
    connection, _ = dial(server, **settings)
    with connection:
        yield connection


def ask(connection, request):
    """The actions, or the error as text."""
    connection.send(request if isinstance(request, bytes | str) else wire.pack(request))
    answer = connection.recv(timeout=10)
    return answer if isinstance(answer, str) else wire.unpack(answer)["actions"]


def get(server, path, token=None):
    request = urllib.request.Request(server.address.replace("ws", "http", 1) + path)
    if token:
        request.add_header("Authorization", token)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, answer.read().decode()


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_greeting_says_what_is_expected():
    policy = Digest()
    policy.manifest = {"sha256": "ab" * 32, "kind": "finetune", "step": 7}
    with serving(policy, describe(policy, "my_run")) as server:
        connection, greeting = dial(server)
        connection.close()
    assert greeting["protocol"] == "selfflow_robot" and greeting["version"] == 1
    assert greeting["checkpoint"] == "my_run" and greeting["checkpoint_hash"] == "ab" * 32
    assert greeting["layout"]["past"] == [-2, -1, 0] and greeting["layout"]["horizon"] == 3
    assert greeting["images"] == {"overhead": {"dtype": "uint8", "shape": [6, 8, 3]}}
    assert greeting["action"]["names"][-1] == "gripper" and len(greeting["proprio"]) == 10


def test_recorded_bytes_of_a_request_and_its_answer():
    """Independent of our packing: what goes over the wire is written out."""
    fixed = np.arange(21, dtype="<f4").reshape(3, 7)
    policy = Digest(past=(0,))
    policy.plans = lambda requests: [policy.plan([observation()], (0, 0))._replace(actions=fixed)] * len(requests)
    image, state = bytes(range(144)), np.arange(10, dtype="<f4").tobytes()
    request = (
        b"\x83\xb1observation/image\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x90" + image + b"\xc4\x05dtype\xa3|u1"
        b"\xc4\x05shape\x93\x06\x08\x03\xb1observation/state\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x28" + state
        + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x0a\xa6prompt\xa4open"
    )  # fmt: skip
    with serving(policy) as server, client(server) as connection:
        connection.send(request)
        answer = connection.recv(timeout=10)
    begin = b"\x82\xa7actions\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x54" + fixed.tobytes()
    begin += b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x03\x07\xadserver_timing\x82\xa8infer_ms\xcb"
    assert answer.startswith(begin)
    assert msgpack.unpackb(answer[len(begin) - 1 :][:9]) >= 0  # ms
    assert answer[len(begin) + 8 :].startswith(b"\xa8queue_ms\xcb")


def test_history_step_and_instruction_are_the_connections():
    policy = Digest()
    seen = [observation(n) for n in range(5)]
    with serving(policy) as server, client(server) as connection, client(server) as other:
        assert np.array_equal(ask(connection, message(0)), policy.plan([seen[0]] * 3, (0, 0)).actions)
        unnamed = {k: v for k, v in message(1).items() if k != "prompt"}  # the instruction is remembered
        assert np.array_equal(ask(connection, unnamed), policy.plan([seen[0], seen[0], seen[1]], (0, 1)).actions)
        assert ask(other, unnamed) == "prompt: missing; a connection's first request brings one"
        assert ask(connection, message(2, proprio=np.zeros(3, np.float32))).startswith("observation proprio")
        assert np.array_equal(ask(connection, message(2)), policy.plan(seen[:3], (0, 2)).actions)  # refused: no trace
        assert np.array_equal(ask(connection, message(3)), policy.plan(seen[1:4], (0, 3)).actions)
        assert np.array_equal(ask(connection, message(4, reset=True)), policy.plan([seen[4]] * 3, (0, 0)).actions)
        placed = [observation(1, "open"), observation(2, "place"), observation(3, "place")]
        bare = {k: v for k, v in message(2).items() if k != "prompt"}  # with the request's own
        request = message(3, "place", key=[5, 40], past=[message(1), bare])
        assert np.array_equal(ask(connection, request), policy.plan(placed, (5, 40)).actions)
        committed = np.ones((2, 7), np.float32)
        request = message(0, reset=True, key=np.array([1, 2]), committed=committed)
        assert np.array_equal(ask(connection, request), policy.plan([seen[0]] * 3, (1, 2), committed).actions)


def test_openpis_flat_names_mean_the_same():
    with serving(Digest()) as server:
        with client(server) as connection:
            nested = [ask(connection, message(n)) for n in range(3)]
        with client(server) as connection:
            for n in range(3):
                made = observation(n)
                flat = {"observation/image": made["images"]["overhead"], "prompt": "open"}
                state = made["proprio"].astype(np.float64) if n else made["proprio"]  # NumPy's default is welcome
                assert np.array_equal(ask(connection, {**flat, "observation/state": state}), nested[n])
            again = {**flat, "observation/state": state, "key": [0, 2], "reset": True}
            assert np.array_equal(ask(connection, again), Digest().plan([observation(2)] * 3, (0, 2)).actions)


def test_the_imagined_video_comes_along():
    policy = Digest(past=(0,), video=True)
    with serving(policy) as server, client(server) as connection:
        connection.send(wire.pack(message(0)))
        answer = wire.unpack(connection.recv(timeout=10))
    assert np.array_equal(answer["video"], policy.plan([observation(0)], (0, 0)).video)


def test_interleaved_clients_do_not_mix():
    """Bit-equal to each running alone, whatever batches they fall into."""
    policy = Digest()

    def episode(server, number, answers):
        with client(server) as connection:
            for n in range(30):
                request = message(100 * number + n, f"task {number}", reset=n % 10 == 0)
                answers.setdefault(number, []).append(ask(connection, request))

    alone, together = {}, {}
    with serving(policy) as server:
        for number in range(3):
            episode(server, number, alone)
        policy.sizes.clear()
        threads = [threading.Thread(target=episode, args=(server, number, together)) for number in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert max(policy.sizes) > 1 and sum(policy.sizes) == 90
    for number in range(3):
        assert np.array_equal(alone[number], together[number])
    assert not np.array_equal(alone[0], alone[1])


@contextmanager
def held(policy, server, requests):
    """Clients whose requests wait behind a plan that does not end before the block does; yields their answers."""
    policy.gate.clear(), policy.began.clear()
    clients = [dial(server)[0] for _ in range(len(requests) + 1)]
    clients[0].send(wire.pack(message(99)))
    assert policy.began.wait(10)
    for number, (connection, request) in enumerate(zip(clients[1:], requests), 1):
        connection.send(wire.pack(request))
        until(lambda number=number: server.batcher.waiting.qsize() >= min(number, server.limits.queue))
    answers = []
    yield clients, answers
    policy.gate.set()
    for connection in clients:
        answer = connection.recv(timeout=10)
        answers.append(answer if isinstance(answer, str) else wire.unpack(answer)["actions"])
        connection.close()


def test_requests_are_planned_together():
    policy = Digest(past=(0,))
    with serving(policy, limits=Limits(max_batch=3)) as server:
        with held(policy, server, [message(n) for n in range(4)]) as (_, answers):
            pass
        text = get(server, "/metrics")[1]
    assert policy.sizes[1] == 3 and sum(policy.sizes) == 5
    for n, answer in enumerate(answers[1:]):
        assert np.array_equal(answer, policy.plan([observation(n)], (0, 0)).actions)
    assert "selfflow_batch_size_max 3" in text and "selfflow_requests_total 5" in text


def test_a_request_that_fails_costs_the_others_nothing(caplog):
    policy = Digest(past=(0,))
    with serving(policy) as server:
        requests = [message(1), message(2, key=[13, 0]), message(3)]
        with held(policy, server, requests) as (_, answers):
            pass
    assert answers[2] == "the server failed: OSError: unlucky"
    assert np.array_equal(answers[1], policy.plan([observation(1)], (0, 0)).actions)
    assert np.array_equal(answers[3], policy.plan([observation(3)], (0, 0)).actions)
    assert server.metrics.errors == {"internal": 1}


def test_plans_that_are_not_finite_are_not_sent():
    policy = Digest(past=(0,))
    nothing = policy.plan([observation()], (0, 0))._replace(actions=np.full((3, 7), np.nan, np.float32))
    policy.plans = lambda requests: [nothing] * len(requests)
    with serving(policy) as server, client(server) as connection:
        assert "the planned actions are not finite" in ask(connection, message())


def test_alone_nobody_waits_for_company():
    with serving(Digest(past=(0,)), limits=Limits(wait=30.0)) as server, client(server) as connection:
        began = time.monotonic()
        ask(connection, message())
        assert time.monotonic() - began < 10


# -- bad clients -------------------------------------------------------------------------------------------------------

PICTURE = observation()["images"]["overhead"]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("text", "a request is msgpack in a binary frame, got a text frame"),
        (b"", "not a msgpack message"),
        (pickle.dumps({"prompt": "open"}), "not a msgpack message"),
        (msgpack.packb([1, 2]), "a request is a map, got a list"),
        ({}, "images: missing"),
        ({"prompt": "open", "images": {}}, "proprio: missing"),
        (message(promt="open"), "unknown field 'promt'; there are committed, images, key"),
        ({"observation/image": PICTURE, "prompt": "open"}, "observation/state: missing"),
        (
            {"observation/image": PICTURE, "observation/state": np.zeros(10), "observation/wrist_image": PICTURE},
            "unknown field 'observation/wrist_image'; there are key, observation/image",
        ),
        (message(images=[PICTURE]), "images: expected a map"),
        (message(images={"overhead": "png"}), "images['overhead']: expected an array, got a str"),
        (message(images={"wrist": PICTURE}), "view 'overhead' expected by the checkpoint, got wrist"),
        (message(images={"overhead": PICTURE[:3]}), "expects uint8 (6, 8, 3), got uint8 (3, 8, 3)"),
        (message(images={"overhead": PICTURE / 255}), "expects uint8 (6, 8, 3), got float64"),
        (message(proprio=[0.0] * 10), "proprio: expected an array, got a list"),
        (message(proprio=np.zeros(9, np.float32)), "proprio: the checkpoint expects float32 (10,)"),
        (message(proprio=np.full(10, np.nan, np.float32)), "proprio: not finite"),
        (message(prompt=3), "prompt: expected text, got a int"),
        (message(prompt="x" * 17), "at most 16 bytes"),
        (message(prompt="x" * 100000), "..."),
        (message(reset=2), "reset: true or false"),
        (message(key=[1]), "key: two whole numbers"),
        (message(key=[-1, 0]), "key: seed and control step are at least 0"),
        (message(key=[0, 2**63]), "key: seed and control step"),
        (message(key=[0.0, 1.0]), "key: two whole numbers"),
        (message(committed=np.zeros((3, 7), np.float32)), "committed: expected (k, 7) with k less than 3"),
        (message(committed=np.zeros((1, 7))), "committed: expected float32"),
        (message(committed=np.full((1, 7), np.inf, np.float32)), "committed: not finite"),
        (message(past=[]), "past: expected the 2 observations at (-2, -1) steps"),
        (message(past=[message(), {"images": {}}]), "past[1]: proprio: missing"),
        (message(past=[message(), message(images={})]), "view 'overhead' expected by the checkpoint, got none"),
        ({b"__ndarray__": True}, "message: an array has exactly"),
        (message(proprio={b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": [0]}), "proprio: dtype 'O'"),
    ],
)
def test_errors_name_the_field_and_the_connection_goes_on(request_, error, shared):
    policy, server = shared
    with client(server) as connection:
        answer = ask(connection, request_)
        assert isinstance(answer, str) and error in answer and len(answer) < 600
        assert np.array_equal(ask(connection, message(1)), policy.plan([observation(1)] * 3, (0, 0)).actions)


@pytest.fixture(scope="module")
def shared():
    policy = Digest()
    with serving(policy) as server:
        yield policy, server


def test_a_message_too_large_ends_its_connection_alone():
    policy = Digest(past=(0,))
    with serving(policy, limits=Limits(message=1 << 16)) as server, client(server) as good:
        with client(server) as bad:
            bad.send(b"\xc6" + (1 << 17).to_bytes(4, "big") + bytes(1 << 17))
            with pytest.raises(ConnectionClosed) as closed:
                bad.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
        assert np.array_equal(ask(good, message()), policy.plan([observation()], (0, 0)).actions)
        until(lambda: server.metrics.errors["oversized"] == 1)


def test_a_full_queue_says_busy():
    policy = Digest(past=(0,))
    with serving(policy, limits=Limits(queue=1)) as server:
        with held(policy, server, [message(1)]) as (_, answers), client(server) as third:
            assert ask(third, message(2)) == "busy: 1 requests are waiting; ask again"
        with client(server) as third:
            assert np.array_equal(ask(third, message(2)), policy.plan([observation(2)], (0, 0)).actions)
    assert np.array_equal(answers[1], policy.plan([observation(1)], (0, 0)).actions)
    assert server.metrics.errors == {"busy": 1}


def test_a_plan_that_takes_too_long():
    policy = Digest(past=(0,))
    with serving(policy, limits=Limits(plan=0.1)) as server, client(server) as connection:
        policy.gate.clear()
        assert ask(connection, message(1)) == "no plan within 0.1 s; ask again"
        until(lambda: server.batcher.stuck)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(server, "/healthz")
        policy.gate.set()
        until(lambda: not server.batcher.stuck)
        assert get(server, "/healthz") == (200, "OK\n")
        assert np.array_equal(ask(connection, message(1)), policy.plan([observation(1)], (0, 0)).actions)


def test_a_client_that_leaves_in_the_middle_is_forgotten():
    policy = Digest(past=(0,))
    with serving(policy) as server:
        with held(policy, server, [message(1), message(2)]) as (clients, answers):
            clients.pop(1).socket.shutdown(socket.SHUT_RDWR)
            until(lambda: sum(c.state.name == "OPEN" for c in server.connections) == 2)
        assert np.array_equal(answers[1], policy.plan([observation(2)], (0, 0)).actions)
        until(lambda: not server.connections)
    assert sum(policy.sizes) == 2  # nothing was planned for it
    assert not server.metrics.errors


def test_a_client_that_does_not_read_is_dropped():
    policy = Digest(past=(0,), horizon=100_000)  # an answer of 2.8 MB
    with serving(policy, limits=Limits(send=0.2)) as server, client(server) as good:
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(HANDSHAKE % server.port + frame(wire.pack(message())) * 4)
            until(lambda: server.metrics.errors["slow"] == 1)
        assert np.array_equal(ask(good, message(1)), policy.plan([observation(1)], (0, 0)).actions)
        until(lambda: len(server.connections) == 1)


def test_a_client_that_says_nothing_is_dropped():
    with serving(Digest(), limits=Limits(idle=0.1)) as server:
        connection, _ = dial(server)
        with pytest.raises(ConnectionClosed, match="idle"):
            connection.recv(timeout=10)
        assert server.metrics.errors == {"idle": 1}


def test_only_so_many_clients():
    with serving(Digest(), limits=Limits(clients=1)) as server, client(server):
        with pytest.raises(InvalidStatus) as refused:
            connect(server.address).__enter__()
        assert refused.value.response.status_code == 503


def test_token():
    with serving(Digest(past=(0,)), token="secret") as server:
        for token in (None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secretx", "Bearer \xe9"):
            with pytest.raises(InvalidStatus) as refused:
                dial(server, token)
            assert refused.value.response.status_code == 401
        for token in ("Bearer secret", "Api-Key secret", "bearer secret"):
            with client(server, token=token) as connection:
                assert ask(connection, message()).shape == (3, 7)
        assert get(server, "/healthz")[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")
        assert 'selfflow_errors_total{kind="unauthorized"} 8' in get(server, "/metrics", "Bearer secret")[1]


def test_web_pages_cannot_reach_it():
    with serving(Digest()) as server, pytest.raises(InvalidStatus) as refused:
        connect(server.address, origin="http://evil.example").__enter__()
    assert refused.value.response.status_code == 403


def test_metrics():
    policy = Digest(past=(0,))
    with serving(policy) as server, client(server) as connection:
        ask(connection, message()), ask(connection, message()), ask(connection, "text"), ask(connection, message(key=1))
        lines = get(server, "/metrics")[1].splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert {"selfflow_requests_total": "4", "selfflow_batches_total": "2", "selfflow_clients": "1"}.items() <= (
        values.items()
    )
    assert values['selfflow_errors_total{kind="message"}'] == "1"
    assert values['selfflow_errors_total{kind="request"}'] == "1"
    assert 0 < float(values['selfflow_latency_seconds{quantile="0.5"}']) < 10
    assert float(values['selfflow_latency_seconds{quantile="0.95"}']) <= float(values["selfflow_latency_seconds_sum"])
    assert values["selfflow_latency_seconds_count"] == "2" and values["selfflow_queue_length"] == "0"


def test_stopping_answers_what_is_in_work():
    policy = Digest(past=(0,))
    with serving(policy) as server:
        (idle, _), (working, _) = dial(server), dial(server)
        policy.gate.clear()
        working.send(wire.pack(message()))
        assert policy.began.wait(10)
        server.stop()
        with pytest.raises(ConnectionClosed, match="the server stops"):
            idle.recv(timeout=10)
        policy.gate.set()
        answer = wire.unpack(working.recv(timeout=10))
        assert np.array_equal(answer["actions"], policy.plan([observation()], (0, 0)).actions)
        with pytest.raises(ConnectionClosed, match="the server stops"):
            working.recv(timeout=10)
        with pytest.raises(OSError):
            connect(server.address).__enter__()


def test_a_port_in_use_is_an_error():
    with serving(Digest()) as server, pytest.raises(OSError), serving(Digest(), port=server.port):
        pass


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl: install it")
def test_tls(tmp_path):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key -out cert"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    tls = tls_context(str(tmp_path / "cert"), str(tmp_path / "key"))
    with serving(Digest(past=(0,)), tls=tls) as server:
        assert server.address.startswith("wss://")
        trusting = ssl.create_default_context(cafile=tmp_path / "cert")
        with client(server, ssl=trusting) as connection:
            assert ask(connection, message()).shape == (3, 7)
        with pytest.raises(ssl.SSLError):
            connect(server.address).__enter__()
    with pytest.raises(ValueError, match="nowhere"):
        tls_context(str(tmp_path / "nowhere"))


# -- fuzz --------------------------------------------------------------------------------------------------------------

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(payload: bytes, opcode=2) -> bytes:
    """A masked websocket frame (mask 0)."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


VALID = wire.pack(message(0, committed=np.ones((1, 7), np.float32), key=[1, 2], past=[message(1), message(2)]))


def fuzzed(rng: random.Random) -> bytes | str:
    """One message that is probably bad."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return VALID[: rng.randrange(len(VALID))]
    if kind == 2:  # some bytes are others
        data = bytearray(VALID)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 3:  # a piece is cut out, or put in twice
        a, b = sorted(rng.sample(range(len(VALID)), 2))
        return VALID[:a] + (VALID[b:] if rng.random() < 0.5 else VALID[:b] + VALID[a:b] + VALID[b:])
    if kind == 4:  # deep
        return rng.choice((b"\x91", b"\x81\xa1a", b"\xdc\x04\x00", b"\x81\xc4\x01a")) * rng.choice((9, 500, 3000))
    if kind == 5:  # lengths and shapes that are lies
        header = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
        lie = {
            b"__ndarray__": True,
            b"data": b"",
            b"dtype": "<f4",
            b"shape": [2 ** rng.randrange(64)] * rng.choice((1, 4)),
        }
        return rng.choice((header + rng.randbytes(4), wire.pack(message(proprio=lie)), wire.pack({"images": lie})))
    return rng.choice(("", "open", pickle.dumps(message()), wire.pack({"reset": True}), "\N{ROBOT FACE}" * 50))


def test_ten_thousand_bad_messages(caplog):
    """None takes the server down or goes without an answer, and a good client gets every answer right meanwhile."""
    caplog.set_level(logging.WARNING)
    rng, policy = random.Random(0), Digest()
    expected = [policy.plan([observation(n)] * 3, (0, 0)).actions for n in range(8)]
    right, wrong, over = [], [], threading.Event()

    def behave(server):
        with client(server) as connection:
            while not over.is_set():
                n = len(right) % 8
                answer = ask(connection, message(n, reset=True))
                (right if isinstance(answer, np.ndarray) and np.array_equal(answer, expected[n]) else wrong).append(n)
                time.sleep(0.002)

    bad, burst, sent, answered = None, 25, 0, 0
    with serving(policy, limits=Limits(message=1 << 16)) as server:
        good = threading.Thread(target=behave, args=(server,))
        good.start()
        while sent < 10_000:
            if bad is None:
                bad, _ = dial(server)
            for _ in range(burst):
                bad.send(fuzzed(rng))
            for _ in range(burst):
                assert isinstance(bad.recv(timeout=10), str | bytes)
            sent, answered = sent + burst, answered + burst
            if sent % 500 == 0:  # beside the protocol: too large, bytes that are no frames, no websocket at all
                bad.send(bytes(1 << 17))
                bad = None
                for garbage in (
                    rng.randbytes(300),
                    HANDSHAKE % server.port + rng.randbytes(300),
                    b"GET / HTTP/1.1\r\n",
                ):
                    with socket.create_connection(("127.0.0.1", server.port)) as raw:
                        raw.sendall(garbage)
        over.set()
        good.join(20)
        text = get(server, "/metrics")[1]
        until(lambda: not server.connections)
    assert sent == answered == 10_000 and not wrong and len(right) > 100
    assert set(server.metrics.errors) == {"message", "request", "oversized"}, text
    assert server.metrics.errors["oversized"] == 20
    assert not caplog.records


# -- the real ones -----------------------------------------------------------------------------------------------------


@pytest.fixture
def openpi(monkeypatch):
    """The published client, unmodified."""
    if folder := os.environ.get("OPENPI_CLIENT"):
        monkeypatch.syspath_prepend(folder)
    reason = "pip install --no-deps --target FOLDER openpi-client, then OPENPI_CLIENT=FOLDER (it pins NumPy below 2)"
    return pytest.importorskip("openpi_client.websocket_client_policy", reason=reason)


def test_the_published_openpi_client(openpi):
    policy = Digest(past=(0,))
    with serving(policy, token="secret") as server:
        robot = openpi.WebsocketClientPolicy("127.0.0.1", server.port, api_key="secret")
        assert robot.get_server_metadata()["protocol"] == "selfflow_robot"
        for n in range(3):
            made = observation(n)
            flat = {"observation/image": made["images"]["overhead"], "observation/state": made["proprio"]}
            answer = robot.infer({**flat, "prompt": "open"})
            assert np.array_equal(answer["actions"], policy.plan([made], (0, n)).actions)
            assert answer["server_timing"]["infer_ms"] >= 0
        assert np.array_equal(robot.infer(message(5))["actions"], policy.plan([observation(5)], (0, 3)).actions)
        with pytest.raises(RuntimeError, match="observation proprio"):
            robot.infer({**flat, "prompt": "open", "observation/state": np.zeros(3, np.float32)})
        assert robot.infer({**flat, "prompt": "open"})["actions"].shape == (3, 7)


@pytest.mark.parametrize(
    ("host", "token", "tls", "words"),
    [
        ("127.0.0.1", None, False, None),
        ("0.0.0.0", None, False, "without a token"),
        ("0.0.0.0", "x", False, "without TLS"),
        ("10.0.0.1", "x", True, None),
    ],
)
def test_exposed_addresses_are_warned_of(host, token, tls, words):
    said = exposed(host, token, tls)
    assert said is None if words is None else words in said


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFFLOW_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("SELFFLOW_TOKEN", "from-environment")
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(None) == "from-environment" and read_token(str(tmp_path / "token")) == "from-file"
    for bad in ("", "two words", "caf\xe9"):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(ValueError, match="one word of printable ASCII"):
            read_token(str(tmp_path / "token"))


def test_the_script_serves_a_checkpoint_until_it_is_told_to_stop(tmp_path):
    import torch

    from policies import load_policy
    from policies.chunking import ChunkedPolicy
    from policies.remote import RemotePlanner
    from tests.synthetic import save_run

    save_run(tmp_path / "my_run")
    (tmp_path / "token").write_text("secret\n")
    command = [sys.executable, ROOT / "experiments/serve.py", "--checkpoint", tmp_path / "my_run", "--port", "0"]
    threads = str(torch.get_num_threads())  # as here: float32 rounds differently with other numbers of them
    command += ["--token_file", tmp_path / "token", "--sample_steps", "2", "--threads", threads]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            first = process.stdout.readline()
            assert first.startswith("ws://127.0.0.1:") and "my_run" in first
            planner = RemotePlanner(first.split()[0], token="secret")
            assert planner.metadata["checkpoint"] == "my_run" and planner.metadata["sample_steps"] == 2
            remote = ChunkedPolicy(planner, execute=2)
            here = load_policy(tmp_path / "my_run", execute=2, steps=2)
            seen = [observation(n, "open", 32, 48) for n in range(4)]
            assert np.array_equal([remote.act(o) for o in seen], [here.act(o) for o in seen])
            planner.close()
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            process.wait(20)
    assert process.returncode == 0 and rest.endswith("stopped\n")
    for part in ("uint8 (32, 48, 3)", "float32 (3, 7)", "metres and radians", "api_key=TOKEN", "/healthz"):
        assert part in rest
