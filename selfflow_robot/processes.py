"""Many processes, one batch: each computes an equal part, and together they take the step that one would take alone.

- Windows: process k of n takes the k-th of n equal parts of every batch (`Processes.part`).
- Random numbers: drawn for the whole batch, of which every process keeps its part (`selfflow.draw`).
- Loss: a mean over counted tokens, of which the parts have different numbers; `part_loss` weighs them so that the mean
  over the parts is the loss of the whole batch. The same holds for the parts of a batch that one process computes one
  after another (`micro_batch`).
- Gradients: DDP, where every process has all weights, or FSDP2, where weights, EMA and optimiser are spread.

Started by torchrun, SLURM or `accelerate launch`; accelerate reads what they say in the environment.
"""

import atexit
import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfflow_robot import selfflow
from selfflow_robot.flow import generator
from selfflow_robot.model import Model
from selfflow_robot.selfflow import SelfFlowConfig
from selfflow_robot.tokens import GENERATED, Tokens

SHARDING = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """Those that train together, and which of them this one is."""

    index: int = 0
    count: int = 1
    sharding: str = "ddp"
    accelerator: object = None  # accelerate.Accelerator where there are several

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def part(self, windows) -> "Part":
        """Windows of which `gather` returns this process's part."""
        return Part(windows, self.index, self.count)

    def sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.count > 1 else values

    def wait(self) -> None:
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A possibly spread tensor, complete and on the CPU of the main process; None elsewhere. All must call it."""
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().cpu() if self.main else None

    def wrap(self, model: Model, teacher: Model) -> nn.Module:
        """Spreads both where asked to, in place -> the loss as one module: (loss_fn, teacher, batch, generator) ->
        what loss_fn(model, teacher, batch, generator) returns, with gradients averaged over the processes."""
        loss = LossOf(model)
        if self.count == 1:
            return loss
        if self.sharding == "fsdp":
            _spread(teacher, teacher, self.count)
            _spread(loss, model, self.count)
            return loss
        return self.accelerator.prepare_model(loss)

    def accumulate(self, wrapped: nn.Module, last: bool):
        """Context of one forward and backward pass: gradients travel only after the last of a step."""
        if self.count > 1 and self.sharding == "fsdp":
            wrapped.set_requires_gradient_sync(last)
        elif self.count > 1 and not last:
            return wrapped.no_sync()
        return contextlib.nullcontext()


ALONE = Processes()


def join(device: str = "auto", sharding: str = "ddp") -> Processes:
    """This process's place among those the launcher started; alone where there was no launcher. Raises ValueError on an
    unknown sharding."""
    if sharding not in SHARDING:
        raise ValueError(f"sharding {sharding!r}: choose one of {', '.join(SHARDING)}")
    return replace(_join(device), sharding=sharding)


@functools.cache
def _join(device: str) -> Processes:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise ValueError("several processes need accelerate: pip install accelerate") from error
    # A mode uses some of the network: without text, without actions. The gradients of the rest stay absent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator=accelerator)


@dataclass(frozen=True)
class Part:
    """The k-th of n equal parts of every batch; otherwise as the windows themselves."""

    windows: object
    index: int
    count: int

    def __len__(self) -> int:
        return len(self.windows)

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict:
        size, rest = divmod(len(indices), self.count)
        if rest:
            raise ValueError(f"batch_size {len(indices)} cannot be divided among {self.count} processes")
        return self.windows.gather(indices[self.index * size : (self.index + 1) * size])


class LossOf(nn.Module):
    """DDP and FSDP2 act around one forward pass; the loss calls the network several times, so it is that pass."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable, teacher: Model, batch: dict, generator: torch.Generator):
        return loss_fn(self.model, teacher, batch, generator)


