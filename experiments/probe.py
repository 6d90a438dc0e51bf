"""What the layers of frozen backbones know of what control needs: ridge probes on held-out episodes.

    python experiments/probe.py                                           the newest pretraining of both arms
    python experiments/probe.py --runs runs/sf_* runs/fm_*                several, summarised over their seeds
    python experiments/probe.py --runs a b --tokens generated --level 0.5

Both arms at equal compute, three lengths, three seeds (a Self-Flow step costs 1.23 to 1.29 plain ones, so the baseline
gets a quarter more of them; `experiments/benchmark.py train` measures the ratio):

    for seed in 0 1 2; do for steps in 400 1200 3600; do
      python experiments/pretrain.py --seed $seed --steps $steps --name sf_${steps}_$seed
      python experiments/pretrain.py --seed $seed --steps $((steps * 5 / 4)) --name fm_${steps}_$seed \\
        --method flow_matching
    done; done
    python experiments/probe.py --runs runs/sf_* runs/fm_* --name probe_study

Writes runs/<name>: results.json, probe.png. Runs of one method, length and settings are seeds of each other; lengths of
two methods are compared in order, the shortest with the shortest. Positions are scored by R^2 and mean distance, the
rest by balanced accuracy; intervals are 95 %: over test episodes for one run, over seeds (Student's t) for several.
Beside them stands what needs no training: nothing (the mean), a small picture, the latents of the first run's codec,
and the features of its network untrained (at initialisation its blocks are the identity: there is one layer of them).
"""

import io
import json
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from math import isfinite
from pathlib import Path

import numpy as np

from selfflow_robot.config import ProbeConfig, run

REFERENCE = "flow_matching"  # what other methods are compared with
SEEDED = {"method", "seed", "pretrained"}  # settings in which seeds of one another differ, or that name the group
FEW = 5  # test episodes: fewer say little
BASELINES = ((0, (1, 4)), ":", "-.", "--")  # line styles
COLOURS = ("#2f7ed8", "#e0761a", "#2e9e62", "#a05cc9", "#c0392b", "#7f8c8d")


