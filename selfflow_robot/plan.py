"""What a run needs before it starts: parameters, FLOPs, memory, time, cost. Nothing here allocates a network.

FLOPs count matrix products and convolutions, 2 per multiply-accumulate, as `torch.utils.flop_counter` does; they are
the model's, so recomputation (checkpointing, fused attention) is not in them. A backward pass has one product for the
weight and one for the input, the latter only where the input has a gradient.

B windows, N tokens, P of them given (the prefix), M = N - P, K distinct levels per sample, D width.
"""

import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_DIM
from selfflow_robot.model import BYTE_DIM, FREQUENCIES, LEVEL_DIM, Model, ModelConfig, precision
from selfflow_robot.selfflow import SelfFlowConfig
from selfflow_robot.tokens import BYTES_PER_TOKEN, GENERATED, GIVEN, HIDDEN, KINDS, Packer, Tokens

# Dense bf16, from the makers' data sheets; a device's name holds the key.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "L40S": 362e12}
UTILISATION = 0.4  # of the peak, assumed of a GPU; a CPU's peak is measured, so it reaches about as much
SAVED = 36  # values per token, block and unit of width that a backward pass needs, in bf16 (test_plan measures them)
CHANNELS = {"video": 216, "action": ACTION_DIM, "proprio": PROPRIO_DIM}  # of the default codec


def parameters(config: ModelConfig, channels: dict[str, int] | None = None) -> int:
    with torch.device("meta"):
        model = Model(config, channels or CHANNELS)
    return sum(p.numel() for p in model.parameters())


def blank_tokens(packer: Packer, mode: str, windows: int = 1) -> Tokens:
    """Windows of zeros, packed: what matters here is their shape."""
    layout, frames = packer.layout, len(packer.layout.past + packer.layout.future)
    batch = {
        "video": torch.zeros(windows, frames, layout.height, layout.width, 3, dtype=torch.uint8),
        "proprio": torch.zeros(windows, PROPRIO_DIM),
        "action": torch.zeros(windows, layout.horizon, ACTION_DIM),
        "executed": torch.zeros(windows, layout.horizon, ACTION_DIM),
        "instruction": [""] * windows,
    }
    return packer.pack(batch, mode)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass over one window."""

    inner: float = 0.0  # products whose two factors both have a gradient
    leaf: float = 0.0  # products of data with a weight

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.inner + other.inner, self.leaf + other.leaf)

    @property
    def forward(self) -> float:  # FLOPs
        return 2 * (self.inner + self.leaf)

    @property
    def training(self) -> float:  # FLOPs of the forward and the backward pass
        return 2 * (3 * self.inner + 2 * self.leaf)


def step_flops(
    config: ModelConfig, channels: dict[str, int], tokens: Tokens, objective: SelfFlowConfig, batch: int,
    known: ModelConfig | None = None,
) -> float:  # fmt: skip
    """Of one training step on `batch` windows shaped like `tokens`; known: what `selfflow.loss` calls so. An external
    encoder's are not counted."""
    D, M = config.width, tokens.x.shape[1] - tokens.prefix
    student, teacher = (distinct_levels(tokens, objective, of_teacher) for of_teacher in (False, True))
    _, teacher_layer = objective.layers(config.depth)
    rows = batch * objective.draws  # the prefix is shared by the draws of a window
    positions = Macs(leaf=tokens.x.shape[1] * len(KINDS) * 2 * FREQUENCIES * D)  # once for the whole batch
    prefix = prefix_macs(config, channels, tokens, config.depth)
    rest = rest_macs(config, channels, tokens, config.depth, student) + heads_macs(config, channels, tokens, student)
    if objective.features in ("teacher", "encoder"):
        rest += Macs(M * 2 * D * (D + (config.feature_width or D)))  # the projector
    total = batch * prefix.training + rows * rest.training + positions.training
    if objective.needs_teacher:
        prefix = prefix_macs(config, channels, tokens, teacher_layer)
        rest = rest_macs(config, channels, tokens, teacher_layer, teacher)
        total += batch * prefix.forward + rows * rest.forward + positions.forward
    if known:
        prefix = prefix_macs(known, channels, tokens, known.depth)
        rest = rest_macs(known, channels, tokens, known.depth, student) + heads_macs(known, channels, tokens, student)
        total += batch * prefix.forward + rows * rest.forward + positions.forward * known.width / D
    return total


