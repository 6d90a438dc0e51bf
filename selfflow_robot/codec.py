"""Video in, latents out, and back: frozen, one interface, `encode` and `decode`.

Why not the 768 pixels of a 16x16 patch: a network of width 192 cannot express a velocity with 768 independent
channels, and most of them are noise anyway. Low spatial frequencies carry what control needs, so the default keeps the
low-frequency corner of each patch's cosine transform and scales every coefficient to about unit variance.

B batch, T frames, h x w patches, P patch size, C channels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GREY_LEVEL = 2 / 255  # of pixels scaled to [-1, 1]

# ITU-R BT.601 luma and colour differences; rows applied to RGB in [-1, 1].
RGB_TO_YCBCR = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
)


@dataclass(frozen=True)
class CodecConfig:
    kind: str = "dct"  # or "pixels"
    patch: int = 16
    luma: int = 12  # side of the square of coefficients kept, of `patch`
    chroma: int = 6

    def __post_init__(self):
        if self.kind not in ("dct", "pixels"):
            raise ValueError(f"codec {self.kind!r}: choose dct or pixels")
        if not 0 < self.luma <= self.patch or not 0 < self.chroma <= self.patch:
            raise ValueError(f"codec keeps 1 to {self.patch} coefficients per side, got {self}")

    @property
    def channels(self) -> int:
        return 3 * self.patch**2 if self.kind == "pixels" else self.luma**2 + 2 * self.chroma**2


def dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, (n, n) float64: rows are frequencies, lowest first."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def to_float(video: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """float in [-1, 1], clipped -> uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Codec(nn.Module):
    """One linear map per patch, fixed at construction, and per-channel statistics measured from data."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        forward, backward = _linear_maps(config)
        self.register_buffer("forward_map", forward, persistent=False)  # (3 P P, C)
        self.register_buffer("backward_map", backward, persistent=False)  # (C, 3 P P)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> "Codec":
        """Measures the statistics on uint8 clips (B, T, H, W, 3). The pixel codec has none: pixels stay in [-1, 1]."""
        if self.config.kind == "pixels":
            return self
        total, squares, count = torch.zeros(2, self.config.channels, dtype=torch.float64).unbind() + (0,)
        for clip in clips:
            rows = self._patches(clip).flatten(0, -2) @ self.forward_map  # (B T h w, C)
            rows = rows.double()
            total, squares, count = total + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
        if not count:
            raise ValueError("codec statistics need at least one clip, got none")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        # A coefficient that varies by less than one grey level is noise of the video compression: do not amplify it.
        self.std.copy_(std.clamp_min(GREY_LEVEL))
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3), sides multiples of the patch -> latents float32 (B, T, h, w, C)."""
        return (self._patches(video) @ self.forward_map - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, h, w, C) -> uint8 (B, T, H, W, 3)."""
        patches = (latents.float() * self.std + self.mean) @ self.backward_map  # (B, T, h, w, 3 P P)
        patches = patches.unflatten(-1, (self.config.patch, self.config.patch, 3))
        return to_uint8(patches.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2))

    def _patches(self, video: Tensor) -> Tensor:  # -> (B, T, h, w, P P 3)
        p = self.config.patch
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video must be uint8 (B, T, H, W, 3), got {video.dtype} {tuple(video.shape)}")
        if video.shape[2] % p or video.shape[3] % p:
            raise ValueError(f"frame {tuple(video.shape[2:4])}: height and width must be multiples of {p}")
        grid = video.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, T, h, P, w, P, 3)
        return to_float(grid.transpose(3, 4)).flatten(-3)


def _linear_maps(config: CodecConfig) -> tuple[Tensor, Tensor]:
    """Pixels of a patch, row by row with RGB last -> channels, and its inverse on what is kept."""
    p = config.patch
    if config.kind == "pixels":
        return torch.eye(3 * p * p), torch.eye(3 * p * p)
    basis = dct_matrix(p)
    forward, backward = [], []
    colour, inverse_colour = RGB_TO_YCBCR, torch.linalg.inv(RGB_TO_YCBCR)
    for plane, keep in enumerate((config.luma, config.chroma, config.chroma)):
        waves = torch.einsum("ua,vb->uvab", basis[:keep], basis[:keep]).reshape(keep * keep, p * p)
        forward.append(torch.einsum("ns,c->scn", waves, colour[plane]).reshape(p * p * 3, -1))
        backward.append(torch.einsum("ns,c->nsc", waves, inverse_colour[:, plane]).reshape(-1, p * p * 3))
    return torch.cat(forward, 1).float(), torch.cat(backward, 0).float()
