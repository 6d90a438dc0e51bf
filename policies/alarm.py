"""A failure alarm: while a policy acts, how far its plans are from agreeing with themselves (`consistency`)."""

from collections.abc import Sequence

import numpy as np

from policies.consistency import consistency
from policies.flow_policy import Plan
from selfflow_robot.interfaces import Observation


class Alarm:
    """In the place of a planner, which it asks for the plans; every `every` control steps it also takes a reading.

    readings: (control step, mm, degrees) of this episode; the first plan of an episode, at step 0, starts anew.
    """

    def __init__(self, planner, every: int = 8):
        if every < 1:
            raise ValueError(f"every must be at least 1 control step, got {every}")
        self.planner, self.every = planner, every
        self.layout, self.check, self.manifest = planner.layout, planner.check, planner.manifest
        self.readings: list[tuple[int, float, float]] = []

    def plan(self, history: Sequence[Observation], key: tuple[int, int], committed: np.ndarray | None = None) -> Plan:
        step = key[1]
        if step == 0:
            self.readings = []
        if not self.readings or step - self.readings[-1][0] >= self.every:
            watched = getattr(self.planner, "policy", self.planner)  # the network's, below a choice among its plans
            millimetres, degrees = consistency(watched, [history], [key])[0]
            self.readings.append((step, float(millimetres), float(degrees)))
        return self.planner.plan(history, key, committed)
