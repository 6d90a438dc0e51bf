"""Published autoencoders through diffusers: Stable Diffusion's, FLUX.2's, Wan's, or a local folder of theirs.

Each codes frame by frame and gives one latent per 16x16 pixels: latents at 1/8 of the resolution are folded 2x2 into
channels, as Self-Flow and FLUX.2 do. Wan compresses time only between consecutive frames, which windows of frames far
apart do not have: every frame is coded as the first of a clip, which Wan codes as a picture alone.

The posterior's mode is the latent, and its scale is measured (`Codec.fit`), not the one published with the weights.

N frames, H x W pixels, h x w tokens, C channels of a token, r = folds per side.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> repository on the Hugging Face hub and folder in it
SOURCES = {
    "sd": ("stabilityai/sd-vae-ft-ema", ""),
    "flux2": ("black-forest-labs/FLUX.2-klein-4B", "vae"),  # the same autoencoder as FLUX.2-dev's, without a gate
    "wan2.1": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae"),
    "wan2.2": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae"),
}
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLWan")
FRAMES = 16  # coded at a time: bounds the memory


class CodecError(ValueError):
    """A codec that cannot be had or does not fit; the message names it and the remedy."""


def downscale(config: dict) -> int:
    """Pixels per side of one latent, from a diffusers config with its "_class_name"."""
    if config["_class_name"] == "AutoencoderKLWan":
        return 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
    return 2 ** (len(config["block_out_channels"]) - 1)


def channels(config: dict, patch: int) -> int:
    """Of one token of `patch` x `patch` pixels."""
    if config.get("_class_name") not in CLASSES:
        raise CodecError(f"diffusers class {config.get('_class_name')!r}: choose one of {', '.join(CLASSES)}")
    if patch % downscale(config):
        raise CodecError(f"{config['_class_name']} has a latent per {downscale(config)} pixels, tokens need {patch}")
    wan = config["_class_name"] == "AutoencoderKLWan"
    return config["z_dim" if wan else "latent_channels"] * (patch // downscale(config)) ** 2


class Pretrained(nn.Module):
    """The interface of a codec's network around a diffusers autoencoder, whose weights are no part of its state: they
    are large, never change and can be had again; `digest` notices when they do change."""

    def __init__(self, autoencoder: nn.Module, patch: int = 16):
        super().__init__()
        self._held = [autoencoder.eval().requires_grad_(False)]  # in a list: not a submodule
        self.network = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
        self.network["_class_name"] = type(autoencoder).__name__
        channels(self.network, patch)  # raises what is wrong
        self.fold = patch // downscale(self.network)
        self._digest = digest(autoencoder.state_dict())

    def _apply(self, function, *args, **kwargs):  # .to(device) moves the weights too
        self._held[0]._apply(function, *args, **kwargs)
        return super()._apply(function, *args, **kwargs)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, T, H, W, 3) in [-1, 1] -> (B, T, h, w, C)."""
        frames = pixels.flatten(0, 1).permute(0, 3, 1, 2)  # (N, 3, H, W)
        latents = torch.cat([self._encode(part) for part in frames.split(FRAMES)])  # (N, C / r r, r h, r w)
        return F.pixel_unshuffle(latents, self.fold).permute(0, 2, 3, 1).unflatten(0, pixels.shape[:2])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, h, w, C) -> (B, T, H, W, 3)."""
        frames = F.pixel_shuffle(latents.flatten(0, 1).permute(0, 3, 1, 2), self.fold)
        pixels = torch.cat([self._decode(part) for part in frames.split(FRAMES)])  # (N, 3, H, W)
        return pixels.permute(0, 2, 3, 1).unflatten(0, latents.shape[:2])

    def digest(self) -> str:
        return self._digest

    @property
    def _wan(self) -> bool:
        return self.network["_class_name"] == "AutoencoderKLWan"

    def _encode(self, frames: Tensor) -> Tensor:
        if self._wan:
            return self._held[0].encode(frames[:, :, None]).latent_dist.mode()[:, :, 0]
        return self._held[0].encode(frames).latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        if self._wan:
            return self._held[0].decode(latents[:, :, None]).sample[:, :, 0]
        return self._held[0].decode(latents).sample


def load(source: str, patch: int = 16) -> Pretrained:
    """A name of SOURCES or a folder with diffusers' config.json and safetensors. Raises CodecError when the weights
    cannot be had."""
    try:
        import diffusers
    except ImportError as error:
        raise CodecError(f"codec {source} needs diffusers. Run: pip install -e .[codecs]") from error
    repository, folder = SOURCES.get(source, (source, ""))
    if source not in SOURCES and not Path(source, "config.json").exists():
        raise CodecError(f"codec {source}: no such folder of diffusers weights (no {Path(source, 'config.json')})")
    try:
        name = diffusers.AutoencoderKL.load_config(repository, subfolder=folder or None).get("_class_name")
        if name not in CLASSES:
            raise CodecError(f"codec {source}: diffusers class {name!r}; choose one of {', '.join(CLASSES)}")
        autoencoder = getattr(diffusers, name).from_pretrained(
            repository, subfolder=folder or None, use_safetensors=True, torch_dtype=torch.float32
        )
    except OSError as error:
        reason, part = str(error).splitlines()[0], f" --include '{folder}/*'" if folder else ""
        raise CodecError(
            f"codec {source}: the weights of {repository} cannot be had ({reason}). Where there is a network, run: "
            f"hf download {repository}{part} --local-dir weights; copy the folder here and give --codec "
            f"{Path('weights', folder)}. Or take --codec dct, or train one: python experiments/train_codec.py"
        ) from error
    return Pretrained(autoencoder, patch)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()
