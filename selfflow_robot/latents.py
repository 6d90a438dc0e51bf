"""Which codec a run uses, and its latents on disk: a data set is encoded once, training then reads numbers.

The cache lies beside the decoded frames, `<data set>/.cache/latents-<data hash>-<codec hash>.npy`: float16, before the
codec's statistics, so that runs that differ in those share it. A codec that sees frame by frame has one row per frame,
used by windows of any offsets; a causal one has one row per clip, and the offsets are in the name too. Another data set
or other weights have another name: a cache never belongs to something else. What is given is still seen in every pixel
(`Tokens.frames`), so frames are read as well; what the cache saves is running the codec.
"""

import fcntl
import io
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from selfflow_robot import checkpoint, pretrained
from selfflow_robot.codec import LEARNED, LINEAR, Codec, CodecConfig
from selfflow_robot.data import Dataset, DatasetError, Windows

CLIPS = 32  # encoded at a time, in fixed groups: a continued encoding gives the bits of one that was not stopped
SAMPLE = 1024  # frames the statistics are measured on


def open_codec(
    name: str, windows: Windows, luma: int = 12, chroma: int = 6, device: torch.device | str = "cpu"
) -> Codec:
    """dct, pixels, a run of experiments/train_codec.py, or weights through diffusers (`pretrained.SOURCES`, a folder);
    with the statistics of that run, else measured on frames of the windows. Raises ValueError with the remedy."""
    if name in LINEAR:
        return _measured(Codec(CodecConfig(name, luma=luma, chroma=chroma)), windows)
    if name not in pretrained.SOURCES and any(map(checkpoint.saved, checkpoint.candidates(name))):
        return load_codec(name).to(device)
    if name in pretrained.SOURCES or Path(name, "config.json").exists():
        network = pretrained.load(name)
        config = CodecConfig("diffusers", network=network.network, source=name)
        return _measured(Codec(config, network).to(device), windows)  # slow without one
    raise ValueError(
        f"codec {name!r}: choose {', '.join([*LINEAR, *pretrained.SOURCES])}, a folder of diffusers weights, or a run "
        "of: python experiments/train_codec.py"
    )


def load_codec(run: str | Path) -> Codec:
    """The codec of a run of experiments/train_codec.py: averaged weights and their statistics."""
    folder = checkpoint.find(run)
    tensors, manifest = checkpoint.load(folder)
    if manifest.get("kind") != "codec":
        raise ValueError(f"{run} is a {manifest.get('kind')} run; a codec is one of experiments/train_codec.py")
    codec = Codec(CodecConfig(**manifest["codec"]))
    checkpoint.restore(codec, tensors, "packer.codec", folder)
    checkpoint.require_codec(manifest, codec, folder)
    return codec.requires_grad_(False)


def identity(codec: Codec) -> dict:
    """What a run's settings do not say of its codec: of a learned one, which weights; the others follow from them."""
    return {"codec_weights": codec.weights_hash()} if codec.config.kind in LEARNED else {}


def cached(windows: Windows, codec: Codec, mode: str = "auto") -> Windows:
    """The windows with latents, for `Windows.gather`; encodes the data set first unless that was done before.

    mode: "on", "off", or "auto": for learned codecs, whose encoding takes longer than reading. Other processes that
    start meanwhile wait. Raises DatasetError when the disk refuses.
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"cache_latents {mode!r}: choose auto, on or off")
    if mode == "off" or (mode == "auto" and codec.config.kind not in LEARNED):
        return windows
    offsets = (0,) if codec.framewise else windows.past + windows.future
    dataset = windows.dataset
    path = cache_path(dataset, codec, offsets)
    shape = _shape(dataset, codec, offsets)
    try:
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_cache(path, shape):
                for stale in path.parent.glob("latents-*"):  # of an earlier state of the data set
                    if not stale.name.startswith(f"latents-{dataset.hash[:16]}-"):
                        stale.unlink()
                _encode_all(path, dataset, codec, offsets, shape)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written ({error.strerror}). Make room and run the same command again: it continues; "
            "or run with --cache_latents off."
        ) from error
    return replace(windows, latents=np.load(path, mmap_mode="r", allow_pickle=False))


def cache_path(dataset: Dataset, codec: Codec, offsets: tuple[int, ...]) -> Path:
    clip = "" if codec.framewise else "-" + "_".join(map(str, offsets))
    name = f"latents-{dataset.hash[:16]}-{codec.weights_hash()[:16]}{clip}.npy"
    return dataset.root / ".cache" / name


def _shape(dataset: Dataset, codec: Codec, offsets: tuple[int, ...]) -> tuple[int, ...]:
    height, width, _ = dataset.image_shape
    patch = codec.config.patch
    row = (height // patch, width // patch, codec.config.channels)
    return (dataset.num_frames, *row) if codec.framewise else (dataset.num_frames, len(offsets), *row)


def _is_cache(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        latents = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):  # the last two: truncated
        return False
    return latents.shape == shape and latents.dtype == np.float16


def clips(dataset: Dataset, offsets: tuple[int, ...]) -> np.ndarray:
    """Frames of the clip around every frame of the data set, int64 (N, T); within the episode, as `Windows.gather`."""
    lengths = [episode.length for episode in dataset.episodes]
    start = np.repeat([episode.start for episode in dataset.episodes], lengths)
    last = np.repeat([episode.start + episode.length - 1 for episode in dataset.episodes], lengths)
    frame = np.arange(dataset.num_frames)[:, None] + np.array(offsets)
    return np.clip(frame, start[:, None], last[:, None])


def encode_rows(dataset: Dataset, codec: Codec, frames: np.ndarray) -> np.ndarray:
    """Clips (n, T) of frame numbers -> latents before the statistics, float16 (n, T, h, w, C)."""
    video = torch.from_numpy(dataset.frames[frames]).to(codec.mean.device)
    latents = codec.raw(video).to(torch.float16).cpu().numpy()
    if not np.isfinite(latents).all():
        raise DatasetError(f"latents of {dataset.root} exceed float16: run with --cache_latents off")
    return latents


def _encode_all(path: Path, dataset: Dataset, codec: Codec, offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Group by group into `<path>.part`, which a later call continues, and in place by a rename."""
    part, header = path.with_suffix(".part"), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    start, size = len(header.getvalue()), 2 * math.prod(shape[1:])  # bytes of the header and of a row
    written = part.stat().st_size - start if part.exists() else 0
    done = max(0, written) // (CLIPS * size) * CLIPS  # rows of whole groups
    rows = clips(dataset, offsets)
    # Plain writes: a full disk is an error here, but kills the process (SIGBUS) when written through a memory map.
    with open(part, "r+b" if done else "wb") as file:
        if done:
            file.truncate(start + done * size)
            file.seek(0, os.SEEK_END)
        else:
            file.write(header.getvalue())
        groups = range(done, len(rows), CLIPS)
        for first in track(groups, f"encoding {len(rows) - done} frames (once)", transient=True):
            file.write(encode_rows(dataset, codec, rows[first : first + CLIPS]).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _measured(codec: Codec, windows: Windows) -> Codec:
    sample = range(0, len(windows), max(1, len(windows) // SAMPLE))
    return codec.fit(windows.gather([index])["video"][:, :1] for index in sample)
