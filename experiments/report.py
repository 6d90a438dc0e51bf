"""One offline HTML page from run folders: success with intervals, training curves, rollouts, imagined against real.

    python experiments/report.py --arms runs/eval_self_flow runs/eval_flow_matching \\
        --training runs/finetune_self_flow runs/finetune_flow_matching --imagined runs/imagined.mp4

The page loads nothing: styles, charts and videos are inside. What is missing is said on the page; what is damaged stops
with the name of the file.
"""

import argparse
import base64
import io
import json
import shlex
import sys
from dataclasses import dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template

from envs.workers import write_text
from selfflow_robot.metrics import paired_comparison, wilson_interval

COLOURS = ("#2f7ed8", "#e0761a", "#2e9e62", "#a05cc9")  # one per arm or run, readable on light and dark
GREY = "#888888"
LINES = {"-": "solid", "--": "dashed", ":": "dotted"}
RATES = {"success_final": "success at the last step", "success_any": "success at any step"}


@dataclass
class ReportConfig:
    out: str = "runs/report.html"
    arms: list[str] = field(
        default_factory=list
    )  # run folders with results.json; the first is compared with the others
    training: list[str] = field(default_factory=list)  # run folders with metrics.jsonl
    imagined: list[str] = field(default_factory=list)  # videos: predicted beside real
    examples: int = 6  # seeds shown as videos


class ReportError(RuntimeError):
    """An input that cannot be read; the message names it."""


@dataclass
class Arm:
    folder: Path
    results: dict
    episodes: dict[int, dict]  # by seed

    @property
    def name(self) -> str:
        return self.folder.name

    def outcomes(self, key: str) -> dict[int, bool]:
        """{seed: outcome} of a rate or a subgoal, where it was recorded."""
        merged = {seed: episode.get("subgoals", {}) | episode for seed, episode in self.episodes.items()}
        return {seed: bool(values[key]) for seed, values in merged.items() if values.get(key) is not None}


def report(cfg: ReportConfig) -> Path:
    """Write the page and return its path. Raises ReportError for a damaged input."""
    arms = [arm for folder in cfg.arms if (arm := read_arm(Path(folder)))]
    names = [Path(f).name for f in cfg.training]
    names = {f: f if names.count(Path(f).name) > 1 else Path(f).name for f in cfg.training}
    runs = {names[f]: curves for f in cfg.training if (curves := read_curves(Path(f) / "metrics.jsonl"))}
    missing = [f for f in cfg.arms if not (Path(f) / "results.json").exists()]
    missing += [f for f in cfg.training if names[f] not in runs]
    task = arms[0].results.get("task", "unknown task") if arms else "no evaluation"
    page = PAGE.substitute(
        title=escape(f"selfflow_robot: {task}"),
        notes="".join(note(f"{folder}: no results there (yet), left out.") for folder in missing),
        success=success_section(arms),
        training=training_section(runs),
        rollouts=rollout_section(arms, cfg.examples),
        imagined=imagined_section([Path(path) for path in cfg.imagined]),
        reproduce=reproduce_section(arms, cfg),
    )
    out = Path(cfg.out)
    write_text(out, page)
    return out


# ----------------------------------------------------------------------------------------------------------- inputs


def read_arm(folder: Path) -> Arm | None:
    """The evaluation in a run folder; None where there is none yet."""
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        episodes = {int(episode["seed"]): episode for episode in results["episodes"]}
        for episode in episodes.values():
            _ = [bool(episode[key]) for key in RATES]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is damaged ({error!r}). Delete it and run eval_simpler.py again.") from error
    return Arm(folder, results, dict(sorted(episodes.items())))


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """{key: {step: value}}; a step logged twice (a resumed run) counts as logged last. Empty where there is no file."""
    curves: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # cut off while being written: the run was killed or is still going
                break
            raise ReportError(f"{path}, line {number}, is damaged ({error!r}). Delete the line.") from error
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                curves.setdefault(key, {})[step] = float(value)
    return curves


# --------------------------------------------------------------------------------------------------------- sections


