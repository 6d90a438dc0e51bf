"""The one training loop, a generator. Pretraining and fine-tuning differ in data and loss, not in code.

All randomness of step k is a function of (seed, k): a run that was killed and started again gives the same bits as one
that was not, and several processes take the steps that one would take alone (`processes`).
"""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from selfflow_robot import checkpoint, selfflow
from selfflow_robot.checkpoint import write_atomic
from selfflow_robot.config import TrainingConfig
from selfflow_robot.data import Dataset, encode_video, open_dataset
from selfflow_robot.flow import TimestepDistribution
from selfflow_robot.model import Model, precision
from selfflow_robot.muon import make_muon
from selfflow_robot.processes import ALONE, Processes, Share, join, scatter, update_ema
from selfflow_robot.selfflow import SelfFlowConfig, ema_decay
from selfflow_robot.tokens import Packer

KEEP_NONFINITE = 3  # batches; a run that skips more has shown enough
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
    micro_batch: int = 0  # windows per forward pass of a process; 0: all of its part
    nonfinite: str = "stop"  # or "skip" the step; either way its batch is kept for inspection
    optimizer: str = "adamw"  # or "muon" for the blocks' matrices, AdamW for the rest

    def __post_init__(self):
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite {self.nonfinite!r}: choose stop or skip")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer {self.optimizer!r}: choose adamw or muon")


@dataclass
class State:
    """What training changes; all of it is in the checkpoint."""

    model: Model
    teacher: Model  # the EMA: teacher during training, evaluation weights afterwards
    optimizers: tuple[torch.optim.Optimizer, ...]  # of disjoint weights
    loss: torch.nn.Module  # of `model`, in all processes (`Processes.wrap`)
    processes: Processes = ALONE
    step: int = 0  # updates done, or skipped
    skipped: int = 0


def start(cfg: TrainingConfig, collect: Path) -> tuple[Dataset, torch.device, Processes]:
    """Threads, seed, device, data and processes of a training script. The default data set, where absent, is collected
    first by the script `collect`."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)  # of the initial weights
    processes = join(cfg.device, cfg.sharding)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    device = processes.accelerator.device if processes.accelerator else device
    if cfg.data == TrainingConfig.data and not Path(cfg.data, "meta", "info.json").exists() and processes.main:
        print(f"No data set at {cfg.data} yet: collecting the default one ({collect.name}).", flush=True)
        if subprocess.run([sys.executable, str(collect)], check=False).returncode:
            raise ValueError(f"{cfg.data} could not be collected, as said above; the same command goes on with it")
    processes.wait()
    return open_dataset(cfg.data), device, processes


def schedule(cfg: TrainingConfig) -> TrainConfig:
    return TrainConfig(
        steps=cfg.steps, lr=cfg.lr, weight_decay=cfg.weight_decay, warmup=cfg.warmup, cooldown=cfg.cooldown,
        ema=cfg.ema, seed=cfg.seed, micro_batch=cfg.micro_batch, nonfinite=cfg.nonfinite,
        optimizer=cfg.optimizer,
    )  # fmt: skip


def levels(cfg: TrainingConfig) -> TimestepDistribution:
    return TimestepDistribution(cfg.levels, cfg.shift, cfg.low_snr)


def objective(cfg: TrainingConfig, method: str, **settings) -> SelfFlowConfig:
    """The loss of a training script; settings are those that only it has."""
    return selfflow.objective(
        method, levels=levels(cfg), mask_ratio=cfg.mask_ratio, feature_weight=cfg.feature_weight,
        student_layer=cfg.student_layer, teacher_layer=cfg.teacher_layer, teacher_offset=cfg.teacher_offset,
        apart=cfg.apart, condition_dropout=cfg.condition_dropout, **settings,
    )  # fmt: skip


def identity(cfg: TrainingConfig, dataset: Dataset) -> dict:
    """The settings that make a run what it is: all but where, how long and how often it reports."""
    free = {"name", "data", "steps", "save_every", "validate_every", "sample_every", "threads", "device", "wandb"}
    free |= {"plan", "gpu_hour_price", "activation_checkpointing", "compile"}
    free |= {"micro_batch", "sharding", "nonfinite"}  # how the same steps are computed
    free |= {"grow"}  # what `pretrained` and `model` say already
    return {k: v for k, v in asdict(cfg).items() if k not in free} | {"data_hash": dataset.hash}


def new_state(model: Model, config: TrainConfig, processes: Processes = ALONE) -> State:
    teacher = deepcopy(model).eval().requires_grad_(False)
    loss = processes.wrap(model, teacher)
    return State(model, teacher, make_optimizers(model, config, processes), loss, processes)


def make_optimizers(model: Model, config: TrainConfig, processes: Processes) -> tuple[torch.optim.Optimizer, ...]:
    """Weight decay is of matrices alone. Muon orthogonalises the blocks' matrices' steps and scales them to AdamW's
    size, so that one learning rate serves both."""
    turned = []
    if config.optimizer == "muon":
        if processes.count > 1 and processes.sharding == "fsdp":
            raise ValueError("optimizer muon needs whole matrices, which fsdp spreads: use ddp, or adamw")
        turned = [module.weight for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in turned)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    if not turned:
        return (adamw,)
    return make_muon(turned, config.lr, config.weight_decay), adamw


def begin(cfg: TrainingConfig, model: Model, processes: Processes) -> State:
    """The state of a training script's model before its first step, computed as the settings say."""
    model.activation_checkpointing = cfg.activation_checkpointing
    state = new_state(model, schedule(cfg), processes)
    if cfg.compile:
        compile_blocks(state)
    return state