def distinct_levels(tokens: Tokens, objective: SelfFlowConfig, of_teacher: bool = False) -> int:
    """K among the tokens that are not given, as `selfflow.loss` lays them out."""
    own, video = objective.action_noise == "own", tokens.rows("video", GENERATED)
    masked = (
        video.stop > video.start or objective.action_noise == "masked"
    )  # whether any token can take the other level
    if objective.scheduling == "per_token" and not of_teacher and masked:
        return tokens.x.shape[1] - tokens.prefix
    single = of_teacher or objective.scheduling == "single" or not masked
    if single and not own and not any(span.role == HIDDEN for span in tokens.spans):
        return 1
    return 6 if own else 4  # t and s, the actions' own, hidden, given


def prefix_macs(config: ModelConfig, channels: dict[str, int], tokens: Tokens, layers: int) -> Macs:
    P, D = tokens.prefix, config.width
    if not P:
        return Macs()
    block = P * _block(D) + 2 * P * P * D
    last = P * 3 * D * D  # keys and values alone
    return _inputs(D, channels, tokens, given=True) + _levels(D, 1) + Macs((layers - 1) * block + last)


def rest_macs(config: ModelConfig, channels: dict[str, int], tokens: Tokens, layers: int, K: int) -> Macs:
    P, D = tokens.prefix, config.width
    M = tokens.x.shape[1] - P
    blocks = layers * (M * _block(D) + 2 * M * (P + M) * D)
    # Shared levels reach the tokens by a product with a one-hot, which has no gradient.
    handed_out = layers * 6 * M * K * D if 1 < K < M else 0
    return _inputs(D, channels, tokens, given=False) + _levels(D, K) + Macs(blocks, handed_out)


def heads_macs(config: ModelConfig, channels: dict[str, int], tokens: Tokens, K: int) -> Macs:
    D, M = config.width, tokens.x.shape[1] - tokens.prefix
    width = channels | {"video": 2 * channels["video"]}  # mean and spread
    outputs = sum((s.stop - s.start) * width[s.kind] * D for s in tokens.spans if s.role != GIVEN)
    return Macs(K * 2 * D * D + outputs, 2 * M * K * D if 1 < K < M else 0)


