"""Choosing among imagined futures: several chunks are drawn, the world model shows where each leads, the judge picks.

The same checkpoint is policy and world model; its observation is computed once for all draws.
"""

from collections.abc import Sequence

import numpy as np
import torch

from policies.flow_policy import FlowPolicy, Plan, Request, observed
from policies.judge import Judge, picture_features
from selfflow_robot.flow import generator
from selfflow_robot.interfaces import Observation


class BestOfN:
    """In the place of a `FlowPolicy`: its chunk is the one of `samples` after which the judge sees the fewest control
    steps left. The first draw is the plain policy's, so that samples=1 is the plain policy to the bit."""

    def __init__(self, policy: FlowPolicy, judge: Judge, samples: int = 8):
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if samples > 1 and not policy.temperature > 0:
            raise ValueError(f"{samples} samples without noise are all the same: give a temperature above 0, such as 1")
        self.policy, self.judge, self.samples = policy, judge, samples
        self.layout, self.check, self.manifest = policy.layout, policy.check, policy.manifest

    def plan(self, history: Sequence[Observation], key: tuple[int, int], committed: np.ndarray | None = None) -> Plan:
        first = self.policy.plan(history, key, committed)
        if self.samples == 1:
            return first
        others = [Request(history, (*key, number), committed) for number in range(1, self.samples)]
        plans = [first, *self.policy.plans(others)]
        return plans[int(np.argmin(self.remaining(history, [plan.actions for plan in plans], key)))]

    def plans(self, requests: Sequence[Request]) -> list[Plan]:
        return [self.plan(*request) for request in requests]

    def remaining(self, history: Sequence[Observation], chunks: list[np.ndarray], key: tuple[int, int]) -> np.ndarray:
        """Control steps left (N,) after each chunk (H, 7), as the judge sees them at its end. All futures have the same
        noise: they differ by their actions alone."""
        batch = observed([history] * len(chunks), self.layout.view) | {"executed": torch.from_numpy(np.stack(chunks))}
        frames = self.policy.predict_video(batch, [generator(*key, 0) for _ in chunks])[:, -1]
        return self.judge.look(picture_features(self.policy, frames))["remaining"]