def success_section(arms: list[Arm]) -> str:
    arms = [arm for arm in arms if arm.episodes]
    if not arms:
        return note("No evaluation yet. Run experiments/eval_simpler.py and name its run folders with --arms.")
    keys = list(RATES) + sorted({key for arm in arms for e in arm.episodes.values() for key in e.get("subgoals", {})})
    head = ["", *(escape(arm.name) for arm in arms)]
    for other in arms[1:]:
        head.append("difference" if len(arms) == 2 else f"{escape(arms[0].name)} − {escape(other.name)}")
    rows = []
    for key in keys:
        cells = [escape(label(key)), *(rate_cell(arm.outcomes(key)) for arm in arms)]
        cells += [difference_cell(arms[0].outcomes(key), other.outcomes(key)) for other in arms[1:]]
        rows.append(cells)
    facts = [
        [
            f'<span class="key" style="background:{colour(i)}"></span>{escape(arm.name)}',
            escape(str(arm.results.get("checkpoint") or arm.results.get("policy", "?"))),
            escape(str(arm.results.get("success_rule", "?"))),
            f"{len(arm.episodes)} ({min(arm.episodes)} to {max(arm.episodes)}){few_starts(arm)}",
            f"<code>{escape(str(arm.results.get('protocol_hash', '?'))[:12])}</code>",
        ]
        for i, arm in enumerate(arms)
    ]
    protocol = json.dumps(arms[0].results.get("protocol", {}), indent=2, ensure_ascii=False)
    warning = ""
    if len({str(arm.results.get("protocol_hash")) for arm in arms}) > 1:
        warning = note("The arms were evaluated under different protocols: their rates cannot be compared.")
    return (
        warning
        + table(head, rows)
        + "<p class='small'>Rates: successes / episodes, 95% Wilson interval. Differences, first arm minus other, in "
        "percentage points on the seeds of both: 95% interval by Newcombe's method 10, p-value of the exact two-sided "
        "McNemar test. All count episodes; where several begin alike, colours aside, a policy mostly repeats what it "
        "does, and as a sample of starts they are too narrow: see the number of different starts below.</p>"
        + bars(arms, keys)
        + table(["arm", "checkpoint", "success rule", "episodes (seeds)", "protocol"], facts)
        + f"<details><summary>protocol of {escape(arms[0].name)}</summary><pre>{escape(protocol)}</pre></details>"
    )


def few_starts(arm: Arm) -> str:
    """How many of its episodes begin differently, where some repeat each other but for colours."""
    starts = arm.results.get("starts")
    return f", from {starts} different starts" if starts and starts < len(arm.episodes) else ""


