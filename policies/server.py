"""A policy as a server: many robots, one batch. Websocket and msgpack-numpy, as openpi's clients speak them.

On connecting a client gets the metadata; then every request is answered by a map, or by text, which is an error. What a
connection was told before (instruction, earlier observations, how many requests) stays with that connection; requests
of all of them are planned together by one worker thread. See docs/serving.md.
"""

import asyncio
import hmac
import logging
import queue
import signal
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from policies import wire
from policies.flow_policy import Plan, Request
from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_NAMES, Observation
from selfflow_robot.tokens import ACTION_CONTRACT, Layout

PROTOCOL, VERSION = "selfflow_robot", 1
BUSY = "busy:"  # how the one error begins that asking again cures
OURS = {"images", "proprio", "prompt", "reset", "key", "committed", "past"}
OPENPI = {"observation/image", "observation/state", "prompt", "reset", "key"}
LARGEST_KEY = 2**63
MAX_ERROR = 500  # characters of an error
REMEMBERED = 2048  # latest requests that the quantiles are of

log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.websockets")  # a stranger's broken handshake is no news, and counted below
_quiet.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Limits:
    max_batch: int = 8  # requests planned together
    wait: float = 0.003  # s that the first of a batch waits for others, where there are other clients
    queue: int = 32  # requests waiting; more are told "busy"
    clients: int = 64
    message: int = 16 << 20  # bytes of a request
    plan: float = 30.0  # s from a request to its plan
    send: float = 10.0  # s a client may take to read an answer
    idle: float = 1800.0  # s between a client's requests
    stop: float = 5.0  # s for requests in work when the server is told to stop

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < (0 if name == "wait" else 1e-3):
                raise ValueError(f"{name} must be positive, got {value}")


# -- requests: pure functions ------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What one message says."""

    observation: dict[str, Any]  # an Observation but for the instruction, which is None where absent
    reset: bool
    key: tuple[int, int] | None
    committed: np.ndarray | None
    past: list[dict[str, Any]] | None


class Session(NamedTuple):
    """What a connection remembers. An answered request makes the next one; a refused request changes nothing."""

    instruction: str | None = None
    history: tuple[Observation, ...] = ()
    step: int = 0  # requests answered in this episode


def parse(message: Any, layout: Layout) -> Asked:
    """Raises ValueError naming the field. Whether images and proprio fit the checkpoint, `policy.check` says."""
    if not isinstance(message, dict):
        raise ValueError(f"a request is a map, got a {type(message).__name__}")
    flat = any(isinstance(name, str) and "/" in name for name in message)
    known = OPENPI if flat else OURS
    if unknown := [name for name in message if name not in known]:
        raise ValueError(f"unknown field {str(unknown[0])[:40]!r}; there are {', '.join(sorted(known))}")
    if flat:
        if missing := sorted({"observation/image", "observation/state"} - set(message)):
            raise ValueError(f"{missing[0]}: missing")
        state = message["observation/state"]
        if isinstance(state, np.ndarray) and state.dtype == np.float64:  # what NumPy makes of a list
            state = state.astype(np.float32)
        rest = {name: message[name] for name in ("prompt", "reset", "key") if name in message}
        message = {"images": {layout.view: message["observation/image"]}, "proprio": state, **rest}
    reset, key, committed, past = (message.get(name) for name in ("reset", "key", "committed", "past"))
    if reset not in (None, True, False):
        raise ValueError("reset: true or false")
    if key is not None:
        key = key.tolist() if isinstance(key, np.ndarray) else key
        if not isinstance(key, list) or len(key) != 2 or any(type(n) is not int for n in key):
            raise ValueError("key: two whole numbers, seed and control step")
        if not all(0 <= n < LARGEST_KEY for n in key):
            raise ValueError("key: seed and control step are at least 0 and less than 2**63")
    if committed is not None:
        if not isinstance(committed, np.ndarray) or committed.dtype != np.float32:
            raise ValueError("committed: expected float32 (k, 7)")
        if committed.ndim != 2 or committed.shape[1] != ACTION_DIM or len(committed) >= layout.horizon:
            raise ValueError(f"committed: expected (k, 7) with k less than {layout.horizon}, got {committed.shape}")
        if not np.isfinite(committed).all():
            raise ValueError("committed: not finite")
    if past is not None:
        if not isinstance(past, list) or len(past) != len(layout.past) - 1:
            raise ValueError(f"past: expected the {len(layout.past) - 1} observations at {layout.past[:-1]} steps")
        past = [_observation(item, layout, f"past[{index}]: ") for index, item in enumerate(past)]
    return Asked(_observation(message, layout), bool(reset), tuple(key) if key else None, committed, past)


