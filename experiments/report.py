"""One offline page about a comparison: success of the arms, training curves, rollouts, predicted video.

    python experiments/report.py --arms runs/eval_self_flow runs/eval_flow_matching \\
        --training runs/pretrain_self_flow runs/finetune_self_flow --imagined runs/imagined.mp4 --out runs/report.html

Arms are evaluation folders (results.json), compared on the seeds they share; training folders bring metrics.jsonl. The
page holds its pictures and videos, so it can be mailed or opened without a network.
"""

import argparse
import base64
import io
import json
import sys
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from selfflow_robot.checkpoint import write_atomic
from selfflow_robot.metrics import paired_comparison, wilson_interval

OUTCOMES = ("success_final", "success_any")
SMOOTH = 20  # steps averaged in the training curves
CURVES = (
    "loss_video",
    "loss_action",
    "cosine",
    "validation/loss_video",
    "validation/loss_action",
    "validation/action_mm",
)
COLOURS = ("#2f6fde", "#e08a1e", "#3c9a5f", "#9a4fb8")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse } td, th { padding: .35rem .8rem; text-align: left;
border-bottom: 1px solid var(--line); white-space: nowrap } .grid { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)) } video, svg { width: 100%; height: auto;
border-radius: .4rem } .plot { background: #fff; border-radius: .4rem; padding: .3rem } code, pre { background:
var(--soft); border-radius: .3rem; padding: .1rem .3rem } pre { padding: .7rem; overflow-x: auto } figure { margin: 0 }
figcaption, .note { font-size: .9rem; opacity: .8 }
"""


def read_results(folder: Path) -> dict:
    """results.json of an evaluation; ValueError naming the file where it is absent or damaged."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
        results["protocol_hash"], results["success_rule"], results["protocol"]["seeds"]
        for episode in results["episodes"]:
            episode["seed"], episode["subgoals"], [episode[o] for o in OUTCOMES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of experiments/eval_simpler.py ({error!r})") from error
    if not results["episodes"]:
        raise ValueError(f"{path} has no finished episode: run its evaluation again to continue it")
    return results


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); the training run it belongs to rewrites it") from error


def outcomes(results: dict) -> dict[str, dict[int, bool]]:
    """{outcome or subgoal: {seed: bool}}."""
    episodes = results["episodes"]
    table = {name: {e["seed"]: bool(e[name]) for e in episodes} for name in OUTCOMES}
    for name in episodes[0]["subgoals"]:
        table[name] = {e["seed"]: bool(e["subgoals"][name]) for e in episodes}
    return table


def rate(values) -> str:
    values = list(values)
    k, n = sum(values), len(values)
    low, high = wilson_interval(k, n)
    return f"{k}/{n} = {k / n:.0%} [{low:.0%}, {high:.0%}]"


def success_table(arms: dict[str, dict]) -> str:
    """Counts with Wilson intervals, and for two arms the paired difference on the seeds they share."""
    tables = {name: outcomes(results) for name, results in arms.items()}
    rows = []
    for outcome in next(iter(tables.values())):
        cells = [escape(outcome.replace("_", " "))] + [rate(t[outcome].values()) for t in tables.values()]
        if len(tables) == 2:
            first, second = (t[outcome] for t in tables.values())
            shared = sorted(first.keys() & second.keys())
            if shared:
                pair = paired_comparison([first[s] for s in shared], [second[s] for s in shared])
                low, high = pair.interval
                cells.append(
                    f"{pair.difference:+.0%} [{low:+.0%}, {high:+.0%}], p = {pair.p_value:.2f} "
                    f"({pair.only_first} / {pair.only_second} of {pair.trials} seeds differ)"
                )
            else:
                cells.append("no seed in common")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = ["", *map(escape, tables)] + (["difference, paired; McNemar"] if len(tables) == 2 else [])
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def success_chart(arms: dict[str, dict]) -> str:
    tables = {name: outcomes(results) for name, results in arms.items()}
    names = list(next(iter(tables.values())))
    figure, axis = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(tables)
    for i, (label, table) in enumerate(tables.items()):
        for j, name in enumerate(names):
            k, n = sum(table[name].values()), len(table[name])
            low, high = wilson_interval(k, n)
            x = j + (i - (len(tables) - 1) / 2) * width
            axis.bar(x, k / n, width * 0.9, color=COLOURS[i % 4], label=label if j == 0 else None)
            axis.errorbar(x, k / n, [[k / n - low], [high - k / n]], color="#333", capsize=4)
    axis.set(ylim=(0, 1.02), ylabel="rate, 95% Wilson interval")
    axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.legend()
    return svg(figure)