def training_section(runs: dict[str, dict[str, dict[int, float]]]) -> str:
    if not runs:
        return note("No training curves. Name run folders that hold a metrics.jsonl with --training.")
    pyplot = load_pyplot()
    # loss/video and heldout/video share a panel: the part after the slash
    panels: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for curves in runs.values() for key in curves):
        panels.setdefault(key.split("/")[-1], []).append(key)
    most = len(LINES)  # keys of a panel: as many as there are styles, the next ones go into another
    cut = [(name, every[i : i + most]) for name, every in panels.items() for i in range(0, len(every), most)]
    charts = []
    for panel, keys in cut:
        figure, axis = pyplot.subplots(figsize=(3.6, 2.6))
        for i, curves in enumerate(runs.values()):
            for style, key in zip(LINES, keys):
                if points := sorted(curves.get(key, {}).items()):
                    axis.plot(*zip(*points), style, color=colour(i), linewidth=1.3)
        names = [f"{key} ({style})" for style, key in zip(LINES.values(), keys)] if len(keys) > 1 else keys
        axis.set_title("\n".join(names), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        charts.append(draw(figure, f"training curves: {panel}"))
    legend = "".join(
        f'<span><span class="key" style="background:{colour(i)}"></span>{escape(name)}</span>'
        for i, name in enumerate(runs)
    )
    return f'<p class="legend">{legend}</p><div class="panels">{"".join(charts)}</div>'


def rollout_section(arms: list[Arm], count: int) -> str:
    arms = [arm for arm in arms if arm.episodes]
    seeds = [seed for seed in common_seeds(arms) if all(video_path(arm, seed) for arm in arms)]
    if not seeds:
        return note("No seed has a video in every arm.")
    rows = []
    for seed in choose_examples(arms, seeds, count):
        figures = []
        for arm in arms:
            outcome = "success" if arm.episodes[seed]["success_final"] else "no success"
            steps = arm.episodes[seed].get("steps", "?")
            caption = f"{escape(arm.name)}, seed {seed}: <b>{outcome}</b>, {escape(str(steps))} steps"
            figures.append(video(video_path(arm, seed), caption))
        rows.append(f'<div class="pair">{"".join(figures)}</div>')
    note_text = f"{len(rows)} of {len(seeds)} common seeds, taking turns between the combinations of outcomes."
    return f"<p class='small'>{note_text}</p>" + "".join(rows)


def imagined_section(paths: list[Path]) -> str:
    if not paths:
        return note("No predicted videos given (--imagined PATH.mp4 ...).")
    shown = [video(path, escape(path.stem)) if path.exists() else note(f"{path}: not there.") for path in paths]
    return f'<div class="pair">{"".join(shown)}</div>'


def reproduce_section(arms: list[Arm], cfg: ReportConfig) -> str:
    commands = ["make demo    # everything at small scale; then, for this page:"]
    commands += dict.fromkeys(arm.results["command"] for arm in arms if "command" in arm.results)
    words = ["--out", cfg.out]
    for name in ("arms", "training", "imagined"):
        words += [f"--{name}", *getattr(cfg, name)] if getattr(cfg, name) else []
    commands.append(shlex.join(["python", "experiments/report.py", *words]))
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


# ----------------------------------------------------------------------------------------------------------- pieces


def common_seeds(arms: list[Arm]) -> list[int]:
    return sorted(set.intersection(*(set(arm.episodes) for arm in arms))) if arms else []


def choose_examples(arms: list[Arm], seeds: list[int], count: int) -> list[int]:
    """The first seeds, taking turns between the combinations of outcomes so that none hides behind the frequent one."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for seed in seeds:
        groups.setdefault(tuple(bool(arm.episodes[seed]["success_final"]) for arm in arms), []).append(seed)
    turns = zip_longest(*(groups[outcome] for outcome in sorted(groups, reverse=True)))
    return [seed for turn in turns for seed in turn if seed is not None][:count]


def label(key: str) -> str:
    return RATES.get(key, key.replace("_", " "))


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def rate_cell(outcomes: dict[int, bool]) -> str:
    if not outcomes:
        return "not recorded"
    successes, trials = sum(outcomes.values()), len(outcomes)
    low, high = wilson_interval(successes, trials)
    return f"<b>{successes / trials:.0%}</b> {successes}/{trials} <span class='small'>[{low:.0%}, {high:.0%}]</span>"


def difference_cell(first: dict[int, bool], second: dict[int, bool]) -> str:
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return "no common seed"
    paired = paired_comparison([first[seed] for seed in seeds], [second[seed] for seed in seeds])
    low, high = (100 * bound for bound in paired.interval)
    return (
        f"<b>{100 * paired.difference:+.0f}</b> <span class='small'>[{low:+.0f}, {high:+.0f}]</span>, "
        f"p = {paired.p_value:.2g}, n = {paired.trials}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def video_path(arm: Arm, seed: int) -> Path | None:
    name = arm.episodes[seed].get("video")
    return arm.folder / name if name and (arm.folder / name).is_file() else None


def video(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    player = f'<video controls muted loop playsinline preload="metadata" src="data:video/mp4;base64,{content}"></video>'
    return f"<figure>{player}<figcaption>{caption}</figcaption></figure>"


def load_pyplot():
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Grey on transparent reads on a light and on a dark page. Text as paths: no font needed.
    pyplot.rcParams.update({f"{k}.color": GREY for k in ("xtick", "ytick", "text")})
    pyplot.rcParams.update({"axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY})
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8})
    pyplot.rcParams.update({"axes.facecolor": "none", "svg.hashsalt": "report"})
    return pyplot


def bars(arms: list[Arm], keys: list[str]) -> str:
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 2.8))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        for place, key in enumerate(keys):
            outcomes = arm.outcomes(key)
            if not outcomes:
                continue
            rate = sum(outcomes.values()) / len(outcomes)
            low, high = wilson_interval(sum(outcomes.values()), len(outcomes))
            x = place + (i - (len(arms) - 1) / 2) * width
            axis.bar(x, 100 * rate, 0.9 * width, color=colour(i))
            axis.errorbar(x, 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]], color=GREY, capsize=3)
    axis.set_xticks(range(len(keys)), [label(key) for key in keys])
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of episodes, 95% interval")
    return f'<div class="scroll wide">{draw(figure, "success rates and subgoals with intervals")}</div>'


def draw(figure, description: str) -> str:
    """The figure as inline SVG; closes it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return f'<div class="chart">{svg}</div>'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1d1f23; --back: #ffffff; --soft: #f2f4f7; --line: #d5d9e0; --dim: #5c6370; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8ec; --back: #15171b; --soft: #20242b; --line: #3a404a; --dim: #9aa2af; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
p, .chart { max-width: 60rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; min-width: 100%; white-space: nowrap; }
th, td { text-align: left; padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
.wrap { white-space: normal; }
.wrap .whole { white-space: nowrap; }
.small { color: var(--dim); font-size: 0.85rem; }
.note { background: var(--soft); border-left: 4px solid #e0761a; padding: 0.5rem 0.8rem; overflow-wrap: anywhere; }
.key { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em; border-radius: 2px; }
.legend span { margin-right: 1rem; }
.chart svg { width: 100%; height: auto; } .wide .chart { min-width: 36rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0.5rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 16rem; margin: 0 0 1rem; } video { width: 100%; border-radius: 4px; background: #000; }
figcaption { font-size: 0.85rem; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
</style>
</head>
<body>
<h1>$title</h1>
$notes
<h2>Success</h2>
$success
<h2>Training</h2>
$training
<h2>Rollouts on the same seeds</h2>
$rollouts
<h2>Predicted against real</h2>
$imagined
<h2>Reproduce</h2>
$reproduce
</body>
</html>
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ReportConfig()
    parser.add_argument("--out", default=default.out, help="the page (default %(default)s)")
    parser.add_argument("--arms", nargs="*", default=[], help="evaluation run folders; the first against the others")
    parser.add_argument("--training", nargs="*", default=[], help="training run folders")
    parser.add_argument("--imagined", nargs="*", default=[], help="videos of predictions beside reality")
    parser.add_argument("--examples", type=int, default=default.examples, help="seeds shown (default %(default)s)")
    try:
        print(report(ReportConfig(**vars(parser.parse_args()))))
    except ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
