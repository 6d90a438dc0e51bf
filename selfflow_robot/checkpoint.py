"""Checkpoints: one safetensors file and one JSON manifest per saved step, written atomically, the manifest last.

`runs/<name>/checkpoint/step_00000300.safetensors` holds every tensor (model, EMA, optimiser, statistics),
`step_00000300.json` what they mean (configs, action contract, data, code version) and the tensors' SHA-256. A step
without its manifest does not exist; the one before goes only after the new one was read back. Nothing is unpickled.

`export` makes a folder in Hugging Face's layout (config.json, model.safetensors, README.md), which every function here
reads as a checkpoint of one step.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from selfflow_robot.codec import Codec, CodecConfig
from selfflow_robot.grow import grow
from selfflow_robot.model import Model, ModelConfig
from selfflow_robot.processes import scatter
from selfflow_robot.tokens import ACTION_CONTRACT, Layout, Packer

FORMAT = 1
KEEP = 2
EXPORTED = "model.safetensors"
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}  # of an export's matrices
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "google_robot"  # in a checkout, ready to act


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or continued; the message names the file and the remedy."""


def save(folder: str | Path, step: int, tensors: dict[str, Tensor], manifest: dict) -> Path:
    """Writes step `step` and a model card, and removes all but the last KEEP steps; returns the manifest's path.

    Raises CheckpointError when the disk refuses; what was saved before stays.
    """
    folder = Path(folder)
    path = folder / f"step_{step:08d}.json"
    sweep(folder)
    digest = write_tensors(path.with_suffix(".safetensors"), tensors)
    manifest = {"format": FORMAT, "step": step, "sha256": digest, "code": code_version()} | manifest
    write_atomic(path, json.dumps(manifest, indent=1).encode())
    write_atomic(folder / "README.md", card(manifest).encode())
    for old in saved(folder)[:-KEEP]:
        old.unlink()
        tensors_of(old).unlink(missing_ok=True)
    return path


