"""Action chunks in a control loop: keeps the history, carries out the first actions of a chunk, then predicts again."""

from collections import deque

import numpy as np

from policies.flow_policy import Plan
from selfflow_robot.interfaces import Observation


class ChunkedPolicy:
    """Deterministic: the noise of the k-th step of an episode depends on (seed, k) alone, not on earlier episodes."""

    def __init__(self, policy, execute: int = 4, seed: int = 0):
        """policy: a `FlowPolicy`, or anything with its `layout`, `check` and `plan`."""
        if not 1 <= execute <= policy.layout.horizon:
            raise ValueError(f"execute must be 1 to the checkpoint's horizon {policy.layout.horizon}, got {execute}")
        self.policy, self.execute, self.seed = policy, execute, seed
        self.history: deque[Observation] = deque(maxlen=1 - policy.layout.past[0])
        self.reset()

    def reset(self, instruction: str = "") -> None:
        """Forget history and queued actions; called at the start of every episode. `instruction` serves observations
        that bring none."""
        self.instruction, self.step = instruction, -1
        self.history.clear()
        self.queue: deque[np.ndarray] = deque()

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, float32 (7,). A new instruction drops what is left of the chunk."""
        observation = self._checked(observation)
        if self.history and self.history[-1]["instruction"] != observation["instruction"]:
            self.queue.clear()
        self.history.append(observation)
        self.step += 1
        if not self.queue:
            self.queue.extend(self._plan(list(self.history), self.step).actions[: self.execute])
        return self.queue.popleft()

    def plan(self, observation: Observation) -> Plan:
        """The whole chunk that would follow from here, with the video where it is imagined; nothing changes."""
        return self._plan([*self.history, self._checked(observation)], self.step + 1)

    def _plan(self, history: list[Observation], step: int) -> Plan:
        past = [history[max(0, len(history) - 1 + offset)] for offset in self.policy.layout.past]  # as in training
        return self.policy.plan(past, (self.seed, step))

    def _checked(self, observation: Observation) -> Observation:
        if not observation["instruction"]:
            observation = {**observation, "instruction": self.instruction}
        self.policy.check(observation)
        return observation