def _observation(message: Any, layout: Layout, where: str = "") -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}an observation is a map")
    if missing := [name for name in ("images", "proprio") if name not in message]:
        raise ValueError(f"{where}{missing[0]}: missing")
    images, proprio, prompt = message["images"], message["proprio"], message.get("prompt")
    if not isinstance(images, dict) or not all(isinstance(name, str) for name in images):
        raise ValueError(f"{where}images: expected a map from view to uint8 (H, W, 3)")
    for view, image in images.items():
        if not isinstance(image, np.ndarray):
            raise ValueError(f"{where}images[{view[:40]!r}]: expected an array, got a {type(image).__name__}")
    if not isinstance(proprio, np.ndarray):
        raise ValueError(f"{where}proprio: expected an array, got a {type(proprio).__name__}")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}prompt: expected text, got a {type(prompt).__name__}")
    seen = {layout.view: images[layout.view]} if layout.view in images else images  # others are not remembered
    return {"images": seen, "proprio": proprio, "instruction": prompt}


def advance(session: Session, asked: Asked, layout: Layout) -> tuple[Request, Session]:
    """The plan to make, and what the connection remembers once it is made.

    Without `past` the history is that of the connection's requests, and its first observation stands for what came
    before, as in `ChunkedPolicy`. Without `key` the noise is that of seed 0 and the request's number.
    """
    if asked.reset:
        session = Session(session.instruction)
    now = asked.observation
    instruction = session.instruction if now["instruction"] is None else now["instruction"]
    if instruction is None:
        raise ValueError("prompt: missing; a connection's first request brings one")
    now = {**now, "instruction": instruction}
    history = [*session.history, now]
    if asked.past is None:
        given = [history[max(0, len(history) - 1 + offset)] for offset in layout.past]
    else:
        given = [item | ({"instruction": instruction} if item["instruction"] is None else {}) for item in asked.past]
        given.append(now)
    kept = tuple(history[layout.past[0] - 1 :])  # the oldest offset and all after it
    request = Request(given, asked.key or (0, session.step), asked.committed)
    return request, Session(instruction, kept, session.step + 1)


def describe(policy, name: str | None = None) -> dict:
    """The metadata a client gets: what the policy is, what it expects and what its actions mean."""
    layout, manifest = policy.layout, getattr(policy, "manifest", {})
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "checkpoint": name,
        "checkpoint_hash": manifest.get("sha256"),
        "kind": manifest.get("kind"),
        "code": manifest.get("code", {}),
        "layout": asdict(layout),
        "images": {layout.view: {"dtype": "uint8", "shape": [layout.height, layout.width, 3]}},
        "proprio": list(PROPRIO_NAMES),
        "action": ACTION_CONTRACT,
        "sample_steps": getattr(policy, "steps", None),
        "temperature": getattr(policy, "temperature", None),
        "imagination": getattr(policy, "imagination", None),
    }


# -- batches -----------------------------------------------------------------------------------------------------------


class Dropped(Exception):
    """The connection is over."""


@dataclass
class Job:
    request: Request
    future: asyncio.Future
    connected: Callable[[], bool]  # False once its client is gone
    since: float = field(default_factory=time.perf_counter)

    def wanted(self) -> bool:
        return not self.future.done() and self.connected()


class Planned(NamedTuple):
    plan: Plan
    queued: float  # s
    inferred: float  # s