def _spread(root: nn.Module, model: Model, count: int) -> None:
    """FSDP2: a block's weights come together when it computes, the rest when `root` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Blocks return keys and values as views; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "keys")
    # Together until the backward pass. A teacher has none: `update_ema` parts its weights. Its methods call each other.
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    if root is model:
        for method in ("features", "prefix_cache"):
            register_fsdp_forward_method(model, method)


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """A complete tensor -> on the device of `like`, and spread as it is."""
    if not hasattr(like, "device_mesh"):
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`selfflow.update_ema`, of the weights that this process has."""
    if hasattr(teacher, "reshard"):
        teacher.reshard()  # what was put together is about to be out of date
    selfflow.update_ema(_Local(teacher), _Local(student), decay)


class _Local:
    def __init__(self, module: nn.Module):
        self.module = module

    def parameters(self):
        return (getattr(p, "to_local", lambda p=p: p)() for p in self.module.parameters())


class Share(torch.Generator):
    """The random numbers of one step, and which part of the batch they are needed for. Scalars drawn from it are the
    same in all processes and parts."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, processes: Processes, passes: int, seed: int, step: int):
        """passes: parts of a process's part, one after another."""
        self.processes, self.passes, self.key = processes, passes, (seed, step)
        # Of the process's whole part, once for all passes (`part_loss`).
        self.tokens: Tokens | None = None
        self.target: Tensor | None = None
        self.counted: dict[str, Tensor] = {}
        self.begin(0)

    def begin(self, number: int) -> "Share":
        """Pass `number`: the same random numbers from the start."""
        self.set_state(generator(*self.key).get_state())
        self.number = number
        return self

    @property
    def part(self) -> tuple[int, int]:
        """(k, n): the k-th of n parts of the batch."""
        return self.processes.index * self.passes + self.number, self.processes.count * self.passes


def part_loss(
    student: Model,
    teacher: Model | None,
    pack: Callable[[], Tokens],
    config: SelfFlowConfig,
    generator: torch.Generator,
    target: Callable[[], Tensor | None] = lambda: None,
    known: Model | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`selfflow.loss` of this part of the batch, scaled so that the mean over all parts is the whole batch's.

    pack returns the tokens of the process's windows, target what an encoder says of them; known: as in `selfflow.loss`.
    With a generator that is not a `Share`, plainly the loss.
    """
    if not isinstance(generator, Share) or generator.part[1] == 1:
        return selfflow.loss(student, teacher, pack(), config, generator, target(), known=known)
    if generator.tokens is None:
        generator.tokens = pack()
        generator.target = target()
        generator.counted = _counted(generator.tokens, generator.processes)
    here = slice_rows(generator.tokens, generator.number, generator.passes)
    shares = {}
    for kind, total in generator.counted.items():
        counted = here.weight[:, here.rows(kind, GENERATED)].sum()
        shares[kind] = counted * generator.part[1] / total.clamp_min(1)  # 1 on average over the parts
    weights = {f"{kind}_weight": getattr(config, f"{kind}_weight") * share for kind, share in shares.items()}
    aim = generator.target
    aim = None if aim is None else aim.chunk(generator.passes)[generator.number]
    config = replace(config, **weights)
    total, terms = selfflow.loss(student, teacher, here, config, generator, aim, generator.part, known)
    scaled = {f"loss_{kind}": terms[f"loss_{kind}"] * share for kind, share in shares.items()}
    return total, terms | scaled


def _counted(tokens: Tokens, processes: Processes) -> dict[str, Tensor]:
    """Tokens of the whole batch that count in the loss, by kind; only kinds that are generated."""
    kinds = [kind for kind in ("video", "action") if tokens.rows(kind, GENERATED).stop]
    counts = torch.stack([tokens.weight[:, tokens.rows(kind, GENERATED)].sum() for kind in kinds])
    return dict(zip(kinds, processes.sum(counts)))


def slice_rows(tokens: Tokens, number: int, parts: int) -> Tokens:
    """Part `number` of `parts` equal ones along the batch."""
    B, size = len(tokens.x), len(tokens.x) // parts
    rows = slice(number * size, (number + 1) * size)
    values = {f.name: getattr(tokens, f.name) for f in fields(tokens) if f.name != "ids"}
    return replace(
        tokens, **{name: v[rows] for name, v in values.items() if isinstance(v, Tensor) and len(v) == B and v.ndim > 1}
    )