def compile_blocks(state: State) -> None:
    """Of student and teacher. ValueError where no compiler is found."""
    state.model.compile_blocks()
    state.teacher.compile_blocks()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, constant, cool-down. More steps than before leave the past as it was, up to the cool-down."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (config.steps - step) / max(1.0, config.cooldown * config.steps))
    return config.lr * min(rise, max(fall, 0.0))


def train(
    state: State,
    batches: Iterable[dict],
    loss_fn: LossFunction,
    config: TrainConfig,
    keep: Callable[[int, dict, dict], None] = lambda step, batch, metrics: None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Updates `state` in place from `state.step` to `config.steps`; yields (updates done, metrics) after each.

    `batches` starts at batch `state.step`, this process's part of it. A loss or gradient that is not finite never
    reaches the weights: keep(step, batch, metrics) is called, then FloatingPointError raised or the step skipped.
    """
    batches = ahead(batches)
    while state.step < config.steps:
        watch = Stopwatch()
        batch = next(batches)
        watch.lap("data")
        metrics = gradient(state, batch, loss_fn, config)
        watch.lap("forward_backward")
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if not finite:
            keep(state.step, batch, metrics)
            if config.nonfinite == "stop":
                why = f"{_what(metrics)} at step {state.step}"
                raise FloatingPointError(f"{why}: lower the learning rate. The batch is in nonfinite/ of the run")
            state.skipped += 1
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        watch.lap("optimizer")
        state.step += 1
        if finite:
            update_ema(state.teacher, state.model, ema_decay(state.step, config.ema))
        watch.lap("ema")
        if state.skipped:
            metrics["skipped"] = state.skipped
        windows = state.processes.count * _size(batch)
        yield state.step, metrics | {"step_s": watch.total, "samples_s": windows / watch.total} | watch.laps


def gradient(state: State, batch: dict, loss_fn: LossFunction, config: TrainConfig) -> dict[str, float]:
    """Leaves the gradient of the whole batch's loss, clipped, in `state.model`; its terms, averaged over all parts."""
    device = next(state.model.parameters()).device
    passes, rest = divmod(_size(batch), config.micro_batch or _size(batch))
    if rest or not passes:
        raise ValueError(f"micro_batch {config.micro_batch} does not divide a process's {_size(batch)} windows")
    share = Share(state.processes, passes, config.seed, state.step)
    sums: dict[str, Tensor] = {}
    for number in range(passes):
        with state.processes.accumulate(state.loss, last=number == passes - 1):
            with precision(device):
                loss, terms = state.loss(loss_fn, state.teacher, batch, share.begin(number))
            (loss / passes).backward()
        for name, value in (terms | {"loss": loss.detach()}).items():
            # A diagnostic of tokens that this part has none of is NaN and left out; a loss is never left out.
            there = torch.ones_like(value) if name.startswith("loss") else value.isfinite()
            sums[name] = sums.get(name, 0) + torch.stack([torch.where(there > 0, value, 0), there]).float()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    sums["grad_norm"] = torch.stack([norm.float(), torch.ones_like(norm, dtype=torch.float)])
    total = state.processes.sum(torch.stack([*sums.values()])).tolist()  # one message, one wait for the device
    return {name: value / count if count else math.nan for name, (value, count) in zip(sums, total)}


def ahead(batches: Iterable[dict]) -> Iterator[dict]:
    """The same batches; the next one is read while the last one is learned from."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class Stopwatch:
    """Seconds of the parts of a step, `time/<part>`. On a GPU the optimiser's and the EMA's are those of the launch:
    their work ends within the next step's forward_backward."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}_s"], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return self.last - self.begin


def _size(batch: dict) -> int:
    return len(next(iter(batch.values())))


def _what(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} is {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics[name]))


