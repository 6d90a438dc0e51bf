"""A gymnasium environment inside the model: frames are imagined, the judge says what they show.

Actions are carried out `layout.horizon` at a time: between, the picture stands still (`info["fresh"]` is False), so a
policy that executes whole chunks sees every picture there is. What compounds over an episode: the blur of the frames,
and the drift of the hand's pose, which the judge reads from frame and actions together.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from policies.flow_policy import FlowPolicy
from policies.judge import Judge, picture_features
from selfflow_robot.flow import generator
from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_DIM, Observation

OPENED = 0.15  # m, a drawer that is open (SIMPLER's rule)


class WorldModelEnv(gym.Env):
    """`reset(options={"start": observation})` from a real frame, or `reset(seed=k)` from the k-th of `starts`.

    instructions: {control step: text} replaces the start's instruction from that step on, as SIMPLER's episodes do.
    As there, success does not end an episode; `max_steps` does. Same seed, start and actions: same pictures.
    info: success, drawer_opened (ever, where known), fresh, and the judge's numbers.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's attribute)

    def __init__(
        self,
        policy: FlowPolicy,
        judge: Judge,
        starts: Sequence[Observation] = (),
        max_steps: int = 200,
        instructions: dict[int, str] | None = None,
        render_mode: str | None = "rgb_array",
    ):
        layout = policy.layout
        if tuple(layout.past) != (0,) or tuple(layout.future[-1:]) != (layout.horizon,):
            raise ValueError(
                "a world model to step through must see one frame and predict the one its actions lead to; this "
                f"checkpoint has past {list(layout.past)}, future {list(layout.future)}, horizon {layout.horizon}"
            )
        self.policy, self.judge, self.starts = policy, judge, list(starts)
        self.max_steps, self.instructions, self.render_mode = max_steps, instructions or {}, render_mode
        picture = gym.spaces.Box(0, 255, (layout.height, layout.width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            images=gym.spaces.Dict({layout.view: picture}),
            proprio=gym.spaces.Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32),
            instruction=gym.spaces.Text(layout.text_bytes),
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        start = (options or {}).get("start")
        if start is None:
            if not self.starts:
                raise ValueError('a start is needed: reset(options={"start": observation}), or starts=[...]')
            start = self.starts[(seed or 0) % len(self.starts)]
        self.policy.check(start)
        self.seed, self.steps, self.opened = seed or 0, 0, False
        self.frame, self.proprio = start["images"][self.policy.layout.view], np.asarray(start["proprio"])
        self.instruction = start["instruction"]
        self.between: list[np.ndarray] = [self.frame]  # all frames that the last imagination gave
        self.buffer: list[np.ndarray] = []
        return self._observation(), self._info(fresh=True)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float32)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected {ACTION_DIM} finite numbers, got {action}")
        self.buffer.append(action)
        self.steps += 1
        self.instruction = self.instructions.get(self.steps, self.instruction)
        if fresh := len(self.buffer) == self.policy.layout.horizon:
            self._imagine()
        info = self._info(fresh)
        return self._observation(), float(info["success"]), False, self.steps >= self.max_steps, info

    def render(self) -> np.ndarray:
        return self.frame

    def _imagine(self) -> None:
        executed = np.stack(self.buffer)[None]  # (1, H, 7)
        batch = {
            "video": torch.from_numpy(self.frame[None, None].copy()),
            "proprio": torch.from_numpy(self.proprio[None]),
            "instruction": [self.instruction],
            "executed": torch.from_numpy(executed),
        }
        self.between = list(self.policy.predict_video(batch, generator(self.seed, self.steps))[0])
        self.frame = self.between[-1]
        self.proprio = self.judge.feel(self._features(), self.proprio[None], executed)[0]
        self.buffer = []

    def _features(self) -> np.ndarray:
        return picture_features(self.policy, self.frame[None])

    def _observation(self) -> Observation:
        return {
            "images": {self.policy.layout.view: self.frame},
            "proprio": self.proprio,
            "instruction": self.instruction,
        }

    def _info(self, fresh: bool) -> dict[str, Any]:
        if fresh:
            self.seen = {name: value[0].item() for name, value in self.judge.look(self._features()).items()}
            self.opened |= self.seen.get("drawer", 0.0) >= OPENED
        known = {"drawer_opened": self.opened} if "drawer" in self.seen else {}
        return {"success": self.seen["done"], "fresh": fresh, "frames": self.between, **known, **self.seen}
