"""What a world model expects to see, beside what happened: a video, a still, and a table with intervals.

    python experiments/imagine.py --checkpoint runs/finetune_self_flow --data data/open_and_place
    python experiments/imagine.py --checkpoint runs/finetune_self_flow --live open_and_place --seed 3

The video shows one episode the model never saw: real | predicted from the actions that were executed | from those of
another moment | from none. Every predicted frame comes from one real frame. --live rolls the episode out in the
simulator instead, driven by --policy. The table is over many windows of all held-out episodes (live: of the one), in
each measure beside the given frame shown again, which is what a model that learned nothing gets. docs/world_model.md
says how to read it.
"""

import argparse
import io
import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from envs.workers import progress
from policies import measures
from policies.flow_policy import FlowPolicy
from policies.measures import VARIANTS, Held, held, predictions
from selfflow_robot import checkpoint
from selfflow_robot.config import in_one_line
from selfflow_robot.data import Dataset, Episode, encode_video, open_dataset, statistics
from selfflow_robot.metrics import bootstrap_difference, bootstrap_mean, lpips_missing, plain

SCALE, BAR, FPS = 2, 28, 6
MOMENTS = 4  # of the still
TITLES = {"true": "predicted, true actions", "shuffled": "predicted, shuffled actions", "zero": "predicted, no motion"}
MEASURES = {"psnr": "PSNR, dB", "psnr_moving": "PSNR moving, dB", "ssim": "SSIM", "lpips": "LPIPS (low is good)"}
DIGITS = {"psnr": 2, "psnr_moving": 2, "ssim": 3, "lpips": 3}
WIDTH = 190  # characters of the table where the output is no terminal
FEW = 5  # episodes: intervals over fewer are too narrow


def imagine(policy, dataset: Dataset, number: int = 0, seed: int = 0, split: str = "validation"):
    """Episode `number` of a split -> its windows (`measures.Held`) and what is predicted in them, {variant of the
    actions: uint8 (N, F, H, W, 3)}: under its own, those of half an episode later, and none."""
    episodes = dataset.split(split)
    if not 0 <= number < len(episodes):
        raise ValueError(f"--episode {number}: the {split} split has {len(episodes)}, numbered from 0")
    windows = held(dataset, policy.layout, split=split, episode=episodes[number].start)
    with progress("windows imagined", len(VARIANTS) * len(windows)) as update:
        return windows, predictions(policy, windows, seed, measures.counted(update))


# ------------------------------------------------------------------------------------------------------------- pictures


def side_by_side(videos: list[np.ndarray], titles: list[str]) -> np.ndarray:
    """Videos (K, H, W, 3), titled and doubled in size, in a row -> uint8 (K, BAR + 2 H, 2 W n, 3)."""
    height, width = videos[0].shape[1:3]
    font, pictures = ImageFont.load_default(size=15), []
    for frames in zip(*videos):
        canvas = Image.new("RGB", (SCALE * width * len(videos), SCALE * height + BAR), (40, 40, 40))
        for column, (frame, title) in enumerate(zip(frames, titles)):
            x = SCALE * width * column
            canvas.paste(Image.fromarray(frame).resize((SCALE * width, SCALE * height)), (x, BAR))
            ImageDraw.Draw(canvas).text((x + 6, 5), title, "white", font)
        pictures.append(np.asarray(canvas))
    return np.array(pictures)


def panels(windows: Held, predicted: dict, future: tuple[int, ...], fps: int) -> np.ndarray:
    """The four columns for the nearest offset above those for the furthest -> uint8 (N, height, width, 3)."""
    rows = []
    for index in sorted({0, len(future) - 1}):
        videos = [windows.real[:, index], *(predicted[name][:, index] for name in VARIANTS)]
        rows.append(side_by_side(videos, titles(future[index] / fps)))
    return np.concatenate(rows, 1)


def titles(seconds: float) -> list[str]:
    return [f"real, {seconds:.1f} s ahead", *(TITLES[name] for name in VARIANTS)]


def contact_sheet(windows: Held, predicted: dict, future: tuple[int, ...], fps: int) -> bytes:
    """PNG: MOMENTS of the episode below each other, at the furthest offset, in the four columns."""
    chosen = np.linspace(0, len(windows) - 1, MOMENTS + 2).astype(int)[1:-1]
    videos = [windows.real[chosen, -1], *(predicted[name][chosen, -1] for name in VARIANTS)]
    pictures = side_by_side(videos, titles(future[-1] / fps))
    sheet = np.concatenate([pictures[0], *(picture[BAR:] for picture in pictures[1:])], 0)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "png", optimize=True)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- measures


