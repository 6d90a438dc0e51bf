"""Train our own small video autoencoder on the frames of a data set, for use as the codec of a pretraining.

    python experiments/train_codec.py
    python experiments/train_codec.py --data data/my_videos --channels 32 --name codec32
    python experiments/pretrain.py --codec runs/codec

Writes runs/<name>: checkpoint/, metrics.jsonl, config.json, reconstructions.png (held-out frames above what the codec
makes of them). Reports the PSNR on held-out episodes. Interrupt it at any time: the same command continues.
"""

import io
from dataclasses import asdict
from pathlib import Path

from selfflow_robot.config import TrainCodecConfig, run

SAMPLE = 256  # clips the statistics and the first linear maps are measured on
CLIPS_PER_EPISODE = 4
PICTURES = 4


def train_codec(cfg: TrainCodecConfig) -> Path:
    """Train to the end, or continue; returns the run folder."""
    import torch

    from selfflow_robot import autoencoder, data, train
    from selfflow_robot.codec import Codec, CodecConfig, to_float
    from selfflow_robot.tokens import Layout, Packer

    if cfg.crop % 16 or cfg.crop < 0 or cfg.frames < 1 or cfg.stride < 1:
        raise ValueError(f"crop must be a multiple of 16, frames and stride at least 1, got {cfg}")
    dataset, device, processes = train.start(cfg, Path(__file__).with_name("collect_demos.py"))
    height, width, _ = dataset.image_shape
    if cfg.crop > min(height, width):
        raise ValueError(f"crop {cfg.crop} is larger than the frames, {height} x {width}")
    layout = Layout(future=(), height=height, width=width, view=dataset.view, fps=dataset.fps)
    config = autoencoder.AutoencoderConfig(cfg.channels, cfg.width)
    model = autoencoder.Autoencoder(config).to(device)
    # What is saved for use: the averaged weights and their statistics.
    packer = Packer(layout, CodecConfig("autoencoder", network=asdict(config))).to(device)
    strides = {stride: clips(dataset, cfg.frames, stride, "train") for stride in range(1, cfg.stride + 1)}
    shown = held_out(dataset, cfg)
    pictures = torch.cat([strides[1].gather([index])["video"][0, :1] for index in evenly(strides[1])])
    model.begin_linear(to_float(pictures).to(device))

    def batches(start):
        step = start
        while True:
            windows = strides[1 + int(data.batch_indices(cfg.stride, 1, cfg.seed, step)[0])]
            yield processes.part(windows).gather(data.batch_indices(len(windows), cfg.batch_size, cfg.seed, step))
            step += 1

    def loss_fn(model, teacher, batch, generator):
        pixels = to_float(crop(batch["video"], cfg.crop, generator).to(device))  # (B, T, H, W, 3)
        return autoencoder.loss(model, pixels, cfg.noise, cfg.latent_weight, generator)

    def prepare(averaged):
        packer.codec.network.load_state_dict(averaged.state_dict())
        windows = strides[cfg.stride]
        packer.codec.fit(windows.gather([index])["video"] for index in evenly(windows))

    def validate(averaged):
        if not shown:
            return {}
        write_pictures(folder / "reconstructions.png", packer.codec, shown)
        return psnr(packer.codec, shown)

    folder = Path("runs") / cfg.name
    schedule = train.TrainConfig(
        steps=cfg.steps, lr=cfg.lr, weight_decay=cfg.weight_decay, warmup=cfg.warmup, cooldown=cfg.cooldown,
        ema=cfg.ema, seed=cfg.seed,
    )  # fmt: skip
    train.fit(
        folder,
        train.new_state(model, schedule, processes),
        packer,
        schedule,
        {"kind": "codec", "method": "autoencoder", "identity": train.identity(cfg, dataset), "config": asdict(cfg)},
        batches=batches,
        loss_fn=loss_fn,
        validate=validate,
        save_every=cfg.save_every,
        validate_every=cfg.save_every,
        prepare=prepare,
        wandb_mode=cfg.wandb,
    )
    if processes.main:
        report(folder, Codec(CodecConfig()), strides[1], shown)
    return folder