def save_batch(folder: str | Path, step: int, batch: dict, part: tuple[int, int], about: dict) -> Path:
    """A batch for inspection: tensors as safetensors, strings and `about` as JSON. part (k, n): the k-th of n parts."""
    path = Path(folder) / f"step_{step:08d}_part_{part[0]}_of_{part[1]}.json"
    write_tensors(path.with_suffix(".safetensors"), {k: v for k, v in batch.items() if isinstance(v, Tensor)})
    others = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
    write_atomic(path, json.dumps({"step": step, "part": part} | about | {"batch": others}, indent=1).encode())
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Whole or not at all, and read back before it takes its place; returns the file's SHA-256. Raises CheckpointError
    naming the file when the disk refuses, or gives back something else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it: save_file makes files that only their owner can read
        save_file(tensors, temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _verify(temporary, tensors)
        digest = sha256(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _refused(path, error) from error
    return digest


def _verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises OSError when a file does not hold exactly these tensors."""
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(*(a.reshape(-1).view(torch.uint8) for a in (file.get_tensor(name), tensor))):
                raise OSError(5, f"tensor {name} reads back differently")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def sweep(folder: str | Path) -> None:
    """Removes what a killed process left: half-written files (ours, and `.tmp*` of safetensors), and tensors without a
    manifest."""
    folder = Path(folder)
    steps = {tensors_of(path) for path in saved(folder)}
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp*"), *folder.glob("step_*.safetensors")]:
        if path not in steps:
            path.unlink(missing_ok=True)


@functools.cache
def code_version() -> dict[str, str]:
    """Package version, and the git commit where the package lies in a checkout."""
    try:
        version = {"selfflow_robot": metadata.version("selfflow_robot")}
    except metadata.PackageNotFoundError:
        version = {"selfflow_robot": "not installed"}
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists():
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        version |= {"commit": found.stdout.strip()} if found.returncode == 0 else {}
    return version


def saved(folder: str | Path) -> list[Path]:
    """Manifests of the complete steps, oldest first; of an exported folder, its one."""
    if (Path(folder) / EXPORTED).exists() and (Path(folder) / "config.json").exists():
        return [Path(folder) / "config.json"]
    return sorted(Path(folder).glob("step_*.json"))


def tensors_of(manifest: Path) -> Path:
    return manifest.with_name(EXPORTED) if manifest.name == "config.json" else manifest.with_suffix(".safetensors")


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
    path = tensors_of(steps[-1])
    try:
        digest, size = sha256(path), path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). {_remedy(steps[-1])}") from error
    if digest != manifest.get("sha256"):
        raise CheckpointError(f"{path} is truncated or altered ({size} bytes). {_remedy(steps[-1])}")
    return load_file(path), manifest


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
        "codec_hash": packer.codec.hash(),
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
    restore(model, tensors, "model" if "weights" in manifest else weights, folder)  # exported: it has one set
    restore(packer, tensors, "packer", folder)
    require_codec(manifest, packer.codec, folder)
    return model.eval().requires_grad_(False), packer.requires_grad_(False), manifest


def require_codec(manifest: dict, codec: Codec, where: str | Path) -> None:
    """Raises CheckpointError naming both hashes where a checkpoint was trained on the latents of another codec."""
    trained, found = manifest.get("codec_hash"), codec.hash()  # absent in old manifests
    if trained not in (None, found):
        source = codec.config.source or codec.config.kind
        raise CheckpointError(
            f"{where} was trained with codec {trained[:16]}, but {source} is {found[:16]}: its weights have changed. "
            "Put back those of the training."
        )


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
    module.load_state_dict({name: scatter(tensor, own[name].detach()) for name, tensor in state.items()})


def find(path: str | Path, runs: str | Path = "runs") -> Path:
    """The checkpoint folder of a run name, a run folder or a checkpoint folder."""
    for folder in candidates(path, runs):
        if saved(folder):
            return folder
    raise CheckpointError(f"no checkpoint at {path} nor in {Path(runs) / path}. Runs there: {_names(runs)}")


def run_folder(path: str | Path) -> Path:
    """The run folder of what `find` finds; of an exported checkpoint, its own."""
    folder = find(path)
    return folder.parent if folder.name == "checkpoint" else folder


def candidates(path: str | Path, runs: str | Path = "runs") -> list[Path]:
    """Where `find` looks, in this order."""
    places = (Path(path), Path(runs) / path)
    return [folder for place in places for folder in (place / "checkpoint", place)]


def newest_run(kind: str, method: str | None = None, runs: str | Path = "runs") -> Path | None:
    """The most recently saved run of kind "pretrain" or "finetune" (and of a method); None when there is none."""
    newest: tuple[float, Path] | None = None
    for folder in Path(runs).glob("*/checkpoint"):
        for path in saved(folder)[-1:]:
            manifest = read_manifest(path)
            if manifest.get("kind") == kind and method in (None, manifest.get("method")):
                newest = max(newest or (0.0, path), (path.stat().st_mtime, folder.parent))
    return newest[1] if newest else None


def chosen(path: str | Path | None) -> str | Path:
    """The run that was named, or the newest fine-tuned one, or the one that came with the repository. Raises ValueError
    naming the command that makes one."""
    found = path or newest_run("finetune") or (SHIPPED if saved(SHIPPED) else None)
    if found is None:
        raise ValueError("no fine-tuned run in runs/. Make one with: python experiments/finetune.py")
    return found


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
        raise _refused(path, error) from error


def export(
    path: str | Path,
    folder: str | Path,
    weights: str = "ema",
    results: Sequence[dict] = (),
    dtype: str | None = None,
    start: str | Path | None = None,
    share: float = 1.0,
) -> Path:
    """A run (name or folder) as a folder in Hugging Face's layout, with the evaluation weights or, "model", the ones in
    training; without the optimiser. `load_model` and `policies.load_policy` take it like a run. results: contents of
    `results.json` of evaluations, of the run or of its export, for the card, beside those that an export has already;
    each also goes along whole, for comparing other policies with this one episode by episode (`report.py --arms`).
    dtype: of the network's matrices, "float32", "bfloat16" or None, as they are; vectors and the packer stay float32.
    What computes under `precision` in bf16 casts matrices to it anyway, so there bfloat16 changes no output.
    start, share: see `between`.

    Raises CheckpointError when the run cannot be read or the folder not written, or results are another checkpoint's.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: choose float32 or bfloat16")
    folder, found = Path(folder), find(path)
    tensors, manifest = load(found)
    if weights == "model" and manifest.get("weights", weights) != weights:
        raise CheckpointError(f"{found} is an export of its averaged weights: it has no others")
    weights = manifest.get("weights", weights)
    prefix = "model" if "weights" in manifest else weights
    kept = {
        f"model.{name.removeprefix(f'{prefix}.')}": t for name, t in tensors.items() if name.startswith(f"{prefix}.")
    }
    if not kept:
        raise CheckpointError(f"{found} has no weights {weights!r}: choose ema or model")
    hashes = {manifest["sha256"]}  # of the checkpoints whose results are those of these weights
    if start is not None or share != 1:
        kept = between(kept, manifest, start, share, found)
        hashes, manifest = set(), manifest | {"share": share, "results": []}
    if dtype:
        kept = {name: t.to(DTYPES[dtype]) if t.ndim > 1 else t for name, t in kept.items()}
    kept |= {name: t for name, t in tensors.items() if name.startswith("packer.")}
    kept = {name: tensor.contiguous() for name, tensor in kept.items()}
    if results:
        hashes.add(hashlib.sha256(to_bytes(kept)).hexdigest())
    for result in results:  # before anything there is replaced
        if result.get("checkpoint_hash") not in hashes:
            what = result.get("task", "something else than a task")
            raise CheckpointError(f"the results of {what} are those of another checkpoint than {found}")
    exported = write_tensors(folder / EXPORTED, kept)
    # Those of an export that is written anew stay; what is measured again, acting alike, replaces what was.
    measured = [_measured(result, folder) for result in results]
    again = [_condition(result) for result in measured]
    measured = [old for old in manifest.get("results", []) if _condition(old) not in again] + measured
    whole = {name: (found / name).read_bytes() for name in map(_whole, measured) if (found / name).is_file()}
    whole |= {_whole(result): json.dumps(result).encode() for result in results}
    for name, content in whole.items():
        write_atomic(folder / name, content)
    manifest = manifest | {"weights": weights, "sha256": exported, "results": measured, "evaluations": sorted(whole)}
    manifest |= {"dtype": dtype} if dtype else {}
    write_atomic(folder / "README.md", card(manifest).encode())
    write_atomic(folder / "config.json", json.dumps(manifest, indent=1).encode())  # last: now it is a checkpoint
    for path in folder.glob("evaluations/*/results.json"):
        if path.relative_to(folder).as_posix() not in whole:  # of what was exported there before
            path.unlink()
    return folder


def between(
    tuned: dict[str, Tensor], manifest: dict, start: str | Path | None, share: float, where: str | Path
) -> dict[str, Tensor]:
    """Weights `share` of the way from those that a fine-tuning began with to its own, `tuned` (WiSE-FT,
    arXiv:2109.01903): much of what is new stays learned there, and less of what was known before is lost.

    start: the run or folder that it began from (`finetune.py --pretrained`); one that was made larger is so again.
    Raises CheckpointError unless it is that one, and where the weights are between the two already.
    """
    if start is None or not 0 <= share < 1:
        raise CheckpointError(f"share {share:g}: from 0 and below 1, and with what fine-tuning began from")
    if "share" in manifest:
        raise CheckpointError(f"{where} has a share of {manifest['share']:g} already: export the run itself")
    model, _, began = load_model(start)
    if began["sha256"] != manifest.get("identity", {}).get("pretrained"):
        raise CheckpointError(f"{where} was not fine-tuned from {start} as it is now: share needs what it began with")
    if manifest["config"].get("grow"):
        model = grow(model, ModelConfig(**manifest["model"]), manifest["config"]["seed"])
    begun = collect("model", model)
    return {name: torch.lerp(begun[name], t.float(), share).to(t.dtype) for name, t in tuned.items()}


def _measured(result: dict, folder: Path) -> dict:
    """What a card says of an evaluation; its command is of the exported folder, whose weights were measured."""
    names = ("task", "success_rule", "protocol_hash")
    protocol = {name: result["protocol"][name] for name in ("protocol", "seeds", "success")}
    protocol["reset"] = result["protocol"].get("reset", "")
    evaluate = re.sub(r" (--)?checkpoint[= ]\S+", "", result["command"])
    command = {"command": f"{evaluate} --checkpoint {shlex.quote(str(folder))}"}
    acting = {"policy_settings": result.get("policy_settings", {})}
    return {name: result[name] for name in names} | protocol | command | acting | {"summary": result["summary"]}


def _condition(result: dict) -> tuple[str, dict]:
    """What two results of one checkpoint must share to measure the same: the protocol, and how the policy acted."""
    return result["protocol_hash"], result.get("policy_settings", {})


def _whole(result: dict) -> str:
    """Where in an export the whole of a result lies: a name of its own for each `_condition`, inside the folder."""
    protocol, acting = _condition(result)
    how = hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()[:6]
    name = re.sub(r"[^\w-]", "_", f"{result['task']}_{protocol}_{how}")
    return f"evaluations/{name}/results.json"


def card(manifest: dict) -> str:
    """A model card for Hugging Face: what the network is, what it reads and what its actions mean."""
    about = {key: manifest.get(key, {}) for key in ("model", "codec", "layout", "action", "config", "code")}
    kind = manifest.get("kind")
    what = {"finetune": "policy and world model", "codec": "video codec"}.get(kind, "video backbone")
    rows = [("steps of training", manifest.get("step")), ("method", manifest.get("method"))]
    rows += [("weights", "EMA" if manifest.get("weights", "ema") == "ema" else "in training")]
    if "share" in manifest:
        rows += [("share of them, the rest as fine-tuning began", f"{manifest['share']:g}")]
    rows += [(f"{part}: {name}", value) for part in ("model", "codec", "layout") for name, value in about[part].items()]
    rows += [("data", about["config"].get("data")), ("data hash", manifest.get("identity", {}).get("data_hash"))]
    modes = {name: share for name, share in about["config"].get("modes", {}).items() if share}
    rows += [("trained as", ", ".join(f"{name} {share:.0%}" for name, share in modes.items()))]
    rows += [("as before, not by labels", ", ".join(f"{start} ..." for start in about["config"].get("keep", [])))]
    rows += [(f"code: {name}", value) for name, value in about["code"].items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, ""))
    actions = ", ".join(about["action"].get("names", []))
    types = "float32, the network's matrices bfloat16," if manifest.get("dtype") == "bfloat16" else "float32"
    load = {
        "finetune": 'from policies import load_policy\n\npolicy = load_policy("FOLDER")',
        "codec": 'from selfflow_robot import latents\n\ncodec = latents.load_codec("FOLDER")',
    }.get(kind, 'from selfflow_robot import checkpoint\n\nmodel, packer, manifest = checkpoint.load_model("FOLDER")')
    return f"""---
library_name: selfflow_robot
pipeline_tag: robotics
tags: [robotics, world-model, flow-matching, self-flow]
---
# A Self-Flow {what}

Every token has its own noise level; one network is policy, world model, inverse dynamics and video predictor.

```python
{load}
```

Actions: {actions}; {about["action"].get("units", "")}.
{_results_table(manifest.get("results", []), manifest.get("evaluations", []))}
| | |
|---|---|
{table}

Tensors are {types} safetensors; `packer.*` are the codec's and the normalisation's statistics. Nothing is unpickled.
"""


def _results_table(results: list[dict], files: list[str]) -> str:
    if not results:
        return ""
    rows = []
    for result in results:
        for name, row in result["summary"].items():
            protocol = result["protocol"].replace("_", " ")
            _, comma, margin = result.get("reset", "").partition(",")  # with a margin the episodes are others
            seeds = f"random, {result['seeds']['first']} and on{comma}{margin}" if protocol == "random" else protocol
            rate = f"{row['k']}/{row['n']} = {row['rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
            rows.append(
                f"| {result['task']} | {name.replace('_', ' ')} | {rate} | {seeds} | {result['protocol_hash']} |"
            )
    rules = "\n".join(
        dict.fromkeys(f"- {result['task']}: {result['success']}. {result['success_rule']}" for result in results)
    )
    commands = "\n".join(dict.fromkeys(result["command"] for result in results))
    if files:
        folder = files[0].removesuffix("/results.json")
        commands += "\n\n# How each episode ended is in FOLDER/evaluations; another policy against it:"
        commands += f"\npython experiments/report.py --arms FOLDER/{folder} runs/ITS_EVALUATION"
    table = "\n".join(rows)
    return f"""
## Measured in SIMPLER

It learned from demonstrations in this simulator; published policies learned from data of real robots.

| task | what | rate, 95% Wilson interval | episodes | protocol |
|---|---|---|---|---|
{table}

{rules}

```
{commands}
```
"""


def _refused(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path} cannot be written ({reason}). Nothing saved before is lost: make room and run the same command again."
    )


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
