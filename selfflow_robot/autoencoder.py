"""Our own small video autoencoder: 16x16 pixels to one latent, causal in time.

A fixed linear map per patch, the principal components of the data's patches (the best one there is), and convolutions
that learn what to add to it: within a frame at 1/4, 1/8 and 1/16 of the resolution; at 1/16 every frame also sees the
two before it. No frame sees a later one, in coding or decoding, and a clip's first frame is coded as a
picture alone. Nothing pools over the picture, so it trains on crops. Trained by `experiments/train_codec.py`.

B batch, T frames, W width, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfflow_robot.pretrained import digest

PATCH = 16
PAST = 2  # frames seen before the present one
STEM = 4  # pixels per side folded into channels first


@dataclass(frozen=True)
class AutoencoderConfig:
    channels: int = 64  # of a latent
    width: int = 48  # at 1/4 of the resolution; twice that at 1/8, four times at 1/16

    def __post_init__(self):
        if not 0 < self.channels <= 3 * PATCH**2 or self.width < 1:
            raise ValueError(f"autoencoder needs 1 to {3 * PATCH**2} channels and a positive width, got {self}")


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        W, pixels = config.width, 3 * STEM**2
        # Fixed: learned at the rate of the convolutions they would first get worse.
        self.linear_in = nn.Conv2d(3 * PATCH**2, config.channels, 1).requires_grad_(False)
        self.linear_out = nn.Conv2d(config.channels, 3 * PATCH**2, 1).requires_grad_(False)
        self.register_buffer("deviation", torch.ones(config.channels))  # of the components
        self.down = nn.Sequential(
            nn.PixelUnshuffle(STEM),
            nn.Conv2d(pixels, W, 3, padding=1),
            Block(W),
            nn.Conv2d(W, 2 * W, 3, 2, 1),
            Block(2 * W),
            nn.Conv2d(2 * W, 4 * W, 3, 2, 1),
            Block(4 * W),
        )
        self.past_in = Past(4 * W)
        self.to_latent = nn.Conv2d(4 * W, config.channels, 1)
        self.from_latent = nn.Conv2d(config.channels, 4 * W, 1)
        self.past_out = Past(4 * W)
        self.up = nn.Sequential(
            Block(4 * W),
            nn.Conv2d(4 * W, 8 * W, 3, padding=1),
            nn.PixelShuffle(2),
            Block(2 * W),
            nn.Conv2d(2 * W, 4 * W, 3, padding=1),
            nn.PixelShuffle(2),
            Block(W),
            nn.Conv2d(W, pixels, 3, padding=1),
            nn.PixelShuffle(STEM),
        )
        for last in (self.to_latent, self.up[-2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @torch.no_grad()
    def begin_linear(self, pixels: Tensor) -> None:
        """Sets the linear maps to the principal components of the patches of (N, H, W, 3) in [-1, 1]."""
        patches = F.pixel_unshuffle(pixels.permute(0, 3, 1, 2), PATCH).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = patches.mean(0)
        centred = patches - mean
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(patches))  # columns, least variance first
        variance, axes = variance[-self.config.channels :].flip(0), axes[:, -self.config.channels :].flip(1)  # (768, C)
        self.deviation.copy_(variance.clamp_min(1e-6).sqrt())
        self.linear_in.weight.copy_(axes.T[..., None, None])
        self.linear_in.bias.copy_(-mean @ axes)
        self.linear_out.weight.copy_(axes[..., None, None])
        self.linear_out.bias.copy_(mean)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, H, W, 3) in [-1, 1], sides multiples of 16 -> (B, T, h, w, C)."""
        frames = _frames(pixels)
        x = self.to_latent(self.past_in(self.down(frames), pixels.shape[1]))
        x = x + self.linear_in(F.pixel_unshuffle(frames, PATCH))
        return x.permute(0, 2, 3, 1).float().unflatten(0, pixels.shape[:2])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, h, w, C) -> (B, T, H, W, 3), about [-1, 1]."""
        frames = _frames(latents)
        even = frames / self.deviation[:, None, None]  # else brightness drowns everything
        x = self.up(self.past_out(self.from_latent(even), latents.shape[1]))
        x = x + F.pixel_shuffle(self.linear_out(frames), PATCH)
        return x.permute(0, 2, 3, 1).float().unflatten(0, latents.shape[:2])

    def digest(self) -> str:
        return digest(self.state_dict())


class Block(nn.Module):
    """Residual; the identity at first."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, W, H, W)
        return x + self.second(F.silu(normalise(self.first(F.silu(normalise(x))))))


class Past(nn.Module):
    """Adds what the frames before tell, nothing at first. Without a bias: a clip's first frame has no past."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(PAST * width, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, T: int) -> Tensor:  # (B T, W, h, w)
        frames = F.silu(normalise(x)).unflatten(0, (-1, T))  # (B, T, W, h, w)
        padded = F.pad(frames, (0, 0, 0, 0, 0, 0, PAST, 0))  # PAST empty frames before the first
        before = torch.cat([padded[:, back : back + T] for back in range(PAST)], 2)  # (B, T, PAST W, h, w)
        return x + self.conv(before.flatten(0, 1))


def normalise(x: Tensor) -> Tensor:
    """Unit mean square over the channels of every place, (N, W, h, w): a crop is treated like the whole picture."""
    return F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


def _frames(x: Tensor) -> Tensor:  # (B, T, h, w, C) -> (B T, C, h, w), channels last in memory
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def loss(
    network: Autoencoder, pixels: Tensor, noise: float, latent_weight: float, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the reconstruction from noised latents, and the latents' mean square times a weight.

    A variational autoencoder whose posterior has a fixed deviation `noise` has these two terms (Ghosh et al. 2020,
    arXiv:1903.12436, section 3). The noise makes near latents decode alike, the weight keeps them from outgrowing it.
    """
    latents = network.encode(pixels)
    drawn = torch.randn(latents.shape, generator=generator).to(latents.device)
    error = F.mse_loss(network.decode(latents + noise * drawn), pixels)
    size = latents.square().mean()
    total = error + latent_weight * size
    return total, {"loss_pixels": error.detach(), "latent_square": size.detach(), "loss": total.detach()}
