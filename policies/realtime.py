"""Real-time chunking: the next chunk is computed in a background thread while the present one is being carried out.

An inference that starts at control step s with the observation of s takes about d steps. What the robot does in steps s
to s + d - 1 is settled by then: those actions of the running chunk are *committed*, enter the network as given tokens,
and the new chunk goes on from them. It takes over at step s + d, with the action made for that step.

    step            s      s+1    s+2    s+3    s+4 ...                 d = 2
    running chunk   a_i    a_i+1  a_i+2  a_i+3  ...                     goes on where the new one is late
    new chunk       a_i    a_i+1  b_2    b_3    ...                     a: committed, b: made in view of them

`act` waits for nothing but the very first chunk of an episode. Where even the rest of the running chunk is used up it
raises DeadlineMissed, and whoever holds the robot decides what to do (`experiments/control_loop.py`: hold or slow
stop). The count of steps stands still then, as the robot does: the plan continues with the first action not yet given.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from policies.safety import fade
from selfflow_robot.interfaces import ACTION_DIM, Observation

LATENCIES = 30  # inferences whose longest is the expected delay
PATIENCE = 60.0  # s the first chunk of an episode may take
NOTHING = np.zeros((0, ACTION_DIM), np.float32)


class DeadlineMissed(RuntimeError):
    """No action for this control step: the running chunk is used up and the next one is not there."""


@dataclass
class Job:
    """One inference, from request to result."""

    step: int  # control step of the chunk's first action
    tick: int  # call of `act` that asked for it
    ready: int  # control step it takes over at
    due: int  # call of `act` from which it may be used; where time stands still, threaded=False
    arguments: tuple  # of the planner's `plan`
    void: bool = False  # nobody waits for it any more
    done: bool = False
    seconds: float = 0.0
    actions: np.ndarray = field(default_factory=lambda: NOTHING)  # float32 (H, 7)
    error: BaseException | None = None

    def run(self, planner) -> None:
        began = time.monotonic()
        try:
            actions = np.asarray(planner.plan(*self.arguments).actions, np.float32)
            expected = (planner.layout.horizon, ACTION_DIM)
            if actions.shape != expected:
                raise ValueError(f"plan: expected actions {expected}, got {actions.shape}")
            if not np.isfinite(actions).all():
                raise ValueError("plan: actions are not finite")
            self.actions = actions
        except BaseException as error:  # surfaces in `act`
            self.error = error
        self.seconds = time.monotonic() - began


class RealTimePolicy:
    """Same protocol as `ChunkedPolicy`. Close it, or use it in a `with` statement, to end its thread.

    planner: a `FlowPolicy`, or anything with its `layout`, `check` and `plan`. fps: rate at which `act` is called, Hz.
    execute: a chunk's actions after which the next inference starts. delay: control steps an inference is expected to
    take; None: measured, the longest of the last ones. committed False: naive switching, the same chunks at the same
    moments without knowledge of what is on its way; to compare with. threaded False: for a simulator whose time stands
    still, reproducible: computed at once from the observation at hand, used `delay` calls later.

    A new instruction: the running chunk goes on for the `delay` steps that one inference takes and no further, so the
    robot does nothing for the old instruction beyond what is committed while it thinks about the new one. Where an
    inference for the old instruction is still running its result is thrown away, but it cannot be interrupted: what it
    still takes comes on top, and `act` reports missed deadlines rather than follow the old chunk longer.
    What was planned before the robot stood still for more than a horizon is for a world too long ago: thrown away.
    """

    def __init__(
        self,
        planner,
        fps: float,
        execute: int = 4,
        seed: int = 0,
        delay: int | None = None,
        committed: bool = True,
        threaded: bool = True,
        patience: float = PATIENCE,
    ):
        horizon, least = planner.layout.horizon, 1 if threaded else 0
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if delay is None and not threaded:
            raise ValueError("threaded=False needs a delay, in control steps")
        if delay is not None and delay < least:
            raise ValueError(f"delay must be at least {least}, got {delay}")
        wait = least if delay is None else delay
        if execute < 1 or max(execute, wait) + wait > horizon:
            raise ValueError(
                f"execute {execute} and delay {wait}: the next chunk is begun after max(execute, delay) actions and "
                f"takes {wait} more, which must fit the checkpoint's horizon {horizon}"
            )
        self.planner, self.fps, self.execute, self.seed = planner, fps, execute, seed
        self.delay, self.committed, self.threaded, self.patience = delay, committed, threaded, patience
        self.latencies: deque[float] = deque(maxlen=LATENCIES)  # s
        self.inferences = 0
        self.history: deque[Observation] = deque(maxlen=1 - planner.layout.past[0])
        self.condition, self.jobs, self.closed = threading.Condition(), queue.SimpleQueue(), False
        self.thread = threading.Thread(target=self._work, name="planner", daemon=True)  # a hung planner ends with us
        if threaded:
            self.thread.start()
        self.pending: Job | None = None
        self.reset()

    # -- the protocol --------------------------------------------------------------------------------------------

    def reset(self, instruction: str = "") -> None:
        """Forget history and chunks; called at the start of every episode. Measured latencies stay."""
        with self.condition:
            self.instruction, self.heard = instruction, None
            self.history.clear()
            self.chunk = NOTHING  # the running one, float32 (H, 7)
            self.origin = self.end = 0  # control steps of its first action and after its last
            self.step, self.tick = 0, -1  # actions given; calls of `act` and `hold`
            self.asked = 0  # tick of the running chunk's observation
            self.renew = False  # the running chunk obeys another instruction
            self.chunks = self.late = self.missed = self.dropped = 0  # to report
            self.busy = 0  # call of `act` until which an inference occupies the planner, threaded=False
            self._forget()
            self.condition.notify_all()

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, float32 (7,). Raises DeadlineMissed, ValueError on an observation that does not fit, and
        whatever the planner raised in the background (once; the running chunk can still be continued)."""
        with self.condition:
            if self.closed:
                raise RuntimeError("this policy is closed")
            observation = self._checked(observation)
            self._hear(observation["instruction"])
            self.tick += 1
            if self._too_old(self.asked, self.origin):
                self.end = min(self.end, self.step)
            self._collect()
            if self._due():
                job = self._start(observation)
                if self.tick == 0:
                    self._wait(job)
            self._collect()
            if self.step >= self.end:
                self.missed += 1
                raise DeadlineMissed(f"no action for step {self.step}: the next chunk is late")
            self.history.append(observation)
            self.step += 1
            return self.chunk[self.step - 1 - self.origin].copy()

    def hold(self) -> None:
        """A control step in which the robot holds and `act` was not called, for want of a good observation."""
        with self.condition:
            self.tick += 1

    def close(self) -> None:
        """Ends the thread; one that hangs is left behind and does not keep the process from ending."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()
        self.jobs.put(None)
        if self.thread.is_alive():
            self.thread.join(timeout=1.0)

    def __enter__(self) -> "RealTimePolicy":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def expected(self) -> int:
        """Control steps that an inference is expected to take."""
        if self.delay is not None:
            return self.delay
        steps = math.ceil(max(self.latencies, default=0.0) * self.fps)
        return min(max(steps, 1), self.planner.layout.horizon - 1)

    # -- inside, with the lock held ------------------------------------------------------------------------------

    def _checked(self, observation: Observation) -> Observation:
        if not observation["instruction"]:
            observation = {**observation, "instruction": self.instruction}
        self.planner.check(observation)
        return observation

    def _hear(self, instruction: str) -> None:
        if self.heard not in (None, instruction):
            self.renew, self.end = True, min(self.end, self.step + self.expected)
            self._forget()
        self.heard = instruction

    def _forget(self) -> None:
        if self.pending:
            self.pending.void, self.pending = True, None

    def _too_old(self, tick: int, step: int) -> bool:
        """Whether the robot has held for more than a horizon since the tick at which `step` was planned."""
        return (self.tick - tick) - (self.step - step) > self.planner.layout.horizon

    def _due(self) -> bool:
        return self.pending is None and (self.renew or self.step >= min(self.end, self.origin + self.execute))

    def _start(self, observation: Observation) -> Job:
        settled = min(self.expected, self.end - self.step)  # the running chunk's next actions
        committed = None
        if settled and self.committed:
            committed = self.chunk[self.step - self.origin :][:settled].copy()
        history = [*self.history, observation]
        past = [history[max(0, len(history) - 1 + offset)] for offset in self.planner.layout.past]  # as in training
        arguments = (past, (self.seed, self.step), committed)
        if self.chunks:  # the world waits for the first one
            self.busy = max(self.busy, self.tick) + (self.delay or 0)
        job = Job(self.step, self.tick, self.step + settled, self.busy, arguments)
        self.pending, self.renew = job, False
        if self.threaded:
            self.jobs.put(job)
        else:
            job.run(self.planner)
            job.done = True
        return job

    def _wait(self, job: Job) -> None:
        """For the first chunk: there is nothing to go on with."""
        self.condition.wait_for(lambda: job.done or self.closed or self.pending is not job, self.patience)
        if self.closed or self.pending is not job:
            raise RuntimeError("closed or reset while waiting for the first chunk")

    def _collect(self) -> None:
        """Takes over from the chunk that is ready, at the step it was made for or, where it is late, now."""
        job = self.pending
        if job is None or not job.done or not (self.threaded or self.tick >= job.due):
            return
        if job.error is None and self.step < job.ready:
            return
        self.pending = None
        if job.error is not None:
            raise job.error
        if self.inferences == 1:  # the first of all is slow, and serves until there is another
            self.latencies.clear()
        self.latencies.append(job.seconds)
        self.inferences += 1
        if self._too_old(job.tick, job.step):
            self.dropped += 1
            return
        self.late += self.step > job.ready
        self.chunk, self.asked = job.actions, job.tick
        self.origin, self.end = job.step, job.step + len(job.actions)
        self.chunks += 1

    # -- in the background ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None and not self.closed:
            if not job.void:
                job.run(self.planner)
            with self.condition:
                job.done = True
                self.condition.notify_all()


class Holding:
    """A policy that holds still where it would have missed a deadline, so that an episode goes on. `held`: how many
    control steps of this episode."""

    def __init__(self, policy: RealTimePolicy):
        self.policy = policy

    def reset(self, instruction: str = "") -> None:
        self.policy.reset(instruction)
        self.held, self.last = 0, np.eye(ACTION_DIM, dtype=np.float32)[-1]

    def act(self, observation: Observation) -> np.ndarray:
        try:
            self.last = self.policy.act(observation)
        except DeadlineMissed:
            self.held += 1
            return fade(self.last)
        return self.last


def ticks(
    rate: float,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[int, float]]:
    """(number of the control step, lateness s) at `rate` Hz for `seconds`.

    The clock starts when the work of step 0 is done, for that is when the first chunk is there. Step n is due n / rate
    later, whatever happened between: lateness does not add up. A step that a whole period passed over is left out; its
    number is missing.
    """
    yield 0, 0.0
    start, number, total = now(), 0, round(seconds * rate)
    while True:
        number = max(number + 1, int((now() - start) * rate))
        if number >= total:
            return
        if (rest := start + number / rate - now()) > 0:
            sleep(rest)
        yield number, now() - start - number / rate
