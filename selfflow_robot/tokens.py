"""Frames, actions, proprioception and text -> one row of tokens with coordinates and roles, and back.

A mode is a row of a table of roles, not a function: `generate(model, packer.pack(batch, mode), ...)`. Given tokens come
first (the prefix); they never attend to the rest, so that their keys and values can be computed once per observation.
Roles are the same for a whole batch.

B batch, T frames, h x w patches, N tokens, C channels (the widest kind's; narrower kinds use the first ones),
L bytes, H horizon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from selfflow_robot.codec import Codec, CodecConfig, to_float
from selfflow_robot.flow import sample
from selfflow_robot.interfaces import ACTION_DIM, ACTION_NAMES, PROPRIO_DIM

KINDS = ("text", "proprio", "video", "action")  # the fourth coordinate is the index
GIVEN, GENERATED, HIDDEN = "given", "generated", "hidden"


class Roles(NamedTuple):
    """Who is what; None: left out of the sequence."""

    past: str  # frames
    future: str | None  # frames
    actions: str | None
    conditions: bool = True  # text and proprioception, always given


MODES = {
    "policy": Roles(GIVEN, None, GENERATED),
    "joint_plan": Roles(GIVEN, GENERATED, GENERATED),
    "world_model": Roles(GIVEN, GENERATED, GIVEN),
    "inverse_dynamics": Roles(GIVEN, GIVEN, GENERATED),
    "video_prediction": Roles(GIVEN, GENERATED, HIDDEN),
    "pretrain": Roles(GIVEN, GENERATED, None, conditions=False),
    "pretrain_all": Roles(GENERATED, GENERATED, None, conditions=False),
}
VIDEO_ONLY = tuple(name for name, roles in MODES.items() if not roles.conditions)
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Layout:
    """What one window looks like; travels in the checkpoint. Offsets count control steps from now."""

    past: tuple[int, ...] = (0,)
    future: tuple[int, ...] = (8,)
    horizon: int = 8
    text_bytes: int = 64
    height: int = 128  # pixels
    width: int = 160
    view: str = "overhead"
    fps: int = 3

    def __post_init__(self):
        object.__setattr__(self, "past", tuple(self.past))  # JSON has lists
        object.__setattr__(self, "future", tuple(self.future))
        if self.text_bytes % BYTES_PER_TOKEN:
            raise ValueError(f"text_bytes must be a multiple of {BYTES_PER_TOKEN}, got {self.text_bytes}")


@dataclass(frozen=True)
class Span:
    kind: str
    role: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Tokens:
    x: Tensor  # (B, N, C) clean data; zero where it is to be generated and unknown
    ids: Tensor  # (N, 4) float: time (control steps), row, column, kind
    weight: Tensor  # (B, N): 1 counts in the loss, 0 padding and everything that is not generated
    spans: tuple[Span, ...]  # given first, without gaps
    text: Tensor | None  # (B, L) uint8, for the text tokens
    frames: Tensor | None  # (B, T, H, W, 3) float in [-1, 1], for the given video tokens: seen in every pixel
    kept: Tensor | None = None  # bool (B, 1): windows learned from what was known before (`selfflow.loss`)

    @property
    def prefix(self) -> int:
        return sum(span.stop - span.start for span in self.spans if span.role == GIVEN)

    @property
    def places(self) -> int:
        """Tokens of one frame, h w; known where frames are given."""
        given = self.rows("video", GIVEN)
        return (given.stop - given.start) // self.frames.shape[1]

    def repeat(self, times: int) -> "Tokens":
        """Every row `times` times, one after another. What only the given tokens need stays as it is."""
        if times == 1:
            return self
        x, weight = (a.repeat_interleave(times, 0) for a in (self.x, self.weight))
        kept = None if self.kept is None else self.kept.repeat_interleave(times, 0)
        return replace(self, x=x, weight=weight, kept=kept)

    def where(self, role: str, kind: str | None = None) -> Tensor:
        """bool (1, N)."""
        mask = torch.zeros(1, self.x.shape[1], dtype=torch.bool, device=self.x.device)
        for span in self.spans:
            mask[:, span.rows] = span.role == role and kind in (None, span.kind)
        return mask

    def rows(self, kind: str, role: str) -> slice:
        """Of the one span of this kind and role; empty where there is none."""
        return next((s.rows for s in self.spans if (s.kind, s.role) == (kind, role)), slice(0, 0))


class Packer(nn.Module):
    """Knows the scales: codec, action and proprioception statistics. The same object serves training and acting.

    Actions: the six motions map q01..q99 to [-1, 1], the gripper [0, 1] to [-1, 1]. Proprioception: zero mean, unit
    deviation. A number that never varies in the data is left as it is, minus its mean for proprioception.
    """

    def __init__(self, layout: Layout, codec: CodecConfig | Codec):
        super().__init__()
        self.layout, self.codec = layout, codec if isinstance(codec, Codec) else Codec(codec)
        for name, size in (("action", ACTION_DIM), ("proprio", PROPRIO_DIM)):
            self.register_buffer(f"{name}_centre", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))

    def fit_statistics(self, stats: dict) -> "Packer":
        """stats {action: {q01, q99}, proprio: {mean, std}}, arrays (D,), as in `data.Dataset.stats`."""
        low, high = (torch.as_tensor(stats["action"][q]).double().clone() for q in ("q01", "q99"))
        low[-1], high[-1] = 0, 1  # gripper
        varies = high - low > 1e-6
        self.action_centre.copy_(torch.where(varies, (low + high) / 2, 0.0))
        self.action_scale.copy_(torch.where(varies, (high - low) / 2, 1.0))
        mean, std = (torch.as_tensor(stats["proprio"][m]).double() for m in ("mean", "std"))
        self.proprio_centre.copy_(mean)
        self.proprio_scale.copy_(torch.where(std > 1e-6, std, 1.0))
        return self

    @property
    def channels(self) -> dict[str, int]:
        return {"video": self.codec.config.channels, "action": ACTION_DIM, "proprio": PROPRIO_DIM}

    @property
    def grid(self) -> tuple[int, int]:
        return self.layout.height // self.codec.config.patch, self.layout.width // self.codec.config.patch

    def pack(self, batch: dict, mode: str | Roles, committed: int = 0) -> Tokens:
        """A batch of `data.Windows.gather`, or only the parts of it that the mode gives, -> Tokens.

        mode: a name in MODES, or roles of one's own. committed: so many of the first actions to be generated are given
        instead: they are on their way already, or done (`executed`).
        video uint8 (B, T, H, W, 3): past frames, then (where given or to be learned) future ones; action, executed
        (B, H, 7); proprio (B, P); instruction: B strings; where cached, latents (B, T, h, w, C) as `codec.raw` gives
        them. Policies learn what the expert would do (`action`); wherever actions explain the video they are what was
        done (`executed`). Raises ValueError on a wrong shape.
        """
        if isinstance(mode, str) and mode not in MODES:
            raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}, or give Roles")
        past_role, future_role, action_role, conditions = MODES[mode] if isinstance(mode, str) else mode
        if committed and not (action_role == GENERATED and 0 < committed < self.layout.horizon):
            raise ValueError(
                f"{committed} committed actions: of {self.layout.horizon} that are generated, fewer than all"
            )
        layout, device = self.layout, self.action_centre.device
        video = batch["video"].to(device)
        B, T = video.shape[:2]
        num_past, num_frames = len(layout.past), len(layout.past + layout.future)
        size = (layout.height, layout.width, 3)
        if T not in (num_past, num_frames) or video.shape[2:] != size:
            raise ValueError(f"video {tuple(video.shape)}: expected {num_past} or {num_frames} frames of {size}")
        parts = []  # (kind, role, x (B, n, C), ids (n, 4), weight (B, n))
        text = None
        if conditions:
            text = encode_text(batch["instruction"], layout.text_bytes).to(device)
            n = layout.text_bytes // BYTES_PER_TOKEN
            parts.append(("text", GIVEN, torch.zeros(B, n, 1, device=device), _ids("text", cols=n), None))
            proprio = (batch["proprio"].to(device).float() - self.proprio_centre) / self.proprio_scale
            parts.append(("proprio", GIVEN, proprio[:, None], _ids("proprio"), None))
        frame_mask = batch.get("video_mask", torch.ones(B, T, dtype=torch.bool)).to(device)
        given_frames = []
        for role, offsets, first in ((past_role, layout.past, 0), (future_role, layout.future, num_past)):
            if role is None or not offsets:
                continue
            if first and num_past == T:  # to be imagined
                if role == GIVEN:
                    raise ValueError(f"mode {mode} needs the {num_frames - num_past} future frames, got {T} frames")
                latents = torch.zeros(B, len(offsets), *self.grid, self.codec.config.channels, device=device)
                mask = torch.ones(B, len(offsets), dtype=torch.bool, device=device)
            else:
                part = slice(first, first + len(offsets))
                latents, mask = self._latents(batch, video, part), frame_mask[:, part]
                if role == GIVEN:
                    given_frames.append(video[:, part])
            ids = _ids("video", offsets, *self.grid)
            parts.append(
                ("video", role, latents.flatten(1, 3), ids, mask.repeat_interleave(self.grid[0] * self.grid[1], 1))
            )
        if action_role is not None:
            # A policy learns what the expert would do; where actions explain frames they are what was done.
            name = "action" if action_role == GENERATED and future_role is None else "executed"
            action = self._actions(batch, name, given=action_role == GIVEN)
            mask = batch.get("action_mask", torch.ones(B, layout.horizon, dtype=torch.bool)).to(device)
            ids = _ids("action", range(layout.horizon))
            if committed:
                done = self._actions(batch, "executed", given=True)[:, :committed]
                parts.append(("action", GIVEN, done, ids[:committed], None))
            parts.append(("action", action_role, action[:, committed:], ids[committed:], mask[:, committed:]))
        frames = to_float(torch.cat(given_frames, 1)) if given_frames else None
        return _join(sorted(parts, key=lambda part: part[1] != GIVEN), max(self.channels.values()), text, frames)

    def _latents(self, batch: dict, video: Tensor, part: slice) -> Tensor:  # of some frames, (B, n, h, w, C)
        if "latents" in batch:
            raw, frame = batch["latents"], (*self.grid, self.codec.config.channels)
            if len(raw) != len(video) or raw.shape[1] < part.stop or raw.shape[2:] != frame:
                raise ValueError(f"latents {tuple(raw.shape)}: this codec gives {frame} for each of {part.stop} frames")
            return self.codec.normalise(raw[:, part].to(video.device).float())
        if self.codec.framewise:
            return self.codec.encode(video[:, part])
        return self.codec.encode(video[:, : part.stop])[:, part]  # what comes later has no influence

    def _actions(self, batch: dict, name: str, given: bool) -> Tensor:  # normalised, (B, H, 7)
        shape = (len(batch["video"]), self.layout.horizon, ACTION_DIM)
        if name not in batch:
            if given:
                raise ValueError(f"given actions: the batch has no {name!r}")
            return torch.zeros(shape, device=self.action_centre.device)
        if batch[name].shape[1:] != shape[1:]:
            raise ValueError(f"{name} {tuple(batch[name].shape)}: expected {shape}")
        return self.normalise_action(batch[name].to(self.action_centre.device))

    def normalise_action(self, action: Tensor) -> Tensor:  # (..., 7)
        return (action.float() - self.action_centre) / self.action_scale

    def denormalise_action(self, x: Tensor) -> Tensor:
        """(..., 7) -> canonical actions, the gripper within [0, 1]."""
        action = x.float() * self.action_scale + self.action_centre
        return torch.cat([action[..., :-1], action[..., -1:].clamp(0, 1)], -1)

    def actions(self, tokens: Tokens, z: Tensor) -> Tensor:
        """Action tokens of z (B, N, C), given ones first, -> canonical actions (B, H, 7)."""
        rows = [tokens.rows("action", role) for role in (GIVEN, GENERATED)]
        return self.denormalise_action(torch.cat([z[:, part, :ACTION_DIM] for part in rows], 1))

    def video(self, tokens: Tokens, z: Tensor) -> Tensor:
        """Generated video tokens of z (B, N, C) -> uint8 (B, T, H, W, 3)."""
        generated = tokens.rows("video", GENERATED)
        given = slice(0, 0) if self.codec.framewise else tokens.rows("video", GIVEN)  # decoded along: the clip's past
        latents = torch.cat([z[:, rows, : self.channels["video"]] for rows in (given, generated)], 1)
        frames = self.codec.decode(latents.unflatten(1, (-1, *self.grid)))
        return frames[:, (given.stop - given.start) // math.prod(self.grid) :]


def generate(
    model,
    tokens: Tokens,
    steps: int,
    generator: torch.Generator | Sequence[torch.Generator],
    alpha: float = 1.0,
    imagination: float = 1.0,
    cached: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """Samples the generated tokens: (B, N, C). The given tokens' keys and values are computed once; `cached` False
    computes the whole sequence in every step, which gives the same and is there to be compared with.

    generator: one for the batch, or one per row, which makes a row's noise independent of its neighbours. imagination:
    how far generated frames are denoised while actions are, 1: to the end. Below 1 they stop at level 1 - imagination,
    which is enough to act on and is no video. temperature: of the actions' noise; 0 gives the same ones every time.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    rows, rest = divmod(len(tokens.x), len(generators))
    if rest or not rows:
        raise ValueError(f"{len(generators)} generators for {len(tokens.x)} rows: one, or one each")
    noise = torch.cat([torch.randn((rows, *tokens.x.shape[1:]), generator=g) for g in generators]).to(tokens.x.device)
    generated, hidden = tokens.where(GENERATED), tokens.where(HIDDEN)
    noise = noise * torch.where(tokens.where(GENERATED, "action"), temperature, 1.0)[..., None]
    z = torch.where((generated | hidden)[..., None], noise, tokens.x)
    cache = model.prefix_cache(tokens.x, torch.zeros_like(z[..., 0]), tokens) if cached else None
    end = torch.where(tokens.where(GENERATED, "video"), 1.0 - imagination, 0.0)
    return sample(lambda z, t: model(z, t, tokens, cache=cache)[0], z, generated, hidden, steps, alpha, end)


