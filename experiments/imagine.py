"""What a world model expects to see, beside what happened: real | predicted, as an H.264 video.

    python experiments/imagine.py --checkpoint runs/finetune_self_flow --out runs/imagined.mp4

Every predicted frame comes from one real frame, its proprioception and the actions executed since; the episode is one
the model never saw. Prints the PSNR, and that of the given frame shown again: what a model that learned nothing gets.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selfflow_robot import checkpoint
from selfflow_robot.data import DatasetError, encode_video, open_dataset, windows
from selfflow_robot.flow import generator
from selfflow_robot.metrics import psnr

BATCH = 16  # windows predicted at once
SCALE, BAR, FPS = 2, 28, 6


def imagine(policy, dataset, number: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation episode `number` -> frames uint8 (K, H, W, 3) each: real, predicted, and given to predict from.

    The prediction is at the layout's furthest future offset; K is the episode's length less that offset.
    """
    layout = policy.layout
    cut = windows(dataset, layout.past, layout.future, layout.horizon, split="validation")
    episodes = dataset.split("validation")
    if not 0 <= number < len(episodes):
        raise ValueError(f"--episode {number}: the validation split has {len(episodes)}, numbered from 0")
    inside = (cut.first == episodes[number].start) & (cut.now + layout.future[-1] <= cut.last)
    if not (indices := np.flatnonzero(inside)).size:
        raise ValueError(f"--episode {number} is shorter than {layout.future[-1]} steps; choose another")
    real, predicted, given = [], [], []
    for start in range(0, len(indices), BATCH):
        batch = cut.gather(indices[start : start + BATCH])
        predicted.append(policy.predict_video(batch, generator(seed, start))[:, -1])
        video = batch["video"].numpy()
        real.append(video[:, -1])
        given.append(video[:, len(layout.past) - 1])
    return np.concatenate(real), np.concatenate(predicted), np.concatenate(given)


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str]) -> np.ndarray:
    """Two videos (K, H, W, 3), titled and doubled in size -> uint8 (K, 2 H + BAR, 4 W, 3)."""
    frames, (height, width) = np.concatenate([left, right], axis=2), left.shape[1:3]
    font, pictures = ImageFont.load_default(size=14), []
    for frame in frames:
        canvas = Image.new("RGB", (2 * SCALE * width, SCALE * height + BAR), (40, 40, 40))
        canvas.paste(Image.fromarray(frame).resize((2 * SCALE * width, SCALE * height)), (0, BAR))
        for x, title in zip((6, SCALE * width + 6), titles):
            ImageDraw.Draw(canvas).text((x, 5), title, "white", font)
        pictures.append(np.asarray(canvas))
    return np.array(pictures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or folder (default: the newest fine-tuned run)")
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/imagined.mp4"), help="default %(default)s")
    parser.add_argument("--episode", type=int, default=0, help="which of the validation episodes (default 0)")
    parser.add_argument("--sample_steps", type=int, default=8, help="of the flow sampler (default 8)")
    arguments = parser.parse_args()
    from policies.flow_policy import FlowPolicy

    try:
        path = arguments.checkpoint or checkpoint.newest_run("finetune")
        if path is None:
            raise ValueError("no fine-tuned run in runs/. Make one with: python experiments/finetune.py")
        policy = FlowPolicy.load(path, steps=arguments.sample_steps)
        dataset = open_dataset(arguments.data)
        real, predicted, given = imagine(policy, dataset, arguments.episode)
        seconds = policy.layout.future[-1] / dataset.fps
        titles = ("real", f"predicted, {seconds:.1f} s ahead")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}.tmp")
        temporary.write_bytes(encode_video(side_by_side(real, predicted, titles), FPS, crf=23, gop=60))
        os.replace(temporary, arguments.out)
    except (ValueError, OSError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.out}: {len(real)} frames, each predicted {seconds:.1f} s ahead from one frame and the actions")
    print(f"PSNR {psnr(real, predicted):.1f} dB; the given frame shown again: {psnr(real, given):.1f} dB")


if __name__ == "__main__":
    main()
