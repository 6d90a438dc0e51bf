"""What a checkpoint is and what it expects: a run of pretraining, fine-tuning or codec training, or an exported folder.

    python experiments/describe.py finetune_self_flow
    python experiments/describe.py exported/policy --json

Also says what is odd about it: numbers that are not finite, dimensions that never varied in the training data, another
action contract than this version's. The tensors are checked against their SHA-256.
"""

import argparse
import json
import math
from pathlib import Path

from selfflow_robot.config import in_one_line
from selfflow_robot.interfaces import ACTION_NAMES, PROPRIO_NAMES

UNITS = ("m/step",) * 3 + ("rad/step",) * 3 + ("1 = open",)
KINDS = {"finetune": "policy and world model", "pretrain": "video backbone", "codec": "video codec"}


def describe(path: str | Path) -> dict:
    """Everything as JSON. Raises CheckpointError naming the file or the runs there are."""
    from safetensors import SafetensorError

    from selfflow_robot import checkpoint
    from selfflow_robot.tokens import ACTION_CONTRACT

    folder = checkpoint.find(path)
    file = checkpoint.saved(folder)[-1]
    manifest, tensors = checkpoint.read_manifest(file), checkpoint.tensors_of(file)
    try:
        if checkpoint.sha256(tensors) != manifest.get("sha256"):
            raise checkpoint.CheckpointError(f"{tensors} is truncated or altered: its SHA-256 is another. Get it again")
        parameters, statistics, broken = read(tensors, "weights" in manifest)
    except (OSError, SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{tensors} cannot be read ({error})") from error
    kind, config, action = manifest.get("kind"), manifest.get("config", {}), manifest.get("action", {})
    about = {
        "path": str(folder),
        "kind": kind,
        "is": KINDS.get(kind, "unknown"),
        "method": manifest.get("method"),
        "step": manifest.get("step"),
        "steps_planned": config.get("steps"),
        "weights": manifest.get("weights", "ema and those in training"),
        "parameters": parameters,
        "preset": manifest.get("identity", {}).get("model"),
        "model": manifest.get("model"),
        "modes": config.get("modes"),
        "layout": manifest.get("layout"),
        "proprio": named(PROPRIO_NAMES, statistics, "proprio", ("mean", "std")) if kind == "finetune" else None,
        "action": {
            "names": action.get("names"),
            "units": action.get("units"),
            "trained_on": named(ACTION_NAMES, statistics, "action", ("q01", "q99")) if kind == "finetune" else None,
        },
        "codec": manifest.get("codec"),
        "codec_hash": manifest.get("codec_hash"),
        "data": config.get("data"),
        "data_hash": manifest.get("identity", {}).get("data_hash"),
        "pretrained": manifest.get("identity", {}).get("pretrained"),
        "sha256": manifest["sha256"],
        "code": manifest.get("code", {}),
    }
    about["odd"] = [f"{name}: not finite" for name in broken]
    if kind not in KINDS:
        about["odd"].append(f"kind {kind!r} is unknown to this version")
    if kind == "codec":
        about |= {"layout": None, "action": None}
    elif action != ACTION_CONTRACT:
        about["odd"].append(f"another action contract than this version's: {ACTION_CONTRACT}")
    if kind == "finetune":
        ranges = {f"action {n}": row for n, row in about["action"]["trained_on"].items()}
        ranges |= {f"proprio {n}": row for n, row in about["proprio"].items()}
        about["odd"] += [f"{name}: never varied in the training data" for name, row in ranges.items() if row is None]
    if config.get("steps") and manifest.get("step", 0) < config["steps"] and "weights" not in manifest:
        about["odd"].append(f"training stopped, or goes on: step {manifest.get('step')} of {config['steps']}")
    return about


def read(path: Path, exported: bool) -> tuple[int, dict, list[str]]:
    """Number of the network's parameters, the packer's statistics as lists, names of tensors that are not finite."""
    from safetensors import safe_open

    parameters, statistics, broken = 0, {}, []
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        prefix = "ema." if not exported and any(name.startswith("ema.") for name in names) else "model."
        for name in names:
            if not name.startswith((prefix, "packer.")):
                continue
            tensor = file.get_tensor(name)
            if name.startswith(prefix):
                parameters += tensor.numel()
            elif name.startswith(("packer.action_", "packer.proprio_")):
                statistics[name.removeprefix("packer.")] = tensor.double().tolist()
            if tensor.is_floating_point() and not tensor.isfinite().all():
                broken.append(name)
    return parameters, statistics, sorted(broken)


def named(names, statistics: dict, which: str, ends: tuple[str, str]) -> dict[str, dict | None]:
    """{name: {first end, second end}} of actions' or proprioception's scales; None where the data never varied.

    `Packer.fit_statistics` leaves such a number's scale at exactly 1, which data that varies does not hit.
    """
    rows = {}
    for name, centre, scale in zip(names, statistics[f"{which}_centre"], statistics[f"{which}_scale"]):
        values = (centre - scale, centre + scale) if which == "action" else (centre, scale)
        constant = scale == 1 and (which == "proprio" or centre == 0)
        rows[name] = None if constant else dict(zip(ends, map(_rounded, values)))
    return rows


def _rounded(value: float) -> float | None:  # None: not finite, which JSON cannot say
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _pair(row: dict | None) -> str:
    if row is None:
        return "constant"
    return ", ".join(f"{end} {'not finite' if value is None else f'{value:9.4f}'}" for end, value in row.items())


def show(about: dict) -> str:
    """The same for people."""
    layout, lines = about["layout"], []

    def line(name, *values):
        if text := "  ".join(str(value) for value in values if value not in (None, "", {})):
            lines.append(f"{name:<12} {text}")

    planned = f"of {about['steps_planned']}" if about["steps_planned"] else ""
    line("checkpoint", about["path"])
    line("is a", about["is"], f"({about['kind']}, method {about['method']})")
    line("trained", f"{about['step']} {planned} steps".replace("  ", " "), f"weights: {about['weights']}")
    model = ", ".join(f"{k} {v}" for k, v in (about["model"] or {}).items())
    line("network", f"{about['parameters'] / 1e6:.2f} M parameters", f"preset {about['preset']}", model)
    if layout:
        size = f"uint8 ({layout['height']}, {layout['width']}, 3)"
        line("sees", f"view {layout['view']}: {size}", f"frames at {layout['past']} steps", f"{layout['fps']} a second")
        if about["kind"] == "finetune":
            proprio = f"proprio float32 ({len(about['proprio'])},)"
            line("reads", f"text of at most {layout['text_bytes']} bytes", proprio)
            for name, row in about["proprio"].items():
                line("", f"{name:<8}", _pair(row))
        line("predicts", f"frames at {layout['future']} steps")
    if about["kind"] == "finetune":
        line("acts", f"float32 ({layout['horizon']}, {len(about['action']['names'])})", about["action"]["units"])
        for (name, row), unit in zip(about["action"]["trained_on"].items(), UNITS):
            line("", f"{name:<8}", _pair(row), unit)
        line("modes", ", ".join(f"{name} {share:g}" for name, share in (about["modes"] or {}).items()))
    codec = about["codec"] or {}
    line("codec", codec.get("kind"), codec.get("source"), (about["codec_hash"] or "")[:16])
    line("data", about["data"], (about["data_hash"] or "")[:16])
    line("backbone", (about["pretrained"] or "")[:16])
    line("sha256", about["sha256"])
    line("code", ", ".join(f"{name} {value[:16]}" for name, value in about["code"].items()))
    lines += [f"odd:         {text}" for text in about["odd"]]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="name of a run, its folder, or an exported folder (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    from selfflow_robot import checkpoint

    with in_one_line():
        path = arguments.run or checkpoint.newest_run("finetune") or checkpoint.newest_run("pretrain")
        path = path or checkpoint.chosen(None)
        about = describe(path)
    print(json.dumps(about, indent=1) if arguments.json else show(about))


if __name__ == "__main__":
    main()