def measure(policy, windows: Held, seed: int, perceptual: bool, features=None) -> dict:
    """All measures over windows, with intervals over their episodes.

    {"ahead": [{"offset", measure: {variant: Estimate, ...}}], "frechet", "consistency", "inverse_dynamics"}. features:
    the frozen policy that the Frechet distance looks through, by default the one that is measured.
    """
    with progress("windows measured", (len(VARIANTS) + 2) * len(windows)) as update:
        advance = measures.counted(update)
        predicted = predictions(policy, windows, seed, advance)
        own = measures.consistencies(policy, windows, seed, advance)  # (N, 2)
        explained = measures.sampled_actions(policy, windows, "inverse_dynamics", 0, seed, advance)
    predicted["given"] = windows.repeated
    scores = {name: measures.frame_scores(windows, frames, perceptual) for name, frames in predicted.items()}
    ahead, episode = [], windows.episode
    for index, offset in enumerate(policy.layout.future):
        row: dict = {"offset": offset}
        for name in scores["true"]:
            columns = {variant: scores[variant][name][:, index] for variant in scores}
            row[name] = {variant: bootstrap_mean(values, episode) for variant, values in columns.items()}
            for other in ("shuffled", "zero", "given"):
                row[name][f"true - {other}"] = bootstrap_difference(columns["true"], columns[other], episode)
        ahead.append(row)

    network = features or policy
    seen = {
        name: measures.clip_features(network, np.concatenate([windows.given, frames], 1))
        for name, frames in ({"real": windows.real} | predicted).items()
    }
    frechet = {name: measures.clip_distance(seen["real"], seen[name], episode) for name in predicted}
    errors = measures.chunk_errors(explained, windows.batch["executed"])
    return {
        "ahead": ahead,
        "frechet": frechet,
        "consistency": {unit: bootstrap_mean(own[:, i], episode) for i, unit in enumerate(("mm", "degrees"))},
        "inverse_dynamics": {unit: bootstrap_mean(errors[unit], episode) for unit in ("mm", "degrees")},
    }


def print_measures(found: dict, windows, fps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    episodes, count = len(set(windows.episode.tolist())), len(windows)
    columns = {"true": "true actions", "shuffled": "shuffled", "zero": "no motion", "given": "given frame again"}
    columns |= {"true - shuffled": "true - shuffled", "true - zero": "true - no motion"}
    table = Table(
        title=f"World model over {count} held-out windows of {episodes} episodes, 95 % intervals over episodes"
    )
    for name in ("ahead", "measure", *columns.values()):
        table.add_column(name, no_wrap=True)
    for row in found["ahead"]:
        for name in (name for name in MEASURES if name in row):
            cells = [row[name][column].text(DIGITS[name]) for column in columns]
            table.add_row(f"{row['offset'] / fps:.1f} s", MEASURES[name], *cells)
        table.add_section()
    cells = [found["frechet"][name].text(2) if name in found["frechet"] else "" for name in columns]
    table.add_row("all", "Frechet (low is good)", *cells)
    Console(width=None if Console().is_terminal else WIDTH).print(table)

    def sentence(name: str) -> str:
        return f"{found[name]['mm'].text(1)} mm, {found[name]['degrees'].text(1)} degrees per control step"

    print(f"Self-consistency of joint plans: {sentence('consistency')}")
    print(f"Inverse dynamics on real frames: {sentence('inverse_dynamics')}")
    if episodes < FEW:
        print(f"Only {episodes} episodes: intervals over them are too narrow, or absent. More data helps.")


# ----------------------------------------------------------------------------------------------------------------- live


def live_episode(task: str, seed: int, driver: str, layout) -> Dataset:
    """An episode of the simulator, driven by expert, hold (no motion) or a fine-tuned run, as a data set of one."""
    from envs import make_env
    from envs.expert import make_expert
    from envs.rollout import Demonstrator, HoldStill, expert_rng, rollout

    if driver not in ("expert", "hold"):
        from policies import load_policy

        policy = load_policy(driver)
    env = make_env(task, width=layout.width, height=layout.height)
    try:
        if driver == "expert":
            expert = make_expert(env, rng=expert_rng(seed))
            policy = Demonstrator(expert, np.random.default_rng([seed, 1]))
        elif driver == "hold":
            policy = HoldStill()
        return as_dataset(rollout(env, policy, seed), layout)
    finally:
        env.close()


def as_dataset(episode, layout) -> Dataset:
    """One `rollout.Episode` as a data set in memory. Its pictures were never compressed, unlike those on disk."""
    texts = tuple(dict.fromkeys(episode.instructions))
    arrays = {"proprio": episode.proprio, "action": episode.action, "executed": episode.executed}
    return Dataset(
        root=Path("live"),
        frames=episode.frames,
        **arrays,
        task=np.array([texts.index(text) for text in episode.instructions]),
        instructions=texts,
        episodes=(Episode(0, episode.steps, episode.seed, episode.success_final),),
        stats={name: statistics(value) for name, value in arrays.items()},
        view=layout.view,
        fps=layout.fps,
        hash=f"live seed {episode.seed}",
    )


# --------------------------------------------------------------------------------------------------------------- script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or folder (default: the newest fine-tuned run, or the one shipped)")
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="default %(default)s")
    parser.add_argument("--live", metavar="TASK", help="an episode of the simulator instead of --data")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the live episode (default 0)")
    parser.add_argument("--policy", default="expert", help="live: expert, hold or a fine-tuned run (default expert)")
    parser.add_argument("--out", type=Path, default=Path("runs/imagined.mp4"), help="default %(default)s; a .png too")
    parser.add_argument("--json", type=Path, help="the table's numbers (default: --out with .json)")
    parser.add_argument("--episode", type=int, default=0, help="which of the validation episodes to show (default 0)")
    parser.add_argument("--windows", type=int, default=128, help="of the table (default 128; 0: no table)")
    parser.add_argument("--sample_steps", type=int, default=8, help="of the flow sampler (default 8)")
    parser.add_argument("--features", metavar="RUN", help="whose features the Frechet distance uses (default: its own)")
    arguments = parser.parse_args()
    with in_one_line():
        run(arguments)


