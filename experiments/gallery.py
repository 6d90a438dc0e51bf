"""One sheet with the first picture of every task, or of every variant of one: `python experiments/gallery.py`

python experiments/gallery.py --out docs/tasks.jpg                        all tasks, visual matching
python experiments/gallery.py --task pick_coke_can --out variants.jpg     the variants of variant aggregation
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from envs.protocol import CAMERAS, VARIANTS
from envs.tasks import TASKS, get_task
from selfflow_robot.config import in_one_line

WIDTH, BAR, COLUMNS = 240, 22, 5  # px, px for the words below, pictures in a row


def first_picture(task: str, seed: int, variant=None) -> tuple[np.ndarray, str]:
    """uint8 (H, W, 3) and the instruction."""
    from envs import make_env

    height = WIDTH * 3 // 4 if get_task(task).robot == "widowx" else WIDTH * 4 // 5
    env = make_env(task, width=WIDTH, height=height)
    observation, _ = env.reset(seed=seed, options={"variant": variant} if variant else None)
    env.close()
    return next(iter(observation["images"].values())), observation["instruction"]


def sheet(pictures: list[np.ndarray], words: list[str]) -> Image.Image:
    """Pictures in rows, each with its words below."""
    height = max(len(picture) for picture in pictures) + BAR
    canvas = Image.new("RGB", (COLUMNS * WIDTH, -(-len(pictures) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for index, (picture, text) in enumerate(zip(pictures, words)):
        x, y = index % COLUMNS * WIDTH, index // COLUMNS * height
        canvas.paste(Image.fromarray(picture), (x, y))
        draw.text((x + 4, y + height - BAR + 3), text, "black", font)
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="show this task's variants (default: all tasks)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("gallery.jpg"))
    arguments = parser.parse_args()
    with in_one_line():
        show(arguments)


def show(arguments: argparse.Namespace) -> None:
    """The sheet that was asked for, written. ValueError for a task that does not exist or has no variants."""
    if arguments.task:
        kind = get_task(arguments.task).kind
        if kind not in VARIANTS:
            raise ValueError(f"nothing was published under variant aggregation for {arguments.task}")
        variants = [*VARIANTS[kind], *(CAMERAS if kind in ("pick", "near") else ())]
        wanted = [(arguments.task, variant, variant.name) for variant in variants]
    else:
        wanted = [(task.short, None, task.short) for task in TASKS]
    pictures = [first_picture(task, arguments.seed, variant)[0] for task, variant, _ in track(wanted, "rendering")]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, [name for *_, name in wanted]).save(arguments.out, quality=85)
    print(arguments.out)


if __name__ == "__main__":
    main()
