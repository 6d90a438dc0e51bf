"""Episodes in parallel processes that may crash: a physics or Vulkan segfault, a kill -9, a hang.

Each worker builds its environment once and then does one seed after another. Results reach the parent only when an
episode is complete; a seed whose worker died is tried once more in a new process, then reported as crashed.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ATTEMPTS = 2  # per seed, and to start a worker
START_SECONDS = 300.0  # allowed for a worker to start; the first scene of a cold machine takes a while
PLAIN_SECONDS = 15.0  # between progress lines where there is no terminal
SINGLE_THREADED = {  # one core per worker is plenty; the last is Mesa's software Vulkan
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "LP_NUM_THREADS": "1",
}
log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """A worker raised an exception: repeating the seed would not help. The message is one line."""


@dataclass
class _Worker:
    process: context.SpawnProcess
    connection: connection.Connection
    ready: bool = False
    seed: int | None = None
    since: float = field(default_factory=time.monotonic)


class Workers:
    """`start(*arguments)` runs once in each process and returns `work(seed) -> result`; both must be picklable.

    with Workers(start, arguments, count) as workers:
        workers.submit(seed)                        # also while results are read
        for seed, result in workers.results(): ...  # until nothing is pending; result None: the seed crashed twice
    len(workers) is the number of seeds submitted and not yet returned. timeout: seconds per episode.
    """

    def __init__(self, start: Callable, arguments: tuple = (), count: int = 2, timeout: float = 1200.0):
        self.start, self.arguments, self.count, self.timeout = start, arguments, max(count, 1), timeout
        self.queue: deque[int] = deque()
        self.workers: list[_Worker] = []
        self.crashes: Counter[int] = Counter()
        self.failed_starts = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.process.kill()  # files are written atomically, nothing else is worth a farewell
        for worker in self.workers:
            worker.process.join()

    def __len__(self) -> int:
        return len(self.queue) + sum(worker.seed is not None for worker in self.workers)

    def submit(self, seed: int) -> None:
        self.queue.append(seed)

    def results(self) -> Iterator[tuple[int, dict | None]]:
        while len(self):
            while len(self.workers) < min(self.count, len(self)):
                self.workers.append(self._spawn())
            for worker in self.workers:
                if worker.ready and worker.seed is None and self.queue:
                    self._assign(worker, self.queue.popleft())
            connection.wait([w.connection for w in self.workers], timeout=5.0)
            for worker in list(self.workers):
                try:
                    message = worker.connection.recv() if worker.connection.poll() else None
                except (EOFError, OSError):
                    yield from self._bury(worker, "died")
                    continue
                if message is not None:
                    yield from self._receive(worker, *message)
                elif time.monotonic() - worker.since > self._limit(worker):
                    worker.process.kill()
                    yield from self._bury(worker, f"did not answer for {self._limit(worker):.0f} s")

    def _spawn(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        target = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, self.start, self.arguments), daemon=True
        )
        with single_threaded():
            target.start()
        theirs.close()  # so that the child's death is the end of the pipe
        return _Worker(target, ours)

    def _assign(self, worker: _Worker, seed: int) -> None:
        worker.seed, worker.since = seed, time.monotonic()
        with suppress(OSError):  # it has died: reading from it says so
            worker.connection.send(seed)

    def _limit(self, worker: _Worker) -> float:
        """Seconds it may stay silent."""
        return START_SECONDS if not worker.ready else self.timeout if worker.seed is not None else float("inf")

    def _receive(self, worker: _Worker, kind: str, value) -> Iterator[tuple[int, dict | None]]:
        if kind == "error":
            raise WorkerError(value if worker.seed is None else f"seed {worker.seed}: {value}")
        if kind == "ready":
            worker.ready, self.failed_starts = True, 0
        else:
            seed, worker.seed = worker.seed, None
            yield seed, value

    def _bury(self, worker: _Worker, reason: str) -> Iterator[tuple[int, None]]:
        self.workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        code, seed = worker.process.exitcode, worker.seed
        if code is not None and code < 0:
            reason += f" ({signal.Signals(-code).name})"
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise WorkerError(f"a worker {reason} while starting; `python experiments/doctor.py` finds the cause")
        if seed is None:
            return
        self.crashes[seed] += 1
        if self.crashes[seed] < ATTEMPTS:
            log.warning("seed %d: worker %s; trying once more in a new process", seed, reason)
            self.queue.appendleft(seed)
        else:
            log.warning("seed %d: worker %s again; skipped", seed, reason)
            yield seed, None


@contextmanager
def single_threaded() -> Iterator[None]:
    """Processes started within keep to one core: their libraries read these variables when they are imported."""
    previous = {name: os.environ.get(name) for name in SINGLE_THREADED}
    os.environ.update(SINGLE_THREADED)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(parent: connection.Connection, start: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        work = start(*arguments)
        parent.send(("ready", None))
        while True:
            parent.send(("done", work(parent.recv())))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except OSError as error:
        parent.send(("error", f"{error}; what was finished is kept, the same command continues"))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, RuntimeError | ValueError) else f" ({place.filename}:{place.lineno})"
        parent.send(("error", f"{type(error).__name__}: {error}{where}"))


def write_text(path: Path, text: str) -> None:
    """Atomic: a process may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields update(done, note): a bar with the remaining time on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        began, last = time.monotonic(), -PLAIN_SECONDS
        first = None

        def update(done: int, note: str = "") -> None:
            nonlocal last, first
            now = time.monotonic() - began
            first = done if first is None else first
            if now - last >= PLAIN_SECONDS or done >= total:
                left = f", {now / (done - first) * (total - done):.0f} s left" if done > first else ""
                print(f"{description} {done}/{total} {note} ({now:.0f} s{left})", file=sys.stderr, flush=True)
                last = now

        yield update
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)