def clips(dataset, frames: int, stride: int, split: str):
    """Windows of `frames` frames, `stride` control steps apart."""
    from selfflow_robot import data

    return data.windows(dataset, (0,), [stride * n for n in range(1, frames)], horizon=1, split=split)


def evenly(windows) -> range:
    """About SAMPLE indices, spread over all."""
    return range(0, len(windows), max(1, len(windows) // SAMPLE))


def held_out(dataset, cfg) -> list:
    """Clips of every held-out episode, evenly spread: uint8 (n, T, H, W, 3) each."""
    import numpy as np

    if not dataset.split("validation"):
        return []
    windows = clips(dataset, cfg.frames, cfg.stride, "validation")
    episodes = (np.flatnonzero(windows.first == first) for first in np.unique(windows.first))
    chosen = (rows[np.linspace(0, len(rows) - 1, CLIPS_PER_EPISODE).astype(int)] for rows in episodes)
    return [windows.gather(np.unique(rows))["video"] for rows in chosen]


def crop(video, side: int, generator):
    """A random square of every clip, (B, T, H, W, 3) -> (B, T, side, side, 3); 0: whole frames."""
    import torch

    if not side:
        return video
    rows, cols = (torch.randint(size - side + 1, (len(video),), generator=generator) for size in video.shape[2:4])
    return torch.stack([clip[:, r : r + side, c : c + side] for clip, r, c in zip(video, rows, cols)])


def psnr(codec, episodes: list) -> dict[str, float]:
    """Mean over held-out episodes, dB, with a 95 % interval (Student's t over episodes) where there are several."""
    import numpy as np
    from scipy import stats

    from selfflow_robot import metrics

    device = codec.mean.device
    values = [
        metrics.psnr(clip.numpy(), codec.decode(codec.encode(clip.to(device))).cpu().numpy()) for clip in episodes
    ]
    mean = float(np.mean(values))
    found = {"validation/psnr": mean, "validation/episodes": len(values)}
    if len(values) > 1:
        half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
        found |= {"validation/psnr_low": mean - half, "validation/psnr_high": mean + half}
    return found


def write_pictures(path: Path, codec, episodes: list) -> None:
    """Last frames of clips above their reconstructions, which the clip's earlier frames contributed to."""
    import numpy as np
    from PIL import Image

    from selfflow_robot.checkpoint import write_atomic

    video = episodes[0][:PICTURES]
    rows = [
        np.concatenate(list(v[:, -1].cpu().numpy()), 1)
        for v in (video, codec.decode(codec.encode(video.to(codec.mean.device))))
    ]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(rows, 0)).save(content, "png")
    write_atomic(path, content.getvalue())


def report(folder: Path, simple, windows, episodes: list) -> None:
    """One line on the finished codec, beside the cosine transform's."""
    from selfflow_robot import latents

    codec = latents.load_codec(folder)
    print(f"{folder}: codec {codec.hash()[:16]}, {codec.config.channels} channels per 16x16 pixels")
    if not episodes:
        print("no PSNR: the data set has no held-out episode")
        return
    simple.fit(windows.gather([index])["video"][:, :1] for index in evenly(windows))
    for name, candidate in (("codec", codec), (f"dct, {simple.config.channels} channels", simple)):
        found = psnr(candidate, episodes)
        interval = "".join(
            f" {end} {found[key]:.2f}" for end in ("low", "high") if (key := f"validation/psnr_{end}") in found
        )
        text = f" (95 %:{interval})" if interval else ""
        print(f"  {name}: PSNR {found['validation/psnr']:.2f} dB{text} on held-out episodes: {len(episodes)}")


if __name__ == "__main__":
    run(TrainCodecConfig, train_codec)