def encode_text(instructions: list[str], length: int) -> Tensor:
    """UTF-8 bytes, zero-padded: uint8 (B, length). Raises ValueError on an instruction that does not fit."""
    rows = [text.encode() for text in instructions]
    for row in rows:
        if len(row) > length:
            raise ValueError(f"instruction {row.decode()!r} has {len(row)} bytes, the model reads {length}")
    return torch.tensor([list(row.ljust(length, b"\0")) for row in rows], dtype=torch.uint8)


def _ids(kind: str, times=(0,), rows: int = 1, cols: int = 1) -> Tensor:  # (times rows cols, 4), in this order
    axes = [torch.tensor(list(times)), torch.arange(rows), torch.arange(cols), torch.tensor([KINDS.index(kind)])]
    return torch.cartesian_prod(*axes).float()


def _join(parts: list, channels: int, text: Tensor | None, frames: Tensor | None) -> Tokens:
    device = parts[0][2].device
    spans, xs, weights = [], [], []
    for kind, role, x, ids, mask in parts:
        start = spans[-1].stop if spans else 0
        if spans and (spans[-1].kind, spans[-1].role) == (kind, role):  # past and future frames in one role
            start = spans.pop().start
            spans.append(Span(kind, role, start, start + sum(len(p[3]) for p in parts if p[:2] == (kind, role))))
        else:
            spans.append(Span(kind, role, start, start + len(ids)))
        xs.append(nn.functional.pad(x, (0, channels - x.shape[-1])))
        weights.append(mask.float() if role == GENERATED else torch.zeros(x.shape[:2], device=device))
    return Tokens(
        x=torch.cat(xs, 1),
        ids=torch.cat([part[3] for part in parts]).to(device),
        weight=torch.cat(weights, 1),
        spans=tuple(spans),
        text=text,
        frames=frames,
    )


ACTION_CONTRACT = {
    "names": list(ACTION_NAMES),
    "units": "metres and radians per control step, robot base frame; gripper absolute, 1 = open",
}
