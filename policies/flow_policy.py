"""A trained network as a function: observation history -> action chunk, and the video it expects.

Normalisation, codec and tokens are those of training: the checkpoint brings its own `Packer`. `imagination` is the dial
between acting without a thought of the future (0: future frames are left out, the fastest) and imagining it in full
along with the actions (1: "joint_plan"); between, frames are denoised so far and no further.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from selfflow_robot import checkpoint
from selfflow_robot.flow import generator
from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_DIM, Observation
from selfflow_robot.model import Model, precision
from selfflow_robot.tokens import Packer, Roles, Tokens, generate


class Request(NamedTuple):
    history: Sequence[Observation]  # at the layout's past offsets, oldest first
    key: tuple[int, int]  # (seed, control step) names the noise: the same key gives the same plan
    committed: np.ndarray | None = None  # float32 (k, 7), canonical: the chunk's first actions, on their way already


class Plan(NamedTuple):
    actions: np.ndarray  # float32 (H, 7), canonical; the committed ones first, unchanged
    video: np.ndarray | None  # uint8 (F, H, W, 3) at the layout's future offsets; None unless imagined to the end


class FlowPolicy:
    def __init__(
        self,
        model: Model,
        packer: Packer,
        steps: int = 4,
        imagination: float = 0.0,
        cached: bool = True,
        compiled: bool = False,
        temperature: float = 0.0,
    ):
        """steps: of the sampler. cached False computes the whole sequence in every one of them, to compare with.
        compiled: see `Model.for_inference`. temperature: of the noise that a plan's actions begin with; 0: no chance,
        the same chunk whenever the same is seen."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if not 0 <= imagination <= 1:
            raise ValueError(f"imagination must be from 0 (act only) to 1 (imagine in full), got {imagination}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.packer = model.to(self.device).eval(), packer.to(self.device)
        self.sampler = self.model.for_inference(self.device, compiled)
        self.steps, self.imagination, self.cached, self.temperature = steps, imagination, cached, temperature
        self.manifest: dict = {}

    @classmethod
    def load(cls, path: str | Path, **settings) -> "FlowPolicy":
        """Of a run (name, run folder or checkpoint folder); settings as above. ValueError where it is no policy."""
        model, packer, manifest = checkpoint.load_model(path)
        if manifest.get("kind") != "finetune":
            raise ValueError(
                f"{path} is a video backbone. Fine-tune it: python experiments/finetune.py --pretrained {path}"
            )
        policy = cls(model, packer, **settings)
        policy.manifest = manifest
        return policy

    @property
    def layout(self):
        return self.packer.layout

    def plan(self, history: Sequence[Observation], key: tuple[int, int], committed: np.ndarray | None = None) -> Plan:
        """The chunk that follows `history`; see `Request`."""
        return self.plans([Request(history, key, committed)])[0]

    def plans(self, requests: Sequence[Request]) -> list[Plan]:
        """Plans of several robots in one batch. No request's noise or observation reaches another's plan; computing
        together may round differently than computing alone."""
        groups = defaultdict(list)  # a batch has one row of roles, so as many committed actions everywhere
        for index, request in enumerate(requests):
            groups[0 if request.committed is None else len(request.committed)].append(index)
        made: dict[int, Plan] = {}
        for count, indices in groups.items():
            made |= zip(indices, self._plans([requests[index] for index in indices], count))
        return [made[index] for index in range(len(requests))]

    def _plans(self, requests: list[Request], count: int) -> list[Plan]:
        layout, batch = self.layout, observed([request.history for request in requests], self.layout.view)
        if count >= layout.horizon:
            raise ValueError(f"{count} committed actions leave nothing to plan in a horizon of {layout.horizon}")
        if count:
            committed = np.stack([np.asarray(request.committed, np.float32) for request in requests])
            if committed.shape[1:] != (count, ACTION_DIM) or not np.isfinite(committed).all():
                raise ValueError(f"committed actions: expected finite numbers ({count}, {ACTION_DIM})")
            rest = np.zeros((len(requests), layout.horizon - count, ACTION_DIM), np.float32)
            batch["executed"] = torch.from_numpy(np.concatenate([committed, rest], 1))
        mode = "joint_plan" if self.imagination > 0 else "policy"
        noise = [generator(*request.key) for request in requests]
        tokens, z = self.generate(batch, mode, noise, count, self.temperature)
        actions = self.packer.actions(tokens, z).cpu().numpy()
        if count:
            actions[:, :count] = committed  # to the bit, which normalising and back is not
        videos = self.packer.video(tokens, z).cpu().numpy() if self.imagination == 1 else [None] * len(requests)
        return [Plan(*plan) for plan in zip(actions, videos)]

    def predict_video(self, batch: dict, generator: torch.Generator | Sequence[torch.Generator]) -> np.ndarray:
        """World model: what the camera will show at the layout's future offsets if `executed` is done.

        batch: video uint8 (B, T, H, W, 3) of which the past frames are used, proprio (B, P), executed (B, H, 7),
        instruction (B strings), as `data.Windows.gather` gives them. -> uint8 (B, F, H, W, 3).
        """
        tokens, z = self.generate(self._past(batch), "world_model", generator)
        return self.packer.video(tokens, z).cpu().numpy()

    def explain(self, batch: dict, generator: torch.Generator | Sequence[torch.Generator]) -> np.ndarray:
        """Inverse dynamics: the actions (B, H, 7) that lead from the past frames of `video` to its future ones."""
        wanted = {name: batch[name] for name in ("video", "proprio", "instruction")}
        tokens, z = self.generate(wanted, "inverse_dynamics", generator)
        return self.packer.actions(tokens, z).cpu().numpy()

    @torch.no_grad()
    def generate(
        self,
        batch: dict,
        mode: str | Roles,
        generator: torch.Generator | Sequence[torch.Generator],
        committed: int = 0,
        temperature: float = 1.0,
    ) -> tuple[Tokens, torch.Tensor]:
        """Any role assignment: tokens, and their sampled z (B, N, C), for `packer.actions` and `packer.video`."""
        tokens = self.packer.pack(batch, mode, committed)
        imagination = self.imagination if mode == "joint_plan" else 1.0
        settings = dict(imagination=imagination, cached=self.cached, temperature=temperature)
        with precision(self.device):
            z = generate(self.sampler, tokens, self.steps, generator, **settings)
        return tokens, z

    def _past(self, batch: dict) -> dict:
        unknown = ("video_mask", "latents")  # of the frames that are cut off
        kept = {name: value for name, value in batch.items() if name not in unknown}
        return kept | {"video": batch["video"][:, : len(self.layout.past)]}

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


def observed(histories: Sequence[Sequence[Observation]], view: str) -> dict:
    """Observation histories (B of them, T long) as a batch for `Packer.pack`: video (B, T, H, W, 3), proprio (B, P) and
    instruction of the last."""
    now = [history[-1] for history in histories]
    return {
        "video": torch.from_numpy(np.stack([[o["images"][view] for o in history] for history in histories])),
        "proprio": torch.from_numpy(np.stack([np.asarray(o["proprio"]) for o in now])),
        "instruction": [o["instruction"] for o in now],
    }