def run(arguments) -> None:
    path = checkpoint.chosen(arguments.checkpoint)
    if arguments.windows < 0 or arguments.windows == 1:
        raise ValueError(f"--windows {arguments.windows}: two or more, or 0 for no table")
    out, results = arguments.out, arguments.json or arguments.out.with_suffix(".json")
    policy = FlowPolicy.load(path, steps=arguments.sample_steps)
    network = FlowPolicy.load(arguments.features) if arguments.features else None
    layout = policy.layout
    if not layout.future:
        raise ValueError(f"{path} predicts no frames: fine-tune with --future")
    if arguments.live:
        print(f"Rolling out {arguments.live}, seed {arguments.seed}, {arguments.policy}", flush=True)
        dataset, split = live_episode(arguments.live, arguments.seed, arguments.policy, layout), "all"
    else:
        dataset, split = open_dataset(arguments.data), "validation"

    shown, predicted = imagine(policy, dataset, arguments.episode, arguments.seed, split)
    frames = panels(shown, predicted, layout.future, dataset.fps)
    checkpoint.write_atomic(out, encode_video(frames, FPS, crf=23, gop=60))
    checkpoint.write_atomic(out.with_suffix(".png"), contact_sheet(shown, predicted, layout.future, dataset.fps))
    print(
        f"{out}: {len(frames)} frames, {layout.future[-1] / dataset.fps:.1f} s ahead at most; {out.with_suffix('.png')}"
    )
    if not arguments.windows:
        return

    windows = held(dataset, layout, arguments.windows, split)
    reason = lpips_missing()
    found = measure(policy, windows, arguments.seed, reason is None, network)
    report = {
        "checkpoint": str(path),
        "checkpoint_hash": policy.manifest.get("sha256"),
        "step": policy.manifest.get("step"),
        "data": {"hash": dataset.hash, "root": str(dataset.root), "split": split},
        "live": arguments.live and {"task": arguments.live, "seed": arguments.seed, "policy": arguments.policy},
        "windows": len(windows),
        "episodes": len(set(windows.episode.tolist())),
        "sample_steps": arguments.sample_steps,
        "seed": arguments.seed,
        "fps": dataset.fps,
        "features": arguments.features or str(path),
        "lpips_missing": reason,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **found,
    }
    checkpoint.write_atomic(results, json.dumps(plain(report), indent=1).encode())
    print_measures(found, windows, dataset.fps)
    if reason:
        print(f"LPIPS left out: {reason}")
    print(results)


if __name__ == "__main__":
    main()