def tensors(state: State, packer: Packer) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name, complete: in the main process; empty in the others, which must call it
    too."""
    collected = checkpoint.collect("model", state.model) | checkpoint.collect("ema", state.teacher)
    collected |= checkpoint.collect("packer", packer)
    for name, parameter in state.model.named_parameters():
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                collected[f"optimizer.{key}.{name}"] = value
    whole = {name: state.processes.whole(value) for name, value in collected.items()}
    return whole if state.processes.main else {}


def restore(state: State, packer: Packer, tensors: dict[str, Tensor], step: int, where: str | Path) -> None:
    """Inverse of `tensors`, in place, in any number of processes."""
    checkpoint.restore(state.model, tensors, "model", where)
    checkpoint.restore(state.teacher, tensors, "ema", where)
    checkpoint.restore(packer, tensors, "packer", where)
    owner = {
        p: optimizer for optimizer in state.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in state.model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                whole = value.to(parameter.device, copy=True)
                kept = whole if key == "step" else scatter(value, parameter.detach())
                owner[parameter].state[parameter][key] = kept
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
    sample: Callable[[Model], np.ndarray | None] | None = None,
    sample_every: int = 0,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    prepare: Callable[[Model], None] = lambda averaged: None,
) -> None:
    """Trains run folder `run` to its end, or continues it: loop, metrics.jsonl, config.json, checkpoints, samples.

    manifest: {"kind", "method", "identity": settings that must not change between parts of a run, "config"}. sample
    returns a video uint8 (T, H, W, 3). flops_per_step of the whole batch and peak_flops of one process's device: logs
    their ratio as `mfu`. prepare(averaged weights) comes before they are measured or saved.

    Raises CheckpointError when the folder holds a run with another identity, and KeyboardInterrupt, the step saved,
    when it was asked to stop (`stoppable`).
    """
    folder, processes = run / "checkpoint", state.processes
    if checkpoint.saved(folder):
        saved_tensors, found = checkpoint.load(folder)
        checkpoint.require_same(found["identity"], manifest["identity"], folder)
        restore(state, packer, saved_tensors, found["step"], folder)
        state.skipped = found.get("skipped", 0)
        del saved_tensors
        if processes.main:
            print(f"{run}: continuing after step {state.step} of {config.steps}", flush=True)
    processes.wait()  # before anyone writes
    if processes.main:
        checkpoint.sweep(run)
        keep_metrics(run / "metrics.jsonl", state.step)
        write_atomic(run / "config.json", json.dumps(manifest["config"], indent=1).encode())

    def save():
        described = manifest | checkpoint.describe(state.model, packer)
        everything = tensors(state, packer)
        if processes.main:
            progress = {"skipped": state.skipped, "seed": config.seed, "processes": processes.count}
            checkpoint.save(folder, state.step, everything, described | progress)

    def keep(step, batch, metrics):
        if state.skipped < KEEP_NONFINITE:
            part = processes.index, processes.count
            checkpoint.save_batch(run / "nonfinite", step, batch, part, {"seed": config.seed, "metrics": metrics})

    device = next(state.model.parameters()).device
    with Reporter(run, config.steps, state.step, wandb_mode, processes.main) as report, stoppable(processes) as asked:
        for step, metrics in train(state, batches(state.step), loss_fn, config, keep):
            last = step == config.steps
            stop = asked() and not last
            measuring, saving = last or is_due(step, validate_every), last or stop or is_due(step, save_every)
            if measuring or saving:
                prepare(state.teacher)
            if device.type == "cuda":
                metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            if flops_per_step and peak_flops:
                metrics["mfu"] = flops_per_step / (metrics["step_s"] * peak_flops * processes.count)
            if measuring:
                with precision(device):
                    metrics |= validate(state.teacher)
            report(step, metrics)
            if sample and sample_every and (last or is_due(step, sample_every)):
                with precision(device):
                    video = sample(state.teacher)
                report.video(step, video)
            if saving:
                report.flush()
                save()
            if stop:
                raise KeyboardInterrupt


@contextmanager
def stoppable(processes: Processes) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come: the first lets a step end, so that it can be saved, the next does not wait.
    Never where several processes would save at different steps, or outside the main thread."""
    came: list[int] = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)
        with suppress(OSError):  # the same Ctrl-C may have ended who reads it
            print("\nStopping: this step is finished and saved first. Once more: at once.", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    if processes.count > 1 or threading.current_thread() is not threading.main_thread():
        numbers = ()
    found = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if found[number] is not signal.SIG_IGN]  # of a shell's background job it is
    try:
        for number in heeded:
            signal.signal(number, note)
        yield lambda: bool(came)
    finally:
        for number in heeded:
            signal.signal(number, found[number])


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
    """metrics.jsonl, a progress bar (log lines where there is no terminal), sample videos and, when asked for, wandb.
    Silent where `writes` is False."""

    def __init__(self, run: Path, steps: int, start: int, wandb_mode: str, writes: bool = True):
        self.run, self.steps, self.shown, self.writes, self.wandb = run, steps, 0.0, writes, None
        if not writes:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.file = open(run / "metrics.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), disable=not sys.stdout.isatty())
        self.task = self.progress.add_task(run.name, total=steps, completed=start, note="")
        if wandb_mode != "disabled":
            import wandb

            names = {"project": "selfflow_robot", "name": run.name, "id": run.name}
            self.wandb = wandb.init(mode=wandb_mode, dir=run, resume="allow", **names)

    def __enter__(self):
        if self.writes:
            self.progress.start()
        return self

    def __exit__(self, *_):
        if not self.writes:
            return
        self.progress.stop()
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if not self.writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step} | finite) + "\n")
        names = ("loss", "cosine", "validation/action", "step_s", "skipped", "mfu")
        shown = {k: v for k, v in metrics.items() if k.startswith(names)}
        note = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        self.progress.update(self.task, completed=step, note=note)
        if self.progress.disable and (time.monotonic() - self.shown > 15 or step == self.steps):
            self.shown = time.monotonic()
            self.flush()
            with suppress(BrokenPipeError):  # nobody reads any more, which is no reason to stop
                print(f"{self.run.name} {step}/{self.steps}  {note}", flush=True)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def video(self, step: int, frames: np.ndarray | None, fps: int = 3) -> None:
        """samples/step_<step>.mp4 of frames uint8 (T, H, W, 3), H and W even."""
        if not self.writes or frames is None:
            return
        path = self.run / "samples" / f"step_{step:08d}.mp4"
        write_atomic(path, encode_video(frames, fps))
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Video(str(path), format="mp4")}, step=step)

    def flush(self) -> None:
        if self.writes:
            self.file.flush()