def _block(D: int) -> int:  # per token, without attention's own two products
    return 4 * D * D + 3 * (D * 8 // 3) * D


def _levels(D: int, K: int) -> Macs:
    return Macs(K * 7 * D * D, K * LEVEL_DIM * D)


def _inputs(D: int, channels: dict[str, int], tokens: Tokens, given: bool) -> Macs:
    """Projections into the width, and the pixel stem of given frames."""
    inner = leaf = 0
    for span in tokens.spans:
        if (span.role == GIVEN) == given:
            n = span.stop - span.start
            inner += n * BYTES_PER_TOKEN * BYTE_DIM * D if span.kind == "text" else 0
            leaf += n * channels[span.kind] * D if span.kind != "text" else 0
            if span.kind == "video" and not given and tokens.frames is not None:
                leaf += tokens.places * channels["video"] * D  # the latest given frame
                actions = tokens.rows("action", GIVEN)
                if (k := actions.stop - actions.start) and tokens.rows("proprio", GIVEN).stop:
                    leaf += k * channels["action"] * D
                    inner += (k + 1) * D * (2 * D + channels["proprio"])
    if given and tokens.frames is not None:
        T, height, width = tokens.frames.shape[1:4]
        widths = (3, D // 8, D // 4, D // 2, D)
        sizes = [T * height * width // 4**i for i in range(1, 5)]  # each layer halves both sides
        convolutions = [9 * a * b * size for a, b, size in zip(widths, widths[1:], sizes)]
        leaf += convolutions[0]
        inner += sum(convolutions[1:]) + sizes[-1] * D * D
    return Macs(inner, leaf)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Weights, gradients, two moments of Adam and the teacher are fp32."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations


def memory(
    config: ModelConfig, channels: dict[str, int], tokens: Tokens, objective: SelfFlowConfig, batch: int,
    checkpointing: bool = False, quadratic: bool = False, known: ModelConfig | None = None,
) -> Memory:  # fmt: skip
    """An estimate, good to about a quarter. quadratic: attention keeps its scores, as on the CPU. known: as in
    `step_flops`."""
    fp32 = 4 * parameters(config, channels)
    beside = 4 * parameters(known, channels) if known else 0
    P, N, D = tokens.prefix, tokens.x.shape[1], config.width
    rows = batch * objective.draws
    per_block = SAVED * D * (batch * P + rows * (N - P))
    if quadratic:
        per_block += 2 * config.heads * (batch * P * P + rows * (N - P) * N)
    inputs = D * (batch * P + rows * (N - P)) * config.depth
    kept = inputs + per_block if checkpointing else config.depth * per_block  # one block at a time is recomputed
    return Memory(fp32 + beside, fp32, 2 * fp32, fp32, 2 * kept)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOPs per second: data sheet of a known GPU, None of an unknown one, measured on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    return _measured_peak() if device.type == "cpu" else None


def _measured_peak(size: int = 1024, repeats: int = 8) -> float:
    """Of a square matrix product in the precision that training uses, the best of some, all threads of torch. Time of
    the processor, so that other programs do not count."""
    a, b, seconds = *torch.ones(2, size, size).unbind(), []
    with torch.no_grad(), precision("cpu"):
        a, b = (a @ b).div(size), (b @ a).div(size)  # in that precision from here on
        for _ in range(repeats):
            start = time.process_time()
            a @ b
            seconds.append(time.process_time() - start)
    return 2 * size**3 * torch.get_num_threads() / max(min(seconds), 1e-9)


def by_mode(packer: Packer, modes: dict[str, float], objective: SelfFlowConfig, draws: int = 1) -> list[tuple]:
    """modes {mode: weight} of a training -> (probability, tokens, objective) of each; `draws` are mode policy's."""
    total = sum(modes.values())
    return [
        (weight / total, blank_tokens(packer, mode), replace(objective, draws=draws if mode == "policy" else 1))
        for mode, weight in modes.items()
        if weight > 0
    ]


def mean_step_flops(
    config: ModelConfig, channels: dict[str, int], modes: list[tuple[float, Tokens, SelfFlowConfig]], batch: int,
    known: ModelConfig | None = None,
) -> float:  # fmt: skip
    """Expected FLOPs of a step; modes from `by_mode`, known as in `step_flops`."""
    return sum(share * step_flops(config, channels, tokens, goal, batch, known) for share, tokens, goal in modes)


def show(
    name: str, config: ModelConfig, channels: dict[str, int], modes: list[tuple[float, Tokens, SelfFlowConfig]],
    batch: int, steps: int, device: torch.device | str, gpu_hour_price: float = 0.0, known: ModelConfig | None = None,
) -> None:  # fmt: skip
    """Prints what a run takes, and how long on this device and on known GPUs; modes from `by_mode`, known as in
    `step_flops`."""
    flops = mean_step_flops(config, channels, modes, batch, known)
    plain = [(share, tokens, replace(goal, scheduling="single", features="none")) for share, tokens, goal in modes]
    ratio = flops / mean_step_flops(config, channels, plain, batch)
    quadratic = torch.device(device).type == "cpu"
    whole, less = (
        max(
            (memory(config, channels, tokens, goal, batch, again, quadratic, known) for _, tokens, goal in modes),
            key=lambda needed: needed.total,
        )
        for again in (False, True)
    )
    lengths = sorted({tokens.x.shape[1] for _, tokens, _ in modes})
    facts = Table(title=f"{name}: {steps} steps of {batch} windows", show_header=False)
    facts.add_row("parameters", f"{parameters(config, channels) / 1e6:,.1f} M")
    facts.add_row("depth, width, heads", f"{config.depth}, {config.width}, {config.heads}")
    facts.add_row("tokens per window", " to ".join(str(n) for n in dict.fromkeys((lengths[0], lengths[-1]))))
    facts.add_row("FLOPs per step", f"{flops:.3g}, {ratio:.2f} times plain flow matching")
    facts.add_row("weights, gradients, Adam, teacher", _gib(whole.total - whole.activations))
    facts.add_row("activations", f"{_gib(whole.activations)}; {_gib(less.activations)} with activation_checkpointing")
    times = Table("device", "bf16 peak, TFLOPS", "assumed of it", "hours", "cost", title="Time on one device")
    own = peak_flops(device)
    peaks = ({f"this {device}": own} if own else {}) | PEAK_FLOPS
    for where, peak in peaks.items():
        hours = steps * flops / (UTILISATION * peak) / 3600
        cost = f"{hours * gpu_hour_price:,.2f}" if gpu_hour_price and where in PEAK_FLOPS else ""
        times.add_row(where, f"{peak / 1e12:.3g}", f"{UTILISATION:.0%}", f"{hours:,.3g}", cost)
    Console().print(facts, times)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
