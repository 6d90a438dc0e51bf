"""A trained network as a function: observation history -> action chunk, and the video it expects.

Normalisation, codec and tokens are those of training: the checkpoint brings its own `Packer`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from selfflow_robot import checkpoint
from selfflow_robot.interfaces import PROPRIO_DIM, Observation
from selfflow_robot.model import Model, precision
from selfflow_robot.tokens import Packer, generate

MODES = ("policy", "joint_plan")


class Plan(NamedTuple):
    actions: np.ndarray  # float32 (H, 7), canonical
    video: np.ndarray | None  # uint8 (F, H, W, 3) at the layout's future offsets; None in mode "policy"


class FlowPolicy:
    def __init__(self, model: Model, packer: Packer, steps: int = 8, mode: str = "policy"):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: a policy plans in one of {', '.join(MODES)}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.packer = model.to(self.device).eval(), packer.to(self.device)
        self.steps, self.mode = steps, mode

    @classmethod
    def load(cls, path: str | Path, steps: int = 8, mode: str = "policy") -> "FlowPolicy":
        model, packer, manifest = checkpoint.load_model(path)
        if manifest.get("kind") != "finetune":
            raise ValueError(
                f"{path} is a video backbone. Fine-tune it: python experiments/finetune.py --pretrained {path}"
            )
        return cls(model, packer, steps, mode)

    @property
    def layout(self):
        return self.packer.layout

    def plan(self, history: Sequence[Observation], generator: torch.Generator) -> Plan:
        """history: observations at the layout's past offsets, oldest first. The same generator gives the same plan."""
        now = history[-1]
        frames = np.stack([observation["images"][self.layout.view] for observation in history])
        batch = {
            "video": torch.from_numpy(frames)[None],
            "proprio": torch.from_numpy(np.asarray(now["proprio"]))[None],
            "instruction": [now["instruction"]],
        }
        tokens, z = self._generate(batch, self.mode, generator)
        actions = self.packer.actions(tokens, z)[0].cpu().numpy()
        video = self.packer.video(tokens, z)[0].cpu().numpy() if self.mode == "joint_plan" else None
        return Plan(actions, video)

    def predict_video(self, batch: dict, generator: torch.Generator) -> np.ndarray:
        """World model: what the camera will show at the layout's future offsets if `executed` is done.

        batch: video uint8 (B, T, H, W, 3) of which the past frames are used, proprio (B, P), executed (B, H, 7),
        instruction (B strings), as `data.Windows.gather` gives them. -> uint8 (B, F, H, W, 3).
        """
        past = batch | {"video": batch["video"][:, : len(self.layout.past)]}
        past.pop("video_mask", None)
        tokens, z = self._generate(past, "world_model", generator)
        return self.packer.video(tokens, z).cpu().numpy()

    @torch.no_grad()
    def _generate(self, batch: dict, mode: str, generator: torch.Generator):
        tokens = self.packer.pack(batch, mode)
        with precision(self.device):
            return tokens, generate(self.model, tokens, self.steps, generator)

    def check(self, observation: Observation) -> None:
        """Raises ValueError naming the field that is not what the checkpoint was trained on."""
        layout = self.layout
        image = observation["images"].get(layout.view)
        if image is None:
            views = ", ".join(observation["images"]) or "none"
            raise ValueError(f"observation images: view {layout.view!r} expected by the checkpoint, got {views}")
        size = (layout.height, layout.width, 3)
        if image.dtype != np.uint8 or image.shape != size:
            raise ValueError(
                f"observation images[{layout.view!r}]: the checkpoint expects uint8 {size}, "
                f"got {image.dtype} {image.shape}"
            )
        proprio = np.asarray(observation["proprio"])
        if proprio.dtype != np.float32 or proprio.shape != (PROPRIO_DIM,):
            raise ValueError(
                f"observation proprio: the checkpoint expects float32 ({PROPRIO_DIM},), "
                f"got {proprio.dtype} {proprio.shape}"
            )
        if not np.isfinite(proprio).all():
            raise ValueError(f"observation proprio: not finite: {proprio}")
        instruction = observation["instruction"]
        if not isinstance(instruction, str) or len(instruction.encode()) > layout.text_bytes:
            raise ValueError(
                f"observation instruction: the checkpoint reads text of at most {layout.text_bytes} bytes, "
                f"got {instruction!r}"
            )
