"""A world without SAPIEN: a point on a line that must reach 0.3 m, wait for the second instruction, reach 0.6 m."""

from types import SimpleNamespace

import numpy as np

LIMIT, FORCED = 40, 25  # control steps
FIRST, SECOND = 0.3, 0.6  # m


class InlineWorkers:
    """`envs.workers.Workers` without processes."""

    def __init__(self, start, arguments, count):
        self.work, self.queue, self.count = start(*arguments), [], count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __len__(self):
        return len(self.queue)

    def submit(self, seed):
        self.queue.append(seed)

    def results(self):
        while self.queue:
            seed = self.queue.pop(0)
            yield seed, self.work(seed)


class LineEnv:
    """Moves by at most 0.1 m per step. Seeds divisible by 7 never succeed (nor do their subgoals)."""

    task, control_freq = SimpleNamespace(robot="line", beyond=lambda seed, margin: {}), 3  # Hz

    def __init__(self, limit=LIMIT, width=32, height=16):
        self.limit, self.size = limit, (height, width)
        self.unwrapped = self

    def reset(self, *, seed=None, options=None):
        self.seed, self.options, self.x, self.steps, self.subtask, self.opened = seed, options, 0.0, 0, 0, False
        return self.observation(), {}

    def is_final_subtask(self):
        return self.subtask == 1

    def advance_to_next_subtask(self):
        self.subtask = 1

    def step(self, action):
        if self.steps >= FORCED:
            self.subtask = 1
        self.x += float(np.clip(action[0], -0.1, 0.1))
        self.steps += 1
        self.opened |= self.x >= FIRST - 1e-6
        success = self.subtask == 1 and self.x >= SECOND - 1e-6 and self.seed % 7 != 0
        info = {"success": success, "subgoals": {"drawer_opened": self.opened, "object_placed": success}}
        return self.observation(), float(success), success, self.steps >= self.limit, info

    def observation(self):
        proprio = np.zeros(10, np.float32)
        proprio[0] = self.x
        frame = np.full((*self.size, 3), int(100 * np.clip(self.x, 0, 2)), np.uint8)
        return {"images": {"overhead": frame}, "proprio": proprio, "instruction": ("open", "place")[self.subtask]}


class LineExpert:
    """Privileged, its phase read from the state."""

    def __init__(self, env, rng=None, variation=1.0):
        self.env = env

    def reset(self):
        pass

    def act(self):
        goal = SECOND if self.env.subtask else FIRST
        action = np.zeros(7, np.float32)
        action[0], action[6] = np.clip(goal - self.env.x, -0.1, 0.1), 1
        return action, not self.env.subtask and self.env.x >= FIRST - 1e-6
