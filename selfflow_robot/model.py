"""The transformer. It sees tokens, their coordinates and one noise level per token; it knows no camera and no robot.

- One input and one output projection per kind of token. Given frames also enter through a small convolution over their
  pixels: a policy must place objects to about a pixel, finer than the latents' patches resolve. Other frames also get
  the latents of the latest given one, place by place: most of a video stands still, and to copy need not be learned;
  and what was done until then, proprioception and given actions: where the arm goes hangs on all of them together.
- Noise levels -> adaLN modulation, shared by all blocks, plus a learned offset per block (few parameters).
- Rotary position from (time, row, column, kind), and the same coordinates added to the tokens as Fourier features.
- Given tokens (the prefix) attend only to each other: their keys and values can be computed once and cached.

B batch, N tokens, P of them prefix, M = N - P, D width, H heads, E = D / H, C channels, T given frames.
"""

import contextlib
import math
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfflow_robot.flow import embed_level
from selfflow_robot.tokens import BYTES_PER_TOKEN, GIVEN, KINDS, Span, Tokens

BYTE_DIM = 32
LEVEL_DIM = 128
FREQUENCIES = 8  # per coordinate, in the added position
ACTIONS = 8  # a usual horizon: a sum over actions is divided by it
COMPILED = 64  # times a block may be compiled: fine-tuning needs more than the 8 after which torch leaves it as it is
CHANGE = 0.3  # prior variance of a latent's change since the given frame; latents have variance 1


@dataclass(frozen=True)
class ModelConfig:
    depth: int = 8
    width: int = 192
    heads: int = 3
    feature_width: int = 0  # of what the projector predicts; 0: `width`, as of a teacher's features

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 8:
            raise ValueError(f"width {self.width} / heads {self.heads} must be a multiple of 8: rotary has four axes")


PRESETS = {
    "tiny": ModelConfig(),  # 4.6 M parameters: trains in minutes on two cores
    # Widths are multiples of 192, so that the SwiGLU's 8/3 of them are multiples of 512.
    "small": ModelConfig(depth=10, width=384, heads=6),  # 21 M
    "base": ModelConfig(depth=16, width=768, heads=12),  # 127 M
    "large": ModelConfig(depth=16, width=1152, heads=16),  # 286 M
    "625m": ModelConfig(depth=38, width=1152, heads=16),  # 636 M: the paper's size
    "1b": ModelConfig(depth=34, width=1536, heads=24),  # 1.02 B
    "4b": ModelConfig(depth=34, width=3072, heads=24),  # 4.06 B
}


def preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise ValueError(f"model {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


Cache = list[tuple[Tensor, Tensor] | None]  # per block: keys and values of the prefix, (B, H, P, E); None: no prefix


def computes_bf16(device: torch.device | str) -> bool:
    """In hardware; a processor that emulates it is many times slower than in float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return kind == "cuda" and torch.cuda.is_bf16_supported()


def precision(device: torch.device | str):
    """bf16 where the processor computes in it, else a context that does nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if computes_bf16(device) else contextlib.nullcontext()


def require_compiler(device: torch.device) -> None:
    """ValueError where torch.compile would find none."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("compile needs a C++ compiler: install g++ or name one in CXX, or leave compile off")


def rotation(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """ids (N, 4) -> cosines and sines (N, dim / 2): a quarter of the angles per coordinate."""
    frequencies = 100.0 ** -(torch.arange(dim // 8, device=ids.device) / (dim // 8))
    angles = (ids[..., None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, H, E), cos and sin (N, E / 2): rotates the pairs (x_i, x_{i + E/2})."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """q (B, H, M, E), k and v (B, H, N, E), seen bool (B, 1, M, N): who sees whom, None: all -> (B, H, M, E). On the
    CPU the backward pass of torch's fused kernel takes 4 times as long as these lines, and its forward pass up to 1.7
    times for a few hundred tokens, so it is used only for a handful or for many, without a gradient."""
    short = q.shape[2] >= 64 and k.shape[2] <= 512
    if q.device.type == "cpu" and (torch.is_grad_enabled() or short):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, seen)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor], seen: Tensor | None = None) -> Tensor:
    """`attend` to the past (B, H, P, E), of which every row serves R / B rows of q, k, v (R, H, M, E) that follow one
    another, and then to their own: it is neither repeated nor joined to theirs. seen (R, 1, M, P + M)."""
    draws, M, P = len(q) // len(past[0]), q.shape[2], past[0].shape[2]

    def gather(a):  # (R, H, M, .) -> (B, H, draws M, .)
        return a.unflatten(0, (-1, draws)).transpose(1, 2).flatten(2, 3)

    def scatter(a):  # and back
        return a.unflatten(2, (draws, M)).transpose(1, 2).flatten(0, 1)

    q = q * q.shape[-1] ** -0.5
    scores = torch.cat([scatter(gather(q) @ past[0].transpose(-1, -2)), q @ k.transpose(-1, -2)], -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weight = scores.softmax(-1).to(v.dtype)
    return scatter(gather(weight[..., :P]) @ past[1]) + weight[..., P:] @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(shift.dtype), scale)


class Levels(NamedTuple):
    """Noise levels of which each sample has few: what depends on them is computed K times and handed to the tokens."""

    values: Tensor  # (B, K)
    index: Tensor  # (B, N) int64, of each token's level

    def per_token(self) -> Tensor:  # (B, N)
        return self.values.gather(1, self.index)

    def __getitem__(self, key) -> "Levels":
        """As of a tensor (B, N): `[rows]` or `[rows, tokens]`."""
        rows = key[0] if isinstance(key, tuple) else key
        return Levels(self.values[rows], self.index[key])


def part(t: Tensor | Levels, start: int, stop: int) -> Tensor | Levels:
    """Of tokens [start, stop); (B, 1) is one level for all of them."""
    return t if isinstance(t, Tensor) and t.shape[1] == 1 else t[:, start:stop]


def one_level(t: Tensor | Levels) -> tuple[Tensor, Tensor | None]:
    """-> levels (B, k), and who has which: one-hot (B, n, k) float, None where every token has its own or all have the
    first. Modulating one level per sample is much less work; a GPU is not asked, for looking would stall it, nor can
    compiled code look."""
    look = (t.index if isinstance(t, Levels) else t).device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(t, Levels):
        if look and bool((t.index == t.index[0, 0]).all()):
            column = int(t.index[0, 0])
            return t.values[:, column : column + 1], None
        return t.values, F.one_hot(t.index, t.values.shape[1]).to(t.values.dtype)
    return (t[:, :1] if look and bool((t == t[:, :1]).all()) else t), None


def hand_out(x: Tensor, who: Tensor | None) -> Tensor:
    """x (B, K, D) of every level -> (B, n, D) of every token, exact: a matrix product with a one-hot, whose backward
    pass is one too."""
    return x if who is None else torch.bmm(who.to(x.dtype), x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.width, config.width * 8 // 3  # SwiGLU with the parameters of a 4 D MLP
        self.heads = config.heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.norm_q = nn.Parameter(torch.ones(D // config.heads))
        self.norm_k = nn.Parameter(torch.ones(D // config.heads))
        self.out = nn.Linear(D, D)
        self.up = nn.Linear(D, 2 * hidden)
        self.down = nn.Linear(hidden, D)
        self.offset = nn.Parameter(torch.zeros(6, D))

    def forward(
        self,
        x: Tensor,
        modulation: tuple,
        rotary: tuple,
        past: tuple | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, n, D), modulation: 6 x (B or 1, k, D) and who has which, past: keys and values of the prefix, which
        everything sees, seen: as in `attend` -> x, and its own keys and values (B, H, n, E)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation)
        q, k, v = self.project(modulate(x, shift1, scale1), rotary)  # (B, H, n, E)
        if past is None:
            found = attend(q, k, v, seen)
        elif len(past[0]) == len(q):
            found = attend(q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2), seen)
        else:
            found = attend_shared(q, k, v, past, seen)
        x = x + gate1 * self.out(found.transpose(1, 2).flatten(2))
        gate, hidden = self.up(modulate(x, shift2, scale2)).chunk(2, -1)
        return x + gate2 * self.down(F.silu(gate) * hidden), (k, v)

    def keys(self, x: Tensor, modulation: tuple, rotary: tuple) -> tuple[Tensor, Tensor]:
        """Keys and values alone: what is needed of the prefix in the last block."""
        shift, scale = self.modulation(modulation, 2)
        return self.project(modulate(x, shift, scale), rotary)[1:]

    def modulation(self, shared: tuple, count: int = 6) -> list[Tensor]:
        levels, who = shared
        return [hand_out(a + b, who) for a, b in zip(levels[:count], self.offset.to(levels[0].dtype))]

    def project(self, x: Tensor, rotary: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D) -> queries, keys, values (B, H, n, E)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, n, H, E)
        q, k = (
            rotate(F.layer_norm(a, a.shape[-1:], scale.to(a.dtype)), *rotary)
            for a, scale in ((q, self.norm_q), (k, self.norm_k))
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Model(nn.Module):
    def __init__(self, config: ModelConfig, channels: dict[str, int], patch: int = 16):
        """channels {kind: C} of video, action and proprio (`Packer.channels`)."""
        super().__init__()
        D = config.width
        if patch != 16:
            raise ValueError(f"the pixel stem has four strides of 2, so patch must be 16, got {patch}")
        self.config, self.channels = config, dict(channels)
        self.activation_checkpointing = False  # compute the inside of blocks again for the backward pass: less memory
        self.inputs = nn.ModuleDict({kind: nn.Linear(c, D) for kind, c in channels.items()})
        self.before = nn.Linear(channels["video"], D, bias=False)  # the latest given frame at the same place
        self.acted = nn.Sequential(nn.Linear(channels["action"], D), nn.SiLU())
        self.done = nn.Sequential(nn.Linear(D + channels["proprio"], D), nn.SiLU(), nn.Linear(D, D))
        self.bytes = nn.Embedding(256, BYTE_DIM)
        self.text = nn.Linear(BYTES_PER_TOKEN * BYTE_DIM, D)
        widths = [3, D // 8, D // 4, D // 2, D]
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.stem_out = nn.Linear(D, D)
        self.position = nn.Linear(len(KINDS) * 2 * FREQUENCIES, D)
        self.level = nn.Sequential(nn.Linear(LEVEL_DIM, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        self.modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.last_modulation = nn.Linear(D, 2 * D)
        outputs = {"video": 2 * channels["video"], "action": channels["action"]}  # mean and spread; velocity
        self.outputs = nn.ModuleDict({kind: nn.Linear(D, count) for kind, count in outputs.items()})
        # student features -> teacher features (Self-Flow: one hidden layer, no norm)
        self.projector = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, config.feature_width or D))
        self.init_weights()

    def compile_blocks(self, **options) -> None:
        """torch.compile of every block, with its options. All blocks share their code, so one is compiled, anew for
        what differs in more than a size: roles, levels, with and without a gradient. ValueError where no compiler is
        found."""
        if "backend" not in options:
            require_compiler(next(self.parameters()).device)
        for block in self.blocks:
            block.compile(recompile_limit=COMPILED, **options)

    def for_inference(self, device: torch.device, compiled: bool = False) -> "Model":
        """A copy to sample with: matrices in bf16 where `precision` computes in it, which saves casting them at every
        use and changes no result. compiled: forward and prefix_cache go through torch.compile, a minute at the first
        call of every shape; on a GPU as CUDA graphs. ValueError where no compiler is found."""
        model = deepcopy(self).eval().requires_grad_(False)
        if computes_bf16(device):
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        if compiled:
            require_compiler(device)
            options = {"triton.cudagraphs": True} if device.type == "cuda" else {"freezing": True}
            model.compile(dynamic=False, options=options)
            model.prefix_cache = torch.compile(model.prefix_cache, dynamic=False, options=options)
        return model

    def init_weights(self) -> None:
        """All linear maps: uniform with variance 1 / (3 fan_in) (torch's default), biases zero. Residual gates, last
        modulation and heads: zero, so that the network starts as the zero velocity and every block as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in (self.modulation, self.last_modulation, *self.outputs.values()):
            nn.init.zeros_(module.weight)
        scale = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None]  # shift, scale, gate, twice
        for block in self.blocks:
            block.offset.data.copy_(scale.expand_as(block.offset))

    def forward(
        self,
        z: Tensor,
        t: Tensor | Levels,
        tokens: Tokens,
        feature_layer: int | tuple[int, ...] = 0,
        cache: Cache | None = None,
        apart: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """z (B, N, C) noised, t (B, N) or (B, 1) -> velocity (B, N, C), zero on given tokens, and features (B, M, D) of
        the tokens that are not given after block `feature_layer` (1 is the first; 0: none; of several layers a list).
        With `cache` the prefix is not computed again; its rows may be fewer, each for as many of z. apart bool (B, N):
        tokens where it is true and tokens where it is not see only their own kind, and the prefix."""
        P, N, features = tokens.prefix, z.shape[1], {}
        wanted = feature_layer if isinstance(feature_layer, tuple) else (feature_layer,)
        x, modulation, level = self._start(z, part(t, P, N), tokens, P, N)
        rotary = self._rotary(tokens, P, N)
        cache = self.prefix_cache(z, t, tokens) if cache is None else cache
        seen = None
        if apart is not None:
            group = apart[:, P:]
            seen = F.pad(group[:, :, None] == group[:, None], (P, 0), value=True)[:, None]  # (B, 1, M, N)
        for i, (block, past) in enumerate(zip(self.blocks, cache), 1):
            x, _ = self._run(block, x, modulation, rotary, past, seen)
            if i in wanted:
                features[i] = x
        shift, scale = (hand_out(a, modulation[1]) for a in self.last_modulation(level).chunk(2, -1))
        velocity = self._heads(modulate(x, shift, 1 + scale), z, part(t, P, N), tokens)
        if isinstance(feature_layer, tuple):
            return velocity, [features[i] for i in feature_layer]
        return velocity, features.get(feature_layer)

    def features(self, z: Tensor, t: Tensor | Levels, tokens: Tokens, layer: int, cache: Cache | None = None) -> Tensor:
        """Features (B, M, D) after block `layer`, as in `forward`; later blocks are not computed."""
        P = tokens.prefix
        x, modulation, _ = self._start(z, part(t, P, z.shape[1]), tokens, P, z.shape[1])
        rotary = self._rotary(tokens, P, z.shape[1])
        cache = self.prefix_cache(z, t, tokens, layer) if cache is None else cache
        for block, past in zip(self.blocks[:layer], cache):
            x, _ = block(x, modulation, rotary, past)
        return x

    def prefix_cache(self, z: Tensor, t: Tensor | Levels, tokens: Tokens, layers: int | None = None) -> Cache:
        """Keys and values of the given tokens of z (B, N, C) at t (B, N) in the first `layers` blocks (None: all); None
        per block where nothing is given."""
        blocks, P = self.blocks[:layers], tokens.prefix
        if not P:
            return [None] * len(blocks)
        x, modulation, _ = self._start(z, part(t, 0, P), tokens, 0, P)
        rotary, cache = self._rotary(tokens, 0, P), []
        for block in blocks[:-1]:
            x, kept = self._run(block, x, modulation, rotary)
            cache.append(kept)
        return [*cache, blocks[-1].keys(x, modulation, rotary)]

    def _run(self, block: Block, *inputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _rotary(self, tokens: Tokens, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return rotation(tokens.ids[start:stop], self.config.width // self.config.heads)

    def _start(
        self, z: Tensor, t: Tensor | Levels, tokens: Tokens, start: int, stop: int
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], Tensor | None], Tensor]:
        """Tokens [start, stop) and their levels t -> x (B, n, D), modulation 6 x (B, k, D) with who has which (see
        `one_level`), and level (B, k, D). Cuts fall between spans."""
        parts = []
        for span in tokens.spans:
            if not start <= span.start < stop:
                continue
            if span.kind == "text":
                x = self.text(self.bytes(tokens.text.long()).unflatten(1, (-1, BYTES_PER_TOKEN)).flatten(2))
            else:
                # Whole, as a cast to bf16 leaves it: of a part torch rounds with and without a gradient differently.
                x = z[:, span.rows, : self.channels[span.kind]].contiguous()
                x = self.inputs[span.kind](x)  # (B, n, D)
                if span.kind == "video" and span.role == GIVEN:
                    x = x + self._see(tokens.frames)
                elif span.kind == "video" and tokens.frames is not None:
                    x = x + repeated(self.before(latest(z, tokens)[..., : self.channels["video"]]), span)
                    x = x + self._done(z, tokens, span)
            parts.append(x)
        x = torch.cat(parts, 1) + self.position(fourier(tokens.ids[start:stop]))
        t, who = one_level(t)
        level = self.level(embed_level(t, LEVEL_DIM))
        return x, (self.modulation(level).chunk(6, -1), who), level

    def _done(self, z: Tensor, tokens: Tokens, span: Span) -> Tensor | float:
        """For each frame token of `span`, what is given of the actions before it, and proprioception: (B, n, D)."""
        actions, proprio = tokens.rows("action", GIVEN), tokens.rows("proprio", GIVEN)
        if not actions.stop or not proprio.stop:
            return 0.0
        acted = self.acted(z[:, actions, : self.channels["action"]]) / ACTIONS  # (B, k, D)
        until = F.pad(acted.cumsum(1), (0, 0, 1, 0))  # (B, k + 1, D): the first 0, 1, ... k of them
        start = z[:, proprio, : self.channels["proprio"]].expand(-1, until.shape[1], -1).to(until.dtype)
        steps = tokens.ids[span.start : span.stop, 0].long().clamp(0, acted.shape[1])
        return self.done(torch.cat([until, start], -1))[:, steps]

    def _see(self, frames: Tensor) -> Tensor:  # (B, T, H, W, 3) -> (B, T h w, D)
        x = frames.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
        for conv in self.stem:
            x = F.gelu(conv(x), approximate="tanh")
        return self.stem_out(x.permute(0, 2, 3, 1)).flatten(1, 2).unflatten(0, frames.shape[:2]).flatten(1, 2)

    def _heads(self, x: Tensor, z: Tensor, t: Tensor | Levels, tokens: Tokens) -> Tensor:
        """x (B, M, D), t (B, M) or (B, 1) -> velocity (B, N, C)."""
        P, C = tokens.prefix, z.shape[-1]
        parts = [z.new_zeros(*z.shape[:1], P, C)]
        for span in tokens.spans:
            if span.start < P:
                continue
            rows, channels = slice(span.start - P, span.stop - P), self.channels[span.kind]
            out = self.outputs[span.kind](x[:, rows]).float()
            if span.kind == "video":
                before = None if tokens.frames is None else repeated(latest(z, tokens)[..., :channels], span)
                level = t.per_token() if isinstance(t, Levels) else t
                level = level if level.shape[1] == 1 else level[:, rows]
                out = gaussian_velocity(z[:, span.rows, :channels], level[..., None], *out.chunk(2, -1), before)
            parts.append(F.pad(out, (0, C - out.shape[-1])))
        return torch.cat(parts, 1)


def latest(z: Tensor, tokens: Tokens) -> Tensor:
    """Of z (B, N, C), the latest given frame (B, h w, C)."""
    stop = tokens.rows("video", GIVEN).stop
    return z[:, stop - tokens.places : stop]


def repeated(frame: Tensor, span: Span) -> Tensor:
    """frame (B, h w, C), once for every frame of a span: (B, n, C)."""
    return frame.repeat(1, (span.stop - span.start) // frame.shape[1], 1)


def gaussian_velocity(z: Tensor, t: Tensor, change: Tensor, spread: Tensor, before: Tensor | None) -> Tensor:
    """Expected velocity where the clean token is believed to be N(before + change, s^2), s^2 = prior * exp(spread), of
    which z at level t is a noised view: all (B, n, C), t (B, n, 1) or (B, 1, 1).

    A network that outputs velocities must pass a token's noise through its width, which may be less than the token's
    channels; this one says what it believes of the data alone, and the noise takes the way around it.
    """
    prior, mean = (1.0, change) if before is None else (CHANGE, before + change)
    variance = prior * spread.clamp(-6, 3).exp()
    gain = (t - (1 - t) * variance) / ((1 - t).square() * variance + t.square())
    return gain * (z - (1 - t) * mean) - mean


def fourier(ids: Tensor) -> Tensor:
    """ids (N, 4) -> (N, 4 * 2 * FREQUENCIES), wave lengths from 4 to 512 steps."""
    frequencies = 2 * math.pi / torch.logspace(2, 9, FREQUENCIES, base=2, device=ids.device)
    angles = (ids[..., None] * frequencies).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], -1)
