"""Checkpoints: one safetensors file and one JSON manifest per saved step, written atomically, the manifest last.

`runs/<name>/checkpoint/step_00000300.safetensors` holds every tensor (model, EMA, optimiser, statistics),
`step_00000300.json` what they mean (configs, action contract, data) and the tensors' SHA-256. A step without its
manifest does not exist. Nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from selfflow_robot.codec import CodecConfig
from selfflow_robot.model import Model, ModelConfig
from selfflow_robot.tokens import ACTION_CONTRACT, Layout, Packer

FORMAT = 1
KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or continued; the message names the file and the remedy."""


def save(folder: str | Path, step: int, tensors: dict[str, Tensor], manifest: dict) -> Path:
    """Writes step `step` and removes all but the last KEEP steps; returns the manifest's path.

    Raises CheckpointError when the disk refuses; what was saved before stays.
    """
    folder = Path(folder)
    content = dump_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    manifest = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(content).hexdigest()} | manifest
    path = folder / f"step_{step:08d}.json"
    write_atomic(path.with_suffix(".safetensors"), content)
    write_atomic(path, json.dumps(manifest, indent=1).encode())
    for old in saved(folder)[:-KEEP]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    return path


def saved(folder: str | Path) -> list[Path]:
    """Manifests of the complete steps, oldest first."""
    return sorted(Path(folder).glob("step_*.json"))


def read_manifest(path: str | Path) -> dict:
    """Raises CheckpointError naming the file when it is damaged or of another format."""
    path = Path(path)
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). {_remedy(path)}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {version}, this version reads {FORMAT}. Train it again.")
    return manifest


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and manifest of the newest complete step, checked against its SHA-256."""
    steps = saved(folder)
    if not steps:
        raise CheckpointError(f"no checkpoint in {folder}")
    manifest = read_manifest(steps[-1])
    path = steps[-1].with_suffix(".safetensors")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). {_remedy(steps[-1])}") from error
    if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
        raise CheckpointError(f"{path} is truncated or altered ({len(content)} bytes). {_remedy(steps[-1])}")
    return load_tensors(content), manifest


def require_same(found: dict, wanted: dict, where: str | Path) -> None:
    """Raises CheckpointError listing the keys in which a checkpoint differs from what is asked for."""
    flat_found, flat_wanted = _flatten(json.loads(json.dumps(found))), _flatten(json.loads(json.dumps(wanted)))
    keys = [key for key in sorted(flat_found | flat_wanted) if flat_found.get(key) != flat_wanted.get(key)]
    if keys:
        differences = "; ".join(f"{key}: {flat_found.get(key)!r} there, {flat_wanted.get(key)!r} now" for key in keys)
        raise CheckpointError(
            f"{where} was made with other settings ({differences}). Use another name=..., or remove it."
        )


def describe(model: Model, packer: Packer) -> dict:
    """The part of the manifest from which `build` makes the same network and scales."""
    return {
        "model": asdict(model.config),
        "codec": asdict(packer.codec.config),
        "layout": asdict(packer.layout),
        "action": ACTION_CONTRACT,
    }


def build(manifest: dict, where: str | Path) -> tuple[Model, Packer]:
    """An untrained network and packer of the shapes in a manifest."""
    try:
        require_same(manifest["action"], ACTION_CONTRACT, where)
        packer = Packer(Layout(**manifest["layout"]), CodecConfig(**manifest["codec"]))
        return Model(ModelConfig(**manifest["model"]), packer.channels), packer
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: the manifest does not describe this version's model ({error}).") from error


def load_model(path: str | Path, weights: str = "ema") -> tuple[Model, Packer, dict]:
    """Network (evaluation weights, or "model": the ones in training), packer and manifest of a run or its folder."""
    folder = find(path)
    tensors, manifest = load(folder)
    model, packer = build(manifest, folder)
    restore(model, tensors, weights, folder)
    restore(packer, tensors, "packer", folder)
    return model.eval().requires_grad_(False), packer.requires_grad_(False), manifest


def collect(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state as `prefix.name` tensors."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def restore(module: torch.nn.Module, tensors: dict[str, Tensor], prefix: str, where: str | Path) -> None:
    """Inverse of `collect`; raises CheckpointError naming tensors that are absent, unknown or of another shape."""
    own = module.state_dict()
    state = {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}
    wrong = [
        n for n in sorted(own.keys() | state.keys()) if n not in own or n not in state or own[n].shape != state[n].shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: tensors {prefix}.{{{', '.join(wrong[:5])}}} do not fit this model")
    module.load_state_dict(state)


def find(path: str | Path, runs: str | Path = "runs") -> Path:
    """The checkpoint folder of a run name, a run folder or a checkpoint folder."""
    for candidate in (Path(path), Path(runs) / path):
        for folder in (candidate / "checkpoint", candidate):
            if saved(folder):
                return folder
    raise CheckpointError(f"no checkpoint at {path} nor in {Path(runs) / path}. Runs there: {_names(runs)}")


def newest_run(kind: str, method: str | None = None, runs: str | Path = "runs") -> Path | None:
    """The most recently saved run of kind "pretrain" or "finetune" (and of a method); None when there is none."""
    newest: tuple[float, Path] | None = None
    for folder in Path(runs).glob("*/checkpoint"):
        for path in saved(folder)[-1:]:
            manifest = read_manifest(path)
            if manifest.get("kind") == kind and method in (None, manifest.get("method")):
                newest = max(newest or (0.0, path), (path.stat().st_mtime, folder.parent))
    return newest[1] if newest else None


def write_atomic(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises CheckpointError naming the file when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}). Nothing saved before is lost: "
            "make room and run the same command again."
        ) from error


def _remedy(path: Path) -> str:
    earlier = [step for step in saved(path.parent) if step < path]
    if earlier:
        return f"Remove {path} to continue from {earlier[-1].stem}."
    return f"Remove {path.parent} and train again."


def _flatten(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _names(runs: str | Path) -> str:
    names: Iterable[str] = sorted(folder.parent.name for folder in Path(runs).glob("*/checkpoint"))
    return ", ".join(names) or "none"
