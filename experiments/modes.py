"""What checkpoints can do in each of their modes, on the same held-out windows with the same noise: one table.

    python experiments/modes.py --runs runs/finetune_self_flow
    python experiments/modes.py --runs runs/corners runs/shared --data data/open_and_place

Differences are the first run's less the second's, window by window, with intervals over whole episodes. That is the
ablation of how modes are trained: `finetune.py --name corners` draws the corners it will be asked for, `finetune.py
--corners false --name shared` generates frames and actions together at one noise level, as in the paper. Writes the
table as JSON and PNG. docs/world_model.md says how to read it.
"""

import argparse
import io
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from envs.workers import progress
from policies import measures
from policies.flow_policy import FlowPolicy
from policies.measures import Held, held
from selfflow_robot import checkpoint, metrics
from selfflow_robot.config import in_one_line
from selfflow_robot.data import open_dataset
from selfflow_robot.metrics import bootstrap_difference, bootstrap_mean, plain

PASSES = 7  # over all windows, per run: the modes, one with part of the chunk given and one with wrong actions
PANELS = 5  # of the figure, in a row
WIDTH = 190  # characters of the table where the output is no terminal
FEW = 5  # episodes: intervals over fewer are too narrow
COLOURS = ("#2f7ed8", "#e0761a", "#2e9e62", "#a05cc9", "#c0392b", "#7f8c8d")


class Measure(NamedTuple):
    mode: str
    what: str
    unit: str
    high_is_good: bool = False

    @property
    def digits(self) -> int:
        return 1 if self.unit == "mm" else 2


ACTIONS = (("mm", "mm"), ("degrees", "degrees"), ("gripper", "opening"))  # of `metrics.action_errors`, their units
ACTING = ("policy", "joint_plan", "half_committed", "inverse_dynamics")
MEASURES = {f"{mode}_{name}": Measure(mode, "action error", unit) for mode in ACTING for name, unit in ACTIONS} | {
    "world_model_psnr": Measure("world_model", "PSNR", "dB", True),
    "world_model_psnr_moving": Measure("world_model", "PSNR moving", "dB", True),
    "world_model_gap": Measure("world_model", "PSNR moving, true - shuffled actions", "dB", True),
    "video_prediction_psnr": Measure("video_prediction", "PSNR", "dB", True),
    "video_prediction_psnr_moving": Measure("video_prediction", "PSNR moving", "dB", True),
}


def rows(policy: FlowPolicy, windows: Held, seed: int = 0, advance=lambda count: None) -> dict[str, np.ndarray]:
    """{measure: float64 (N,)}: one number per window, NaN where there is nothing to judge."""
    batch, half = windows.batch, policy.layout.horizon // 2
    found: dict[str, np.ndarray] = {}

    def acting(name: str, mode: str, true: str, counted=None, committed: int = 0) -> None:
        actions = measures.sampled_actions(policy, windows, mode, committed, seed, advance)
        found.update(named(name, actions, batch[true], counted, committed))

    expected = batch["action_mask"]  # not what follows a change of instruction
    acting("policy", "policy", "action", expected)
    acting("joint_plan", "joint_plan", "action", expected)
    acting("half_committed", "policy", "action", expected, half)
    acting("inverse_dynamics", "inverse_dynamics", "executed")

    variants = measures.predictions(policy, windows, seed, advance, ("true", "shuffled"))
    true, shuffled = (video_scores(windows, variants[name]) for name in ("true", "shuffled"))
    found |= {f"world_model_{name}": values for name, values in true.items()}
    found["world_model_gap"] = true["psnr_moving"] - shuffled["psnr_moving"]
    scores = video_scores(windows, measures.predicted_video(policy, windows, seed, advance))
    return found | {f"video_prediction_{name}": values for name, values in scores.items()}