def training_curves(runs: dict[str, list[dict]]) -> str:
    present = [
        c for c in CURVES if any(key.split("/policy")[0] == c for m in runs.values() for row in m for key in row)
    ]
    if not present:
        return '<p class="note">These runs logged none of the known curves.</p>'
    columns = min(3, len(present))
    rows = -(-len(present) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(present) :]:
        axis.axis("off")
    for axis, curve in zip(axes.flat, present):
        for i, (label, metrics) in enumerate(runs.items()):
            key = next((k for row in metrics for k in row if k in (curve, f"{curve}/policy")), None)
            points = [(row["step"], row[key]) for row in metrics if key in row] if key else []
            if points:
                steps, values = np.array(points).T
                window = min(SMOOTH, len(values)) if not curve.startswith("validation") else 1
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                marker = "o" if window == 1 else ""
                axis.plot(steps[window - 1 :], smooth, color=COLOURS[i % 4], label=label, marker=marker)
        axis.set_title(curve.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    return svg(figure)


def svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return f'<div class="plot">{text[text.index("<svg") :]}</div>'


def video(path: Path, caption: str) -> str:
    """The video itself, in the page; a note where it is missing."""
    if path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        inner = f'<video controls muted loop playsinline preload="metadata" src="data:video/mp4;base64,{data}"></video>'
    else:
        inner = f'<p class="note">{escape(str(path))} is missing</p>'
    return f"<figure>{inner}<figcaption>{escape(caption)}</figcaption></figure>"


def rollouts(folders: dict[str, Path], arms: dict[str, dict], count: int) -> str:
    """The same seeds for every arm; seeds with a success first, so that both outcomes are seen."""
    episodes = {name: {e["seed"]: e for e in results["episodes"]} for name, results in arms.items()}
    shared = set.intersection(*(set(e) for e in episodes.values()))
    won = {seed: sum(e[seed]["success_final"] for e in episodes.values()) for seed in shared}
    order = sorted(shared, key=lambda seed: (-won[seed], seed))
    chosen = (
        sorted({*order[: -(-count // 2)], *order[len(order) - count // 2 :]}) if len(order) > count else sorted(order)
    )
    figures = []
    for seed in chosen:
        for name, folder in folders.items():
            episode = episodes[name][seed]
            done = [goal.replace("_", " ") for goal, value in episode["subgoals"].items() if value]
            result = (
                "success" if episode["success_final"] else f"no success ({', '.join(done) or 'no subgoal reached'})"
            )
            path = folder / (episode.get("video") or "video not recorded")
            figures.append(video(path, f"{name}, seed {seed}: {result}"))
    return f'<div class="grid">{"".join(figures)}</div>'


def report(arm_folders: list[Path], training: list[Path], imagined: list[Path], out: Path, count: int = 6) -> Path:
    """Writes the page atomically and returns its path. Raises ValueError naming the file that cannot be read."""
    arms = {folder.name: read_results(folder) for folder in arm_folders}
    folders = {folder.name: folder for folder in arm_folders}
    first = next(iter(arms.values()))
    hashes = {results["protocol_hash"] for results in arms.values()}
    parts = [f"<h1>{escape(first['task'].replace('_', ' '))}: {escape(' against '.join(arms))}</h1>"]
    if len(hashes) > 1:
        parts.append("<p><strong>These arms were measured under different protocols; do not compare them.</strong></p>")
    parts += [success_table(arms), success_chart(arms)]
    protocol = first["protocol"]
    parts.append(
        f'<p class="note">{escape(first["success_rule"])}. Success: {escape(str(protocol.get("success")))}. '
        f"Protocol <code>{escape(', '.join(sorted(hashes)))}</code>: {escape(str(protocol.get('benchmark')))}, seeds "
        f"{escape(json.dumps(protocol['seeds']))}. Rates with 95% Wilson intervals.</p>"
    )
    parts.append("<h2>Training</h2>")
    runs = {folder.name: read_metrics(folder) for folder in training}
    stages = {
        "Pretraining": {n: m for n, m in runs.items() if "pretrain" in n},
        "Fine-tuning": {n: m for n, m in runs.items() if "pretrain" not in n},
    }
    for title, group in stages.items():
        if group:
            parts += [f"<h3>{title}</h3>", training_curves(group)]
    if not runs:
        parts.append('<p class="note">No training run was named (--training).</p>')
    parts += ["<h2>Rollouts on the same seeds</h2>", rollouts(folders, arms, count)]
    parts.append("<h2>Predicted against real video</h2>")
    note = '<p class="note">None was named (--imagined); experiments/imagine.py makes one.</p>'
    movies = "".join(video(path, path.stem.replace("_", " ")) for path in imagined)
    parts.append(f'<div class="grid">{movies}</div>' if imagined else note)
    commands = [str(results.get("command", "")) for results in arms.values()]
    parts += ["<h2>Commands</h2>", f"<pre>{escape(chr(10).join(commands))}</pre>"]
    title = f"{escape(first['task'])}: {escape(', '.join(arms))}"
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>{''.join(parts)}</html>"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", type=Path, required=True, help="evaluation folders, one per arm")
    parser.add_argument("--training", nargs="*", type=Path, default=[], help="training runs, for their curves")
    parser.add_argument("--imagined", nargs="*", type=Path, default=[], help="videos of experiments/imagine.py")
    parser.add_argument("--out", type=Path, default=Path("runs/report.html"))
    parser.add_argument("--videos", type=int, default=6, help="seeds shown, each in every arm (default 6)")
    arguments = parser.parse_args()
    try:
        out = report(arguments.arms, arguments.training, arguments.imagined, arguments.out, arguments.videos)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out.resolve()} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
