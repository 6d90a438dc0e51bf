"""One policy in one environment from one seed -> Episode. Policy and environment meet here and nowhere else."""

from dataclasses import dataclass, field

import numpy as np

from selfflow_robot.interfaces import ACTION_DIM, Env, Observation, Policy

HOLD_STEPS = 12  # longest wait, arm at home, before the second instruction: so is waiting for it
NOISE = np.repeat([0.003, 0.012], 3)  # per axis, m and rad: about 5 mm and 0.02 rad in all
BURSTS, BURST_STEPS, BURST_START = (2, 5), (1, 4), (3, 130)  # how many, how long, when (control steps)
BURST_METRES, BURST_RADIANS = 0.04, 0.15  # per control step, at most
GRIPPER_FLIP = 0.2  # probability per burst
STRETCH = (8, 32)  # control steps before driver and expert draw again


@dataclass
class Episode:
    """T control steps; row t holds what was seen before action t and the action."""

    seed: int
    frames: np.ndarray  # uint8 (T, H, W, 3); (0,) where the environment renders nothing
    proprio: np.ndarray  # float32 (T, P)
    action: np.ndarray  # float32 (T, 7), what the labelling expert would do; the policy's own action without one
    executed: np.ndarray  # float32 (T, 7)
    instructions: list[str]  # T
    success_final: bool  # at the last step
    success_any: bool  # at any step
    subgoals: dict[str, bool]
    advance_at: int | None  # the step during which the second subtask began
    standins: list[str] = field(default_factory=list)  # what the scene had instead of absent files
    environment: np.ndarray | None = None  # float32 (T, 6), `interfaces.ENVIRONMENT_NAMES`; None: the scene cannot tell

    @property
    def steps(self) -> int:
        return len(self.executed)


def rollout(env: Env, policy: Policy, seed: int, linger: int | None = None, options: dict | None = None) -> Episode:
    """Run an episode to the step limit: as in SIMPLER, success does not end it.

    A policy may say that its subtask is done through an attribute `done_subtask`, and what an expert would have done
    through `label`; a learned policy has neither, so its instruction changes by the environment's rule alone.
    linger: end after success has held for this many further steps (demonstrations; None: never). options: of the reset,
    where the seed alone does not say how the episode starts.
    The scene is built anew, as upstream does, so an episode depends on its seed and not on what ran before it.
    """
    scene = env.unwrapped
    observation, _ = env.reset(seed=seed, options={"reconfigure": True, **(options or {})})
    policy.reset(first_instruction := observation["instruction"])
    seen, environment, labels, executed, success = [], [], [], [], []
    info, advance_at, truncated = {}, None, False
    while not truncated and not (linger is not None and all(success[-linger - 1 :]) and len(success) > linger):
        action = policy.act(observation)
        if getattr(policy, "done_subtask", False) and not scene.is_final_subtask():
            scene.advance_to_next_subtask()  # before the step, as upstream's evaluator does
        seen.append(observation)
        if hasattr(scene, "environment_state"):
            environment.append(scene.environment_state())
        labels.append(getattr(policy, "label", action))
        executed.append(action)
        observation, _, _, truncated, info = env.step(action)
        success.append(bool(info["success"]))
        if advance_at is None and observation["instruction"] != first_instruction:
            advance_at = len(executed) - 1
    return Episode(
        seed=seed,
        frames=np.array([picture for o in seen for picture in o["images"].values()]),
        proprio=np.array([o["proprio"] for o in seen], np.float32),
        action=np.array(labels, np.float32),
        executed=np.array(executed, np.float32),
        instructions=[o["instruction"] for o in seen],
        success_final=success[-1],
        success_any=any(success),
        subgoals={name: bool(value) for name, value in info["subgoals"].items()},
        advance_at=advance_at,
        standins=list(info.get("standins", [])),
        environment=np.array(environment, np.float32) if environment else None,
    )


def expert_rng(seed: int, margin: float = 0.0) -> np.random.Generator:
    """Of an expert's ways in the episode of `seed`. With a margin `Task.draw` places the robot by stream 0, and the
    ways must not hang on the place."""
    return np.random.default_rng([seed, 2 if margin else 0])


class Demonstrator:
    """The expert as a policy: it labels every state, whoever drives.

    expert: `reset()` and `act() -> (action (7,), done_subtask)`, reading the scene itself; one per episode.
    disturbance: above 0, small noise is added to everything the expert does, and with this probability an episode has
    bursts of random motion from which the expert recovers. driver: a policy that drives stretches of the episode with
    probability driver_fraction each, so that the expert labels the states that policy visits (DAgger).
    `label` is the expert's action of the last `act`; `done_subtask` turns true after a random wait at home.
    """

    def __init__(self, expert, rng: np.random.Generator, disturbance=0.0, driver=None, driver_fraction=0.0, hold=0):
        self.expert, self.rng = expert, rng
        self.disturbance, self.driver, self.driver_fraction, self.hold = disturbance, driver, driver_fraction, hold

    def reset(self, instruction: str = "") -> None:
        self.expert.reset()
        self.step, self.waited, self.done_subtask = 0, 0, False
        self.wait = self.rng.integers(self.hold + 1)
        disturbed = self.rng.random() < self.disturbance
        self.bursts = draw_bursts(self.rng) if disturbed else {}
        self.stretch_end, self.driving = 0, False

    def act(self, observation: Observation) -> np.ndarray:
        self.label, done = self.expert.act()
        self.done_subtask = bool(done) and self.waited >= self.wait
        self.waited += bool(done)
        if self.driver is not None and self.step >= self.stretch_end:
            self.stretch_end = self.step + self.rng.integers(*STRETCH, endpoint=True)
            self.driving = self.rng.random() < self.driver_fraction
            if self.driving:
                self.driver.reset(observation["instruction"])
        burst = self.bursts.get(self.step)
        self.step += 1
        if burst is not None:
            motion, flip = burst
            return np.append(motion, 1 - self.label[6] if flip else self.label[6]).astype(np.float32)
        if self.driving:
            return self.driver.act(observation)
        if self.disturbance > 0:
            return (self.label + np.append(self.rng.normal(scale=NOISE), 0)).astype(np.float32)
        return self.label


def draw_bursts(rng: np.random.Generator) -> dict[int, tuple[np.ndarray, bool]]:
    """{step: (motion (6,), whether the gripper is flipped)}: steady random motion for a few steps, several times."""
    bursts = {}
    for _ in range(rng.integers(*BURSTS, endpoint=True)):
        motion = np.concatenate([_random_vector(rng, BURST_METRES), _random_vector(rng, BURST_RADIANS)])
        flip = bool(rng.random() < GRIPPER_FLIP)
        start, length = rng.integers(*BURST_START), rng.integers(*BURST_STEPS, endpoint=True)
        bursts |= {step: (motion, flip) for step in range(start, start + length)}
    return bursts


def _random_vector(rng: np.random.Generator, limit: float) -> np.ndarray:
    """(3,) in any direction, its length uniform up to `limit`."""
    direction = rng.normal(size=3)
    return direction / np.linalg.norm(direction) * rng.uniform(0, limit)


class HoldStill:
    """The simplest baseline: no motion, gripper open."""

    def reset(self, instruction: str = "") -> None:
        pass

    def act(self, observation: Observation) -> np.ndarray:
        return np.eye(ACTION_DIM, dtype=np.float32)[-1]