def nothing_learned(windows: Held, committed: int) -> dict[str, np.ndarray]:
    """The same of no motion, the gripper as it is, and of the given frame shown again."""
    executed, expected, found = windows.batch["executed"], windows.batch["action_mask"], {}
    still = torch.zeros_like(executed)
    still[..., -1] = windows.batch["proprio"][:, -1:]
    actions = still.numpy()
    for name, first in (("policy", 0), ("joint_plan", 0), ("half_committed", committed)):
        found |= named(name, actions, windows.batch["action"], expected, first)
    found |= named("inverse_dynamics", actions, executed)
    scores = video_scores(windows, windows.repeated)
    found |= {f"{mode}_{name}": scores[name] for mode in ("world_model", "video_prediction") for name in scores}
    return found | {"world_model_gap": np.zeros(len(windows))}


def named(name: str, actions: np.ndarray, true, counted=None, first: int = 0) -> dict[str, np.ndarray]:
    """Errors of chunks (N, H, 7) from step `first` on, as measures of a mode."""
    counted = None if counted is None else counted[:, first:]
    errors = measures.chunk_errors(actions[:, first:], true[:, first:], counted)
    return {f"{name}_{unit}": values for unit, values in errors.items()}


def video_scores(windows: Held, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Frames (N, F, H, W, 3) -> {"psnr", "psnr_moving"}: (N,), mean over the frames where something is to be judged."""
    changed = metrics.moving(windows.given, windows.real)
    scores = {
        "psnr": metrics.frame_psnr(windows.real, predicted),
        "psnr_moving": metrics.frame_psnr(windows.real, predicted, changed),
    }
    there = {name: ~np.isnan(values) for name, values in scores.items()}
    sums = {name: np.nan_to_num(values).sum(1) for name, values in scores.items()}
    return {
        name: np.where(there[name].any(1), sums[name] / np.maximum(there[name].sum(1), 1), np.nan) for name in scores
    }


def compare(policies: dict[str, FlowPolicy], windows: Held, seed: int = 0) -> dict[str, dict]:
    """{measure: {"nothing learned", each run, and with two or more "difference": Estimate}}."""
    with progress("windows", PASSES * len(policies) * len(windows)) as update:
        advance = measures.counted(update)
        found = {name: rows(policy, windows, seed, advance) for name, policy in policies.items()}
    (half,) = {policy.layout.horizon // 2 for policy in policies.values()}
    idle, episode, table = nothing_learned(windows, half), windows.episode, {}
    for measure in MEASURES:
        table[measure] = {"nothing learned": bootstrap_mean(idle[measure], episode)}
        table[measure] |= {name: bootstrap_mean(values[measure], episode) for name, values in found.items()}
        if len(found) > 1:
            first, second = (values[measure] for values in list(found.values())[:2])
            table[measure]["difference"] = bootstrap_difference(first, second, episode)
    return table


def print_table(table: dict[str, dict], windows: Held) -> None:
    """A difference is in bold where its interval excludes zero."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    episodes = len(set(windows.episode.tolist()))
    columns = list(next(iter(table.values())))
    shown = Table(title=f"{len(windows)} held-out windows of {episodes} episodes, 95 % intervals over episodes")
    for name in ("mode", "measure", *columns):
        shown.add_column("first - second" if name == "difference" else name, no_wrap=True)
    modes = [measure.mode for measure in MEASURES.values()]
    for number, (name, estimates) in enumerate(table.items()):
        measure = MEASURES[name]
        cells = [Text(estimates[column].text(measure.digits)) for column in columns]
        if "difference" in estimates and (estimates["difference"].low > 0 or estimates["difference"].high < 0):
            cells[-1].stylize("bold")
        mode = measure.mode.replace("_", " ") if number == 0 or modes[number - 1] != measure.mode else ""
        last = number + 1 == len(modes) or modes[number + 1] != measure.mode
        shown.add_row(mode, f"{measure.what}, {measure.unit}", *cells, end_section=last)
    Console(width=None if Console().is_terminal else WIDTH).print(shown)
    if episodes < FEW:
        print(f"Only {episodes} episodes: intervals over them are too narrow, or absent. More data helps.")


def plot(table: dict[str, dict], names: list[str]) -> bytes:
    """PNG: a panel per measure, a point with its interval per run, a grey line for what learned nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [name for name in table if not name.endswith(("_degrees", "_gripper"))]
    figure, axes = pyplot.subplots(2, PANELS, figsize=(2.2 * PANELS, 5.6))
    acting = [name for name in panels if name.endswith("_mm")]
    for row, names_here in zip(axes, (acting, [name for name in panels if name not in acting])):
        for axis in row[len(names_here) :]:
            axis.set_axis_off()
        for axis, name in zip(row, names_here):
            measure = MEASURES[name]
            for column, run in enumerate(names):
                value, low, high = table[name][run]
                around = [[value - low], [high - value]] if np.isfinite(low) else None
                axis.errorbar(column, value, around, fmt="o", capsize=4, color=COLOURS[column % len(COLOURS)])
            axis.axhline(table[name]["nothing learned"].value, color="#888888", linestyle="--", label="nothing learned")
            what = "true - shuffled actions" if name == "world_model_gap" else measure.what
            axis.set_title(f"{measure.mode.replace('_', ' ')}\n{what}", fontsize=9)
            axis.set_ylabel(f"{measure.unit}, {'high' if measure.high_is_good else 'low'} is good", fontsize=8)
            axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
            axis.tick_params(axis="y", labelsize=8)
            axis.margins(x=0.5)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()


def load(paths: list[str], steps: int, temperature: float = 1.0) -> dict[str, FlowPolicy]:
    """{name: policy}; ValueError unless all predict the same frames and actions from the same past."""
    policies = {Path(path).name: FlowPolicy.load(path, steps=steps, temperature=temperature) for path in paths}
    if len(policies) < len(paths):
        raise ValueError(f"runs of the same name: {', '.join(paths)}")
    layouts = {name: policy.layout for name, policy in policies.items()}
    first, *others = layouts
    for other in others:
        for field in ("past", "future", "horizon", "height", "width", "view"):
            here, there = getattr(layouts[first], field), getattr(layouts[other], field)
            if here != there:
                raise ValueError(
                    f"{first} has {field} {here}, {other} {there}: they cannot be compared window by window"
                )
    if not layouts[first].future:
        raise ValueError(f"{first} predicts no frames: fine-tune with --future")
    return policies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="fine-tuned runs or folders (default: the newest or shipped one)")
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="default %(default)s")
    parser.add_argument("--windows", type=int, default=128, help="of the validation episodes (default 128)")
    parser.add_argument("--sample_steps", type=int, default=8, help="of the flow sampler (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of planned actions' noise (default 1)")
    parser.add_argument("--json", type=Path, default=Path("runs/modes.json"), help="default %(default)s; a .png too")
    arguments = parser.parse_args()
    with in_one_line():
        run(arguments)


def run(arguments) -> None:
    paths = arguments.runs or [checkpoint.chosen(None)]
    if arguments.windows < 2:
        raise ValueError(f"--windows {arguments.windows}: two or more")
    policies = load([str(path) for path in paths], arguments.sample_steps, arguments.temperature)
    dataset = open_dataset(arguments.data)
    windows = held(dataset, next(iter(policies.values())).layout, arguments.windows)
    table = compare(policies, windows, arguments.seed)
    report = {
        "runs": {
            name: {
                "path": str(path),
                "step": policy.manifest.get("step"),
                "sha256": policy.manifest.get("sha256"),
                "modes": policy.manifest.get("identity", {}).get("modes"),
                "corners": policy.manifest.get("identity", {}).get("corners"),
            }
            for path, (name, policy) in zip(paths, policies.items())
        },
        "data": {"hash": dataset.hash, "root": str(dataset.root), "split": "validation"},
        "windows": len(windows),
        "episodes": len(set(windows.episode.tolist())),
        "sample_steps": arguments.sample_steps,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "units": {name: measure.unit for name, measure in MEASURES.items()},
        "measures": table,
    }
    checkpoint.write_atomic(arguments.json, json.dumps(plain(report), indent=1).encode())
    checkpoint.write_atomic(arguments.json.with_suffix(".png"), plot(table, list(policies)))
    print_table(table, windows)
    print(f"{arguments.json} and {arguments.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