class Batcher:
    """One thread that plans what is waiting, `max_batch` requests at a time.

    A thread, and a daemon: the network is answered while torch computes, and a plan that never ends cannot keep the
    process alive.
    """

    def __init__(self, plans: Callable, limits: Limits, clients: Callable[[], int], metrics: "Metrics"):
        self.plans, self.limits, self.clients, self.metrics = plans, limits, clients, metrics
        self.waiting: queue.Queue[Job | None] = queue.Queue(limits.queue)
        self.busy_since: float | None = None
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._work, name="plans", daemon=True).start()

    def submit(self, request: Request, connected: Callable[[], bool]) -> asyncio.Future:
        """The future `Planned`. Raises queue.Full."""
        job = Job(request, self.loop.create_future(), connected)
        self.waiting.put_nowait(job)
        return job.future

    def stop(self) -> None:
        with suppress(queue.Full):
            self.waiting.put_nowait(None)

    @property
    def stuck(self) -> bool:
        since = self.busy_since
        return since is not None and time.perf_counter() - since > self.limits.plan

    def _work(self) -> None:
        while (jobs := self._collect()) is not None:
            self.busy_since = time.perf_counter()
            wanted = []
            for job in jobs:
                if job.wanted():
                    wanted.append(job)
                else:
                    self._deliver(job.future, Dropped())
            if wanted:
                self._plan(wanted)
            self.busy_since = None

    def _collect(self) -> list[Job] | None:
        """What is waiting, and what comes within `wait`, while there are clients it may come from."""
        jobs, deadline = [self.waiting.get()], None
        while jobs[-1] is not None and len(jobs) < min(self.limits.max_batch, self.clients()):
            deadline = deadline or time.perf_counter() + self.limits.wait
            try:
                jobs.append(self.waiting.get(timeout=max(0.0, deadline - time.perf_counter())))
            except queue.Empty:
                break
        return None if jobs[-1] is None else jobs

    def _plan(self, jobs: list[Job]) -> None:
        began = time.perf_counter()
        try:
            plans = self.plans([job.request for job in jobs])
            if len(plans) != len(jobs):
                raise RuntimeError(f"{len(plans)} plans for {len(jobs)} requests")
        except Exception as error:
            if len(jobs) > 1:  # the request that is at fault must not cost the others their plan
                for job in jobs:
                    self._plan([job])
                return
            log.warning("a plan failed", exc_info=True)
            self._deliver(jobs[0].future, error)
            return
        inferred = time.perf_counter() - began
        self.metrics.batches.append(len(jobs))
        self.metrics.batch_count += 1
        for job, plan in zip(jobs, plans):
            self._deliver(job.future, Planned(plan, began - job.since, inferred))

    def _deliver(self, future: asyncio.Future, result: Planned | Exception) -> None:
        def put():
            if not future.done():
                future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(put)


# -- metrics -----------------------------------------------------------------------------------------------------------


class Metrics:
    """Counted by the event loop, batches by the worker."""

    def __init__(self):
        self.requests = 0
        self.errors: Counter[str] = Counter()
        self.latencies: deque[float] = deque(maxlen=REMEMBERED)  # s, from a request's arrival to its answer
        self.latency_sum, self.answered = 0.0, 0
        self.batches: deque[int] = deque(maxlen=REMEMBERED)
        self.batch_count = 0

    def answer(self, seconds: float) -> None:
        self.latencies.append(seconds)
        self.latency_sum += seconds
        self.answered += 1

    def text(self, waiting: int, clients: int) -> str:
        """Prometheus' text format."""
        batches = list(self.batches)
        lines = [
            "# TYPE selfflow_requests_total counter",
            f"selfflow_requests_total {self.requests}",
            "# TYPE selfflow_errors_total counter",
            *(f'selfflow_errors_total{{kind="{kind}"}} {n}' for kind, n in sorted(self.errors.items())),
            "# TYPE selfflow_latency_seconds summary",
            *(
                f'selfflow_latency_seconds{{quantile="{q}"}} {np.quantile(self.latencies, q):.6f}'
                for q in (0.5, 0.95)
                if self.latencies
            ),
            f"selfflow_latency_seconds_sum {self.latency_sum:.6f}",
            f"selfflow_latency_seconds_count {self.answered}",
            "# TYPE selfflow_batches_total counter",
            f"selfflow_batches_total {self.batch_count}",
            "# TYPE selfflow_batch_size_mean gauge",
            f"selfflow_batch_size_mean {np.mean(batches) if batches else 0:.3f}",
            "# TYPE selfflow_batch_size_max gauge",
            f"selfflow_batch_size_max {max(batches, default=0)}",
            "# TYPE selfflow_queue_length gauge",
            f"selfflow_queue_length {waiting}",
            "# TYPE selfflow_clients gauge",
            f"selfflow_clients {clients}",
        ]
        return "\n".join(lines) + "\n"


