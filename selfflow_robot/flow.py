"""Flow matching, modality-free. Reading starts here.

The one convention, stated here and flipped nowhere: noise level t = 0 is data, t = 1 is noise;
z_t = (1 - t) x + t noise, velocity v = dz/dt = noise - x; sampling integrates t from 1 to 0.
Every token has its own t, so all tensors carry a token axis.

B batch, N tokens, C channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x, noise (B, N, C), t (B, N) or (B, 1) in [0, 1] -> z_t and its velocity, both (B, N, C). Self-Flow eq. 1-2."""
    t = t[..., None]
    return (1 - t) * x + t * noise, noise - x


def shift(t: Tensor, alpha: float) -> Tensor:
    """Moves noise levels towards noise (alpha > 1): alpha t / (1 + (alpha - 1) t), the identity at alpha = 1."""
    return alpha * t / (1 + (alpha - 1) * t)


@dataclass(frozen=True)
class TimestepDistribution:
    """p(t) of training. `logit_normal`: logit t ~ N(ln shift, 1), which is a shifted standard logit-normal.

    A fraction `low_snr` of the draws is replaced by U[0.95, 1] (Self-Flow appendix B: large gain for video).
    """

    kind: str = "logit_normal"  # or "uniform"
    shift: float = 1.0
    low_snr: float = 0.0

    def __post_init__(self):
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"timestep distribution {self.kind!r}: choose uniform or logit_normal")
        if self.shift <= 0 or not 0 <= self.low_snr <= 1:
            raise ValueError(f"timestep distribution needs shift > 0 and low_snr in [0, 1], got {self}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent noise levels of the given shape."""
        if self.kind == "uniform":
            t = torch.rand(shape, generator=generator)
        else:
            t = torch.randn(shape, generator=generator).sigmoid()
        t = shift(t, self.shift)
        replace = torch.rand(shape, generator=generator) < self.low_snr
        return torch.where(replace, 0.95 + 0.05 * torch.rand(shape, generator=generator), t)


def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    generated: Tensor,
    hidden: Tensor,
    steps: int,
    alpha: float = 1.0,
    end: Tensor | float = 0.0,
) -> Tensor:
    """Euler integration of the generated tokens from noise to data; policy, world model, inverse dynamics: only the
    masks change.

    velocity(z (B, N, C), t (B, N)) -> (B, N, C). z starts as noise where tokens are generated or hidden and as data
    where they are given; generated, hidden bool (B, N) or (1, N). `alpha` spends more of the `steps` near noise. `end`
    (1, N): the level at which a generated token stops, 0 for data.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, got {steps}")
    given_level = hidden.to(z.dtype).expand(z.shape[:2])  # (B, N): 1 where hidden, 0 where given
    for t0, t1 in pairwise(shift(torch.linspace(1, 0, steps + 1, device=z.device), alpha)):
        t = torch.where(generated, end + (1 - end) * t0, given_level)  # (B, N)
        z = z + torch.where(generated, (1 - end) * (t1 - t0), 0.0)[..., None] * velocity(z, t)
    return z


def generator(*key: int) -> torch.Generator:
    """A stream of random numbers of its own for every key, e.g. (seed, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def embed_level(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of noise levels t (...) -> (..., dim), periods from 2 pi down to 2 pi / 1e3."""
    frequencies = torch.exp(torch.linspace(0, math.log(1e3), dim // 2, device=t.device))
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