def probe_runs(cfg: ProbeConfig) -> Path:
    """Probe all runs; returns the results' path."""
    import torch
    from rich.progress import track

    from selfflow_robot import checkpoint, probe
    from selfflow_robot.data import open_dataset

    highest = {"given": 0, "generated": 1}.get(cfg.tokens, -1)
    if not 0 <= cfg.level <= highest:
        raise ValueError(
            f"tokens {cfg.tokens!r}, level {cfg.level}: choose given (level 0) or generated (level 0 to 1)"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    names = cfg.runs or newest_pairs()
    dataset = open_dataset(cfg.data)
    frames, episode, test = choose_frames(dataset, cfg)
    targets, absent = probe.make_targets(dataset, frames)
    targets, same = probe.varying(targets, test)
    if not targets:
        raise ValueError(f"{cfg.data}: nothing to probe. {'; '.join(absent + same)}")

    def scores(features):
        return {layer: probe.probe(x, targets, episode, test) for layer, x in features.items()}

    # By their manifests: what is refused is refused before the work. A run that is still going may be further by then.
    described = [about(name, checkpoint.read_manifest(checkpoint.saved(checkpoint.find(name))[-1])) for name in names]
    described = [one | {"variant": variant} for one, variant in zip(described, variants(described))]
    require_distinct(described)
    results = []
    for name, one in track(list(zip(names, described)), "probing", transient=True):
        model, packer, manifest = checkpoint.load_model(name, cfg.weights)
        model, packer = model.to(device), packer.to(device)
        require_view(packer.layout, dataset, name)
        given = cfg.tokens == "given"
        if not results:
            torch.manual_seed(0)
            untrained, _ = checkpoint.build(manifest, name)
            shown = probe.model_features(untrained.to(device), packer, dataset, frames, given, cfg.level, cfg.grid)
            free = {
                "nothing": np.zeros((len(frames), 1)),
                "pixels": probe.pixel_features(dataset, frames),
                "latents": probe.latent_features(packer, dataset, frames, cfg.grid),
                "untrained": shown[0],
            }
            baselines = {name: scores({0: x})[0] for name, x in free.items()}
        features = probe.model_features(model, packer, dataset, frames, given, cfg.level, cfg.grid)
        results.append(one | about(name, manifest) | {"layers": scores(features)})

    groups = summarise(results, [target.name for target in targets])
    report = {
        "config": asdict(cfg),
        "data_hash": dataset.hash,
        "fitted_episodes": len(set(episode[~test])),
        "test_episodes": len(set(episode[test])),
        "frames": len(frames),
        "absent": absent + same,
        "baselines": baselines,
        "runs": results,
        "groups": groups,
        "differences": differences(results, [target.name for target in targets]),
    }
    folder = Path("runs") / cfg.name
    path = folder / "results.json"
    checkpoint.write_atomic(path, json.dumps(plain(report), indent=1).encode())
    checkpoint.write_atomic(folder / "probe.png", plot(report, targets))
    print_report(report, targets)
    print(f"{path} and {folder / 'probe.png'}")
    return path


def newest_pairs() -> list[str]:
    from selfflow_robot import checkpoint

    found = [checkpoint.newest_run("pretrain", method) for method in ("self_flow", REFERENCE)]
    if not any(found):
        raise ValueError("no pretraining in runs/. Make one with: python experiments/pretrain.py, or give --runs")
    return [str(path) for path in found if path]


def choose_frames(dataset, cfg: ProbeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat frame numbers (F,), the episode of each, and whether it is tested on: whole episodes are."""
    if cfg.frames < 1 or not 0 <= cfg.test_share < 1:
        raise ValueError(f"need frames >= 1 and test_share in [0, 1), got {cfg.frames} and {cfg.test_share}")
    if cfg.test_share:
        order = [dataset.episodes[i] for i in np.random.default_rng(0).permutation(len(dataset.episodes))]
        count = max(1, round(cfg.test_share * len(order)))
        held, fitted = order[:count], order[count:]
    else:
        held, fitted = list(dataset.split("validation")), list(dataset.split("train"))
    spread = np.unique(np.linspace(0, len(fitted) - 1, min(cfg.episodes, len(fitted))).astype(int))
    fitted = [fitted[i] for i in spread]
    if len(fitted) < 2 or not held:
        raise ValueError(
            f"{cfg.data}: {len(fitted)} episodes to fit on and {len(held)} to test on; need two and one. Collect more: "
            "python experiments/collect_demos.py --episodes 300"
        )
    if len(held) < FEW:
        print(f"Only {len(held)} test episodes: intervals are wide. More data, or --test_share, narrows them.")
    frames, episode = [], []
    for one in held + fitted:
        frames.append(one.start + np.unique(np.linspace(0, one.length - 1, cfg.frames).astype(int)))
        episode.append(np.full(len(frames[-1]), one.start))
    tested = np.isin(np.concatenate(episode), [one.start for one in held])
    return np.concatenate(frames), np.concatenate(episode), tested


def require_view(layout, dataset, name: str) -> None:
    wanted, there = (layout.height, layout.width), dataset.image_shape[:2]
    if wanted != there:
        raise ValueError(f"{name} sees pictures of {wanted}, {dataset.root} holds {there}: probe it on its own --data")


def about(name: str, manifest: dict) -> dict:
    """Which run this is, and what it cost."""
    return {
        "run": Path(name).name,
        "kind": manifest.get("kind"),
        "method": manifest.get("method"),
        "seed": manifest.get("identity", {}).get("seed"),
        "step": manifest["step"],
        "settings": settings(manifest),
        "train_s": train_seconds(name),
        "sha256": manifest["sha256"],
    }


def settings(manifest: dict) -> dict:
    """What makes a run what it is, beside method and seed."""
    identity = {"kind": manifest.get("kind")} | manifest.get("identity", {})
    return {key: value[:8] if key == "data_hash" else value for key, value in identity.items() if key not in SEEDED}


def train_seconds(name: str) -> float | None:
    """Spent in a run's steps, by its log; None where that is not there."""
    from selfflow_robot.checkpoint import find

    path = find(name).parent / "metrics.jsonl"
    seconds = 0.0
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # the last line of a run that is still going
            seconds += json.loads(line).get("step_s", 0.0)
    return seconds or None


# ------------------------------------------------------------------------------------------------------------ summary


def best_layer(result: dict, target: str) -> int:
    """By cross-validation on the fitted episodes: the test episodes choose nothing."""
    return max(result["layers"], key=lambda layer: result["layers"][layer][target].validated)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """95 % of the mean of a few seeds (Student's t); NaN for a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return np.nan, np.nan
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def variants(results: list[dict]) -> list[str]:
    """Of each run, its values of the settings in which runs of one method differ, as "codec pixels"; empty where there
    are none. What differs between methods alone is the methods' own."""
    differing = set()
    for method in {result["method"] for result in results}:
        of = [result["settings"] for result in results if result["method"] == method]
        differing |= {key for key in set.intersection(*map(set, of)) if any(one[key] != of[0][key] for one in of)}
    return [
        ", ".join(f"{key} {r['settings'][key]}" for key in sorted(differing & r["settings"].keys())) for r in results
    ]


def named(method: str, variant: str) -> str:
    return f"{method}, {variant}" if variant else method


def grouped(results: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """{(method, variant, step): the runs that are seeds of each other}, shorter ones first."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for result in sorted(results, key=lambda r: (str(r["method"]), r["variant"], r["step"], str(r["seed"]))):
        groups.setdefault((result["method"], result["variant"], result["step"]), []).append(result)
    return groups


def require_distinct(results: list[dict]) -> None:
    """ValueError naming a training that is there twice: it would count as two seeds."""
    for (method, variant, step), runs in grouped(results).items():
        for one, other in pairwise(runs):
            if one["seed"] is not None and one["seed"] == other["seed"]:
                what = f"{named(method, variant)}, {step} steps, seed {one['seed']}"
                raise ValueError(f"{one['run']} and {other['run']} are both {what}: leave one of them out")


def summarise(results: list[dict], targets: list[str]) -> list[dict]:
    """Per method, variant and length: the mean over seeds of each run's best layer, and of every layer."""
    groups = []
    for (method, variant, step), runs in grouped(results).items():
        group = {"method": method, "variant": variant, "step": step, "settings": runs[0]["settings"]}
        group |= {"seeds": [r["seed"] for r in runs], "runs": [r["run"] for r in runs], "targets": {}, "layers": {}}
        for target in targets:
            layers = [best_layer(r, target) for r in runs]
            best = [r["layers"][layer][target] for r, layer in zip(runs, layers)]
            group["targets"][target] = {"layers": layers} | over_seeds(best)
            shared = set.intersection(*(set(r["layers"]) for r in runs))
            group["layers"][target] = {k: over_seeds([r["layers"][k][target] for r in runs]) for k in sorted(shared)}
        groups.append(group)
    return groups


def over_seeds(scores: list) -> dict:
    """Mean and interval: over seeds; of a single run, its own over test episodes."""
    values = [s.value for s in scores]
    interval = scores[0].interval if len(scores) == 1 else mean_interval(values)
    errors = [s.error_mm for s in scores if s.error_mm is not None]
    return {
        "value": float(np.mean(values)),
        "interval": interval,
        "error_mm": float(np.mean(errors)) if errors else None,
    }


def differences(results: list[dict], targets: list[str]) -> list[dict]:
    """Every other method minus REFERENCE in the same settings, seed by seed on the same test episodes, lengths paired
    in order."""
    groups, found = grouped(results), []
    lengths = {kind: [key for key in groups if key[:2] == kind] for kind in dict.fromkeys(key[:2] for key in groups)}
    for method, variant in (kind for kind in lengths if kind[0] != REFERENCE):
        reference = lengths.get((REFERENCE, variant), [])
        for number, (one, other) in enumerate(zip(lengths[method, variant], reference)):
            first, second = ({r["seed"]: r for r in groups[key]} for key in (one, other))
            seeds = [seed for seed in first if seed in second]
            for target in targets if seeds else []:
                gains = [
                    a["layers"][best_layer(a, target)][target].value - b["layers"][best_layer(b, target)][target].value
                    for a, b in ((first[seed], second[seed]) for seed in seeds)
                ]
                found.append({
                    "method": method, "variant": variant, "length": number, "steps": [one[2], other[2]],
                    "target": target, "seeds": seeds, "difference": float(np.mean(gains)),
                    "interval": mean_interval(gains),
                })  # fmt: skip
    return found


def unequal(groups: list[dict]) -> list[str]:
    """What two methods that are compared differ in beside the method, a line each."""
    of, lines = {(group["method"], group["variant"]): group["settings"] for group in groups}, []
    for (method, variant), ours in of.items():
        theirs = of.get((REFERENCE, variant), ours)
        keys = sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key])
        if keys:
            found = ", ".join(f"{key} ({ours[key]}, {theirs[key]})" for key in keys)
            lines.append(f"{method} and {REFERENCE} differ in more than the method: {found}")
    return lines


def plain(value):
    """For JSON: scores as dicts, NaN as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------------------- output


def text(value: float, interval: tuple[float, float], note: str = "") -> str:
    low, high = interval
    shown = f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if isfinite(low) else "")
    return f"{shown}\n{note}" if note else shown


def print_report(report: dict, targets: list) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = f"{report['test_episodes']} test episodes, {report['fitted_episodes']} fitted on"
    table = Table(title=f"R^2 of positions, balanced accuracy of the rest; {shown}", show_lines=True)
    for column in ("features", *(target.name for target in targets)):
        table.add_column(column, no_wrap=True)
    for name, scores in report["baselines"].items():
        cells = [text(s.value, s.interval, millimetres(s.error_mm)) for s in (scores[t.name] for t in targets)]
        table.add_row(name, *cells)
    for group in report["groups"]:
        cells = []
        for best in (group["targets"][target.name] for target in targets):
            blocks = "/".join(map(str, sorted(set(best["layers"]))))
            notes = f"block {blocks}", millimetres(best["error_mm"])
            cells.append(text(best["value"], best["interval"], ", ".join(filter(None, notes))))
        seeds = f"{len(group['runs'])} seeds" if len(group["runs"]) > 1 else group["runs"][0]
        table.add_row(f"{named(group['method'], group['variant'])}\n{group['step']} steps, {seeds}", *cells)
    for length in dict.fromkeys((row["method"], row["variant"], *row["steps"]) for row in report["differences"]):
        rows = {r["target"]: r for r in report["differences"] if (r["method"], r["variant"], *r["steps"]) == length}
        name = f"{named(f'{length[0]} - {REFERENCE}', length[1])}\n{length[2]}, {length[3]} steps"
        table.add_row(name, *(text(rows[t.name]["difference"], rows[t.name]["interval"]) for t in targets))
    Console(width=None if Console().is_terminal else 40 + 26 * len(targets)).print(table)
    for line in report["absent"]:
        print(f"Left out: {line}")
    for line in unequal(report["groups"]):
        print(line)


def millimetres(error: float | None) -> str:
    return "" if error is None else f"{error:.0f} mm"


def plot(report: dict, targets: list) -> bytes:
    """PNG: a panel per target, the score by layer, a line per method and length with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(targets), figsize=(3.6 * len(targets), 3.6), squeeze=False)
    kinds = list(dict.fromkeys((group["method"], group["variant"]) for group in report["groups"]))
    for axis, target in zip(axes[0], targets):
        for group in report["groups"]:
            layers = group["layers"][target.name]
            kind = group["method"], group["variant"]
            steps = sorted({g["step"] for g in report["groups"] if (g["method"], g["variant"]) == kind})
            style = {"color": COLOURS[kinds.index(kind) % len(COLOURS)]}
            strength = (1 + steps.index(group["step"])) / len(steps)  # longer runs are darker
            label = f"{named(*kind)}, {group['step']} steps"
            axis.plot(
                list(layers), [s["value"] for s in layers.values()], alpha=0.3 + 0.7 * strength, label=label, **style
            )
            low, high = zip(*(s["interval"] for s in layers.values()))
            axis.fill_between(list(layers), low, high, alpha=0.08, **style)
        for number, (name, scores) in enumerate(report["baselines"].items()):
            value = scores[target.name].value
            axis.axhline(value, linestyle=BASELINES[number], color="#888888", linewidth=1, label=name)
        lowest = min(s["value"] for g in report["groups"] for s in g["layers"][target.name].values())
        axis.set(title=target.name.replace("_", " "), xlabel="block", ylim=(max(-0.05, lowest - 0.15), 1.02))
        axis.set_ylabel("balanced accuracy" if target.classes else "R²")
    axes[0, -1].legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run(ProbeConfig, probe_runs)
