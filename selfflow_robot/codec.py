"""Video in, latents out, and back: frozen, one interface, `encode` and `decode`, one latent frame per frame.

Four kinds. "dct" and "pixels": one linear map per patch. "autoencoder": our own, `autoencoder.py`. "diffusers": a
published one, `pretrained.py`. All give one token per 16x16 patch, so the rest of the code does not know which it is.

Why not the 768 pixels of a 16x16 patch: a network of width 192 cannot express a velocity with 768 independent
channels, and most of them are noise anyway. Low spatial frequencies carry what control needs, so the default keeps the
low-frequency corner of each patch's cosine transform and scales every coefficient to about unit variance.

Time: a clip is the frames of one window, few and far apart. All kinds code frame by frame but "autoencoder", which is
causal: a frame's latent depends on earlier frames of the clip, never on later ones, so that given frames tell nothing
about the future, and the latents of an observation are those of training.

B batch, T frames, h x w patches, P patch size, C channels.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from selfflow_robot import pretrained
from selfflow_robot.autoencoder import Autoencoder, AutoencoderConfig

LINEAR = ("dct", "pixels")
LEARNED = ("autoencoder", "diffusers")
PATCH = 16
GREY_LEVEL = 2 / 255  # of pixels scaled to [-1, 1]

# ITU-R BT.601 luma and colour differences; rows applied to RGB in [-1, 1].
RGB_TO_YCBCR = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
)


@dataclass(frozen=True)
class CodecConfig:
    kind: str = "dct"  # or pixels, autoencoder, diffusers
    patch: int = PATCH
    luma: int = 12  # dct: side of the square of coefficients kept, of `patch`
    chroma: int = 6
    network: dict | None = None  # autoencoder: its AutoencoderConfig; diffusers: the class's config with "_class_name"
    source: str = ""  # diffusers: name or folder of the weights, which no checkpoint of ours repeats

    def __post_init__(self):
        if self.kind not in LINEAR + LEARNED:
            raise ValueError(f"codec {self.kind!r}: choose dct or pixels, autoencoder or diffusers")
        if not 0 < self.luma <= self.patch or not 0 < self.chroma <= self.patch:
            raise ValueError(f"codec keeps 1 to {self.patch} coefficients per side, got {self}")
        if self.kind in LEARNED and (self.patch != PATCH or self.network is None):
            raise ValueError(f"codec {self.kind!r} needs patch {PATCH} and its network's config, got {self}")

    @property
    def channels(self) -> int:
        match self.kind:
            case "pixels":
                return 3 * self.patch**2
            case "dct":
                return self.luma**2 + 2 * self.chroma**2
            case "autoencoder":
                return AutoencoderConfig(**self.network).channels
            case _:
                return pretrained.channels(self.network, self.patch)


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
    """A frozen network, given or made from the config, and per-channel statistics measured from data."""

    def __init__(self, config: CodecConfig, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.network = (_network(config) if network is None else network).eval().requires_grad_(False)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    @property
    def framewise(self) -> bool:
        """Whether a frame's latent depends on nothing but that frame."""
        return self.config.kind != "autoencoder"

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> "Codec":
        """Measures the statistics on uint8 clips (B, T, H, W, 3). The pixel codec has none: pixels stay in [-1, 1]."""
        if self.config.kind == "pixels":
            return self
        total, squares, count = torch.zeros(2, self.config.channels, dtype=torch.float64).unbind() + (0,)
        for clip in clips:
            rows = self.raw(clip.to(self.mean.device)).flatten(0, -2).double().cpu()  # (B T h w, C)
            total, squares, count = total + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
        if not count:
            raise ValueError("codec statistics need at least one clip, got none")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        # A coefficient that varies by less than one grey level is noise of the video compression: do not amplify it.
        # Nor a learned channel that is next to constant.
        least = GREY_LEVEL if self.config.kind == "dct" else max(0.01 * std.max().item(), 1e-6)
        self.std.copy_(std.clamp_min(least))
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3), sides multiples of the patch -> latents float32 (B, T, h, w, C)."""
        return self.normalise(self.raw(video))

    @torch.no_grad()
    def raw(self, video: Tensor) -> Tensor:
        """Latents before the statistics are applied; what the cache holds."""
        p = self.config.patch
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video must be uint8 (B, T, H, W, 3), got {video.dtype} {tuple(video.shape)}")
        if video.shape[2] % p or video.shape[3] % p:
            raise ValueError(f"frame {tuple(video.shape[2:4])}: height and width must be multiples of {p}")
        with self._exact(video):
            return self.network.encode(to_float(video))

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, h, w, C) -> uint8 (B, T, H, W, 3)."""
        with self._exact(latents):
            return to_uint8(self.network.decode(latents.float() * self.std + self.mean))

    def weights_hash(self) -> str:
        """What the codec is, wherever its weights lie and whatever data its statistics come from."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "source"}
        return hashlib.sha256(json.dumps([settings, self.network.digest()], sort_keys=True).encode()).hexdigest()

    def hash(self) -> str:
        """Of config, weights and statistics: equal hashes, equal latents."""
        statistics = pretrained.digest({"mean": self.mean, "std": self.std})
        return hashlib.sha256((self.weights_hash() + statistics).encode()).hexdigest()

    def _exact(self, tensor: Tensor):
        """Learned codecs compute in float32 in training's mixed precision too: their latents are data, cached ones the
        same as fresh ones."""
        if self.config.kind in LINEAR:
            return contextlib.nullcontext()
        return torch.autocast(tensor.device.type, enabled=False)


def _network(config: CodecConfig) -> nn.Module:
    match config.kind:
        case "autoencoder":
            return Autoencoder(AutoencoderConfig(**config.network))
        case "diffusers":
            return pretrained.load(config.source, config.patch)
        case _:
            return Linear(config)


class Linear(nn.Module):
    """One linear map per patch and its inverse on what is kept."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.patch = config.patch
        forward, backward = _linear_maps(config)
        self.register_buffer("forward_map", forward, persistent=False)  # (3 P P, C)
        self.register_buffer("backward_map", backward, persistent=False)  # (C, 3 P P)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, H, W, 3) in [-1, 1] -> (B, T, h, w, C)."""
        p = self.patch
        grid = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, T, h, P, w, P, 3)
        return grid.transpose(3, 4).flatten(-3) @ self.forward_map

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, h, w, C) -> (B, T, H, W, 3)."""
        patches = (latents @ self.backward_map).unflatten(-1, (self.patch, self.patch, 3))  # (B, T, h, w, P, P, 3)
        return patches.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)

    def digest(self) -> str:
        return ""  # the config says it all


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