# -- the server --------------------------------------------------------------------------------------------------------


class PolicyServer:
    """policy: anything with `layout`, `check` and `plans`, as `flow_policy.FlowPolicy`."""

    def __init__(
        self,
        policy,
        metadata: dict | None = None,
        host: str = "127.0.0.1",
        port: int = 0,  # 0: a free one, known once it runs
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        limits: Limits = Limits(),
    ):
        self.policy, self.layout = policy, policy.layout
        self.host, self.port, self.token, self.tls, self.limits = host, port, token, tls, limits
        self.metadata = describe(policy) if metadata is None else metadata
        self.greeting = wire.pack(self.metadata)
        self.metrics = Metrics()
        self.connections: dict[ServerConnection, bool] = {}  # True while a request is in work
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls else 'ws'}://{host}:{self.port}"

    async def run(self, started: Callable[[], None] = lambda: None, signals: tuple[signal.Signals, ...] = ()) -> None:
        """Serve until `stop()`, or one of `signals`; requests in work are answered first. OSError: port in use."""
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        self.batcher = Batcher(self.policy.plans, self.limits, lambda: len(self.connections), self.metrics)
        for number in signals:
            self.loop.add_signal_handler(number, self.stopping.set)
        try:
            server = await serve(
                self._talk,
                self.host,
                self.port,
                ssl=self.tls,
                process_request=self._http,
                origins=[None],  # browsers send one: a web page must not reach the robot of who reads it
                compression=None,
                max_size=self.limits.message,
                max_queue=1,
                server_header=None,
                close_timeout=1,
                logger=_quiet,
            )
        except BaseException:
            self.batcher.stop()
            raise
        self.port = server.sockets[0].getsockname()[1]
        try:
            started()
            await self.stopping.wait()
        finally:
            server.close(close_connections=False)
            idle = [c.close(1001, "the server stops") for c, working in self.connections.items() if not working]
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*idle, self._drained()), self.limits.stop)
            for connection in list(self.connections):
                connection.transport.abort()
            self.batcher.stop()

    def stop(self) -> None:
        """From any thread."""
        if self.loop is not None:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.stopping.set)

    async def _drained(self) -> None:
        while self.connections:
            await asyncio.sleep(0.01)

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health and metrics; who may connect."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(503, "stuck\n") if self.batcher.stuck else connection.respond(200, "OK\n")
        if not self._allowed(request):
            self.metrics.errors["unauthorized"] += 1
            response = connection.respond(401, "A token is needed: Authorization: Bearer TOKEN\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if path == "/metrics":
            return connection.respond(200, self.metrics.text(self.batcher.waiting.qsize(), len(self.connections)))
        if len(self.connections) >= self.limits.clients:
            self.metrics.errors["full"] += 1
            return connection.respond(503, f"{BUSY} {self.limits.clients} clients are connected\n")
        return None

    def _allowed(self, request: HttpRequest) -> bool:
        if self.token is None:
            return True
        given = request.headers.get_all("Authorization")
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        same = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self.token.encode())
        return same and scheme.lower() in ("bearer", "api-key")  # the second is openpi-client's

    async def _talk(self, connection: ServerConnection) -> None:
        """One client, from greeting to goodbye."""
        session = Session()
        self.connections[connection] = False
        try:
            await self._send(connection, self.greeting)
            while not self.stopping.is_set():
                message = await self._receive(connection)
                self.connections[connection] = True
                answer, session = await self._answer(connection, message, session)
                await self._send(connection, answer)
                self.connections[connection] = False
            await connection.close(1001, "the server stops")
        except (Dropped, ConnectionClosed, OSError):
            pass
        except Exception:
            self.metrics.errors["internal"] += 1
            log.exception("a connection failed")
        finally:
            del self.connections[connection]

    async def _receive(self, connection: ServerConnection) -> bytes | str:
        try:
            return await asyncio.wait_for(connection.recv(), self.limits.idle)
        except asyncio.TimeoutError:
            self.metrics.errors["idle"] += 1
            await connection.close(1001, "idle")
            raise Dropped from None
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code in (1002, 1007, 1009):
                self.metrics.errors["oversized" if closed.sent.code == 1009 else "message"] += 1
            raise

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        try:
            await asyncio.wait_for(connection.send(data), self.limits.send)
        except asyncio.TimeoutError:  # it does not read: a goodbye would not be read either
            self.metrics.errors["slow"] += 1
            connection.transport.abort()
            raise Dropped from None

    async def _answer(
        self, connection: ServerConnection, message: bytes | str, session: Session
    ) -> tuple[bytes | str, Session]:
        """The answer (text: an error) and what the connection remembers from now on."""
        began = time.perf_counter()
        self.metrics.requests += 1
        try:
            if isinstance(message, str):
                raise wire.WireError("a request is msgpack in a binary frame, got a text frame")
            request, after = advance(session, parse(wire.unpack(message), self.layout), self.layout)
            for observation in request.history:
                self.policy.check(observation)
            future = self.batcher.submit(request, lambda: connection.state is State.OPEN)
            planned: Planned = await asyncio.wait_for(future, self.limits.plan)
            if not np.isfinite(planned.plan.actions).all():
                raise ArithmeticError("the planned actions are not finite")  # no robot should see them
            answer = {
                "actions": planned.plan.actions,
                "server_timing": {"infer_ms": planned.inferred * 1e3, "queue_ms": planned.queued * 1e3},
            }
            if planned.plan.video is not None:
                answer["video"] = planned.plan.video
            packed = wire.pack(answer)
        except wire.WireError as error:
            return self._refuse("message", str(error)), session
        except ValueError as error:
            return self._refuse("request", str(error)), session
        except queue.Full:
            return self._refuse("busy", f"{BUSY} {self.limits.queue} requests are waiting; ask again"), session
        except Dropped:
            raise
        except asyncio.TimeoutError:
            return self._refuse("timeout", f"no plan within {self.limits.plan:g} s; ask again"), session
        except Exception as error:
            log.warning("a request failed", exc_info=True)
            return self._refuse("internal", f"the server failed: {type(error).__name__}: {error}"), session
        self.metrics.answer(time.perf_counter() - began)
        return packed, after

    def _refuse(self, kind: str, text: str) -> str:
        self.metrics.errors[kind] += 1
        text = text if len(text) <= MAX_ERROR else text[:MAX_ERROR] + "..."
        return text.encode(errors="replace").decode()  # a lone surrogate cannot be sent


def tls_context(cert: str, key: str | None = None) -> ssl.SSLContext:
    """Raises ValueError naming the files where they are no certificate and its key."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask at a terminal
    except (OSError, ValueError) as error:
        raise ValueError(f"cert {cert}, key {key}: {error}") from error
    return context


@contextmanager
def serving(policy, metadata: dict | None = None, **settings) -> Iterator[PolicyServer]:
    """A running server in a thread of this process, for tests and notebooks. settings: of `PolicyServer`."""
    server, started, failures = PolicyServer(policy, metadata, **settings), threading.Event(), []

    def work():
        try:
            asyncio.run(server.run(started.set))
        except BaseException as error:
            failures.append(error)
            started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    if failures:
        raise failures[0]
    try:
        yield server
    finally:
        server.stop()
        thread.join(server.limits.stop + 5)
