"""The one training loop, a generator. Pretraining and fine-tuning differ in data and loss, not in code.

All randomness of step k is a function of (seed, k): a run that was killed and started again gives the same bits as one
that was not.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from selfflow_robot import checkpoint
from selfflow_robot.checkpoint import write_atomic
from selfflow_robot.config import TrainingConfig
from selfflow_robot.data import Dataset, open_dataset
from selfflow_robot.flow import TimestepDistribution, generator
from selfflow_robot.model import Model, precision
from selfflow_robot.selfflow import ema_decay, update_ema
from selfflow_robot.tokens import Packer

LossFunction = Callable[[Model, Model, dict, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    lr: float = 1e-3
    weight_decay: float = 0.01  # of matrices only
    warmup: int = 100  # steps, linear
    cooldown: float = 0.3  # last share of the steps: learning rate linearly to zero
    clip: float = 1.0  # of the gradient's norm
    ema: float = 0.9999
    seed: int = 0


@dataclass
class State:
    """What training changes; all of it is in the checkpoint."""

    model: Model
    teacher: Model  # the EMA: teacher during training, evaluation weights afterwards
    optimizer: torch.optim.Optimizer
    step: int = 0  # updates done


def start(cfg: TrainingConfig, collect: Path) -> tuple[Dataset, torch.device]:
    """Threads, seed, device and data of a training script. The default data set, where absent, is collected first by
    the script `collect`."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)  # of the initial weights
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    if cfg.data == TrainingConfig.data and not Path(cfg.data, "meta", "info.json").exists():
        print(f"No data set at {cfg.data} yet: collecting the default one ({collect.name}).", flush=True)
        subprocess.run([sys.executable, str(collect)], check=True)
    return open_dataset(cfg.data), device


def schedule(cfg: TrainingConfig) -> TrainConfig:
    return TrainConfig(
        steps=cfg.steps, lr=cfg.lr, weight_decay=cfg.weight_decay, warmup=cfg.warmup, cooldown=cfg.cooldown,
        ema=cfg.ema, seed=cfg.seed,
    )  # fmt: skip


def levels(cfg: TrainingConfig) -> TimestepDistribution:
    return TimestepDistribution(cfg.levels, cfg.shift, cfg.low_snr)


def identity(cfg: TrainingConfig, dataset: Dataset) -> dict:
    """The settings that make a run what it is: all but where, how long and how often it reports."""
    free = {"name", "data", "steps", "save_every", "validate_every", "threads", "device", "wandb"}
    return {k: v for k, v in asdict(cfg).items() if k not in free} | {"data_hash": dataset.hash}


def new_state(model: Model, config: TrainConfig) -> State:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    return State(model, deepcopy(model).eval().requires_grad_(False), optimizer)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, constant, cool-down. More steps than before leave the past as it was, up to the cool-down."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (config.steps - step) / max(1.0, config.cooldown * config.steps))
    return config.lr * min(rise, max(fall, 0.0))


def train(
    state: State, batches: Iterable[dict], loss_fn: LossFunction, config: TrainConfig
) -> Iterator[tuple[int, dict[str, float]]]:
    """Updates `state` in place from `state.step` to `config.steps`; yields (updates done, metrics) after each.

    `batches` starts at batch `state.step`. Raises FloatingPointError when the loss is not finite.
    """
    device = next(state.model.parameters()).device
    batches = iter(batches)
    while state.step < config.steps:
        begin = time.perf_counter()
        batch = next(batches)
        with precision(device):
            loss, terms = loss_fn(state.model, state.teacher, batch, generator(config.seed, state.step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {state.step}: lower the learning rate")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        update_ema(state.teacher, state.model, ema_decay(state.step, config.ema))
        metrics = {name: term.item() for name, term in terms.items()} | {"grad_norm": norm.item()}
        seconds = time.perf_counter() - begin
        yield state.step, metrics | {"step_s": seconds, "samples_s": len(batch["video"]) / seconds}


def tensors(state: State, packer: Packer) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name."""
    collected = checkpoint.collect("model", state.model) | checkpoint.collect("ema", state.teacher)
    collected |= checkpoint.collect("packer", packer)
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            collected[f"optimizer.{key}.{name}"] = value
    return collected


def restore(state: State, packer: Packer, tensors: dict[str, Tensor], step: int, where: str | Path) -> None:
    """Inverse of `tensors`, in place."""
    checkpoint.restore(state.model, tensors, "model", where)
    checkpoint.restore(state.teacher, tensors, "ema", where)
    checkpoint.restore(packer, tensors, "packer", where)
    for name, parameter in state.model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                state.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    state.step = step


def fit(
    run: Path,
    state: State,
    packer: Packer,
    config: TrainConfig,
    manifest: dict,
    batches: Callable[[int], Iterable[dict]],
    loss_fn: LossFunction,
    validate: Callable[[Model], dict[str, float]],
    save_every: int,
    validate_every: int,
    wandb_mode: str = "disabled",
) -> None:
    """Trains run folder `run` to its end, or continues it: loop, metrics.jsonl, config.json, checkpoints.

    manifest: {"kind", "method", "identity": settings that must not change between parts of a run, "config"}. Raises
    CheckpointError when the folder holds a run with another identity.
    """
    folder = run / "checkpoint"
    if checkpoint.saved(folder):
        saved_tensors, found = checkpoint.load(folder)
        checkpoint.require_same(found["identity"], manifest["identity"], folder)
        restore(state, packer, saved_tensors, found["step"], folder)
        print(f"{run}: continuing after step {state.step} of {config.steps}", flush=True)
    keep_metrics(run / "metrics.jsonl", state.step)
    write_atomic(run / "config.json", json.dumps(manifest["config"], indent=1).encode())

    def save():
        checkpoint.save(folder, state.step, tensors(state, packer), manifest | checkpoint.describe(state.model, packer))

    with Reporter(run, config.steps, state.step, wandb_mode) as report:
        for step, metrics in train(state, batches(state.step), loss_fn, config):
            if step % validate_every == 0 or step == config.steps:
                with precision(next(state.teacher.parameters()).device):
                    metrics |= validate(state.teacher)
            report(step, metrics)
            if step % save_every == 0 or step == config.steps:
                report.flush()
                save()


def keep_metrics(path: Path, step: int) -> None:
    """Drops lines after `step` and a half-written last one: they are about to be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_atomic(path, "".join(kept).encode())


class Reporter:
    """metrics.jsonl, a progress bar (log lines where there is no terminal) and, when asked for, wandb."""

    def __init__(self, run: Path, steps: int, start: int, wandb_mode: str):
        run.mkdir(parents=True, exist_ok=True)
        self.file = open(run / "metrics.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
        self.name, self.steps, self.shown = run.name, steps, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), disable=not sys.stdout.isatty())
        self.task = self.progress.add_task(run.name, total=steps, completed=start, note="")
        self.wandb = None
        if wandb_mode != "disabled":
            import wandb

            self.wandb = wandb.init(mode=wandb_mode, dir=run, project="selfflow_robot", name=run.name, id=run.name)

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        shown = {k: v for k, v in metrics.items() if k.startswith(("loss", "cosine", "validation/action", "step_s"))}
        note = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        self.progress.update(self.task, completed=step, note=note)
        if self.progress.disable and (time.monotonic() - self.shown > 15 or step == self.steps):
            self.shown = time.monotonic()
            self.flush()
            print(f"{self.name} {step}/{self.steps}  {note}", flush=True)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def flush(self) -> None:
        self.file.flush()
