"""How fast things are, as ratios measured in one run.

    python experiments/benchmark.py env                           Open-and-Place: steps/s and where the time goes
    python experiments/benchmark.py env --task all                every task
    python experiments/benchmark.py env --width 640 --height 512  at upstream's resolution
    python experiments/benchmark.py vector --workers 2            several environments against one
    python experiments/benchmark.py memory --resets 1000          resident memory over many resets
    python experiments/benchmark.py train --model small           what Self-Flow, per-token levels and noise draws cost
    python experiments/benchmark.py train --compile               and what torch.compile saves, after a minute of it
    python experiments/benchmark.py train --reference ../Self-Flow   and against the published network
    python experiments/benchmark.py policy --model small          from an observation to its actions, p50 and p95

`train --reference PATH` is a checkout of github.com/black-forest-labs/Self-Flow; its network needs timm. CPU times are
those of the processor, so that other programs do not count.

Each process is held to one core (LP_NUM_THREADS=1 unless set: software Vulkan takes all cores otherwise). Quote a quiet
machine; `--json` prints one object, of `env --task all` a list.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the Vulkan driver loads

import numpy as np
from rich.progress import track

from envs.tasks import TASKS, get_task
from selfflow_robot.config import in_one_line

TARGET = 40.0  # control steps per second and core at 160 x 128, with rendering
UPSTREAM = 11.0  # control steps/s of upstream on 2 cores with its two 640 x 512 cameras (48 without rendering)


def timed(function, repeats: int) -> float:
    """Median milliseconds of one call."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(1000 * (time.perf_counter() - start))
    return statistics.median(samples)


def benchmark_env(task: str, width: int | None, height: int | None, episodes: int) -> dict:
    """The expert acts for `episodes` episodes, to their step limit as in evaluation; every control step is timed."""
    from envs import make_env
    from envs.expert import make_expert

    env = make_env(task, width=width, height=height)
    sim, samples, resets = env.unwrapped, [], []
    for seed in range(episodes):
        start = time.perf_counter()
        env.reset(seed=seed)
        resets.append(time.perf_counter() - start)
        expert, truncated = make_expert(env, np.random.default_rng(seed)), False
        expert.reset()
        while not truncated:
            action, done_subtask = expert.act()
            if done_subtask and not sim.is_final_subtask():
                sim.advance_to_next_subtask()
            start = time.perf_counter()
            _, _, _, truncated, _ = env.step(action)
            samples.append(1000 * (time.perf_counter() - start))
    step = statistics.median(samples)
    controller, still = sim.agent.controller, np.zeros(7)

    def drive():
        controller.set_action(still)
        for _ in range(sim._sim_steps_per_control):
            controller.before_simulation_step()

    parts = {
        "controller": timed(drive, 10),
        "render": timed(sim.render_raw, 20),
        "overlay": timed(lambda: sim.composite(*sim.render_raw()), 20),
        "success and subgoals": timed(sim.evaluate, 10),
    }
    parts["overlay"] -= parts["render"]
    parts["physics and the rest"] = step - sum(parts.values())
    rate = 1000 / statistics.mean(samples)
    result = {
        "task": task,
        "size": [sim.width, sim.height],
        "steps": len(samples),
        "steps_per_second": rate,
        "ratio_to_target": rate / TARGET,
        "ratio_to_upstream": rate / UPSTREAM,
        "step_ms_median": step,
        "split_ms": parts,
        "reset_seconds": statistics.median(resets),
    }
    env.close()
    return result


def benchmark_vector(task: str, workers: int, steps: int) -> dict:
    """Control steps per second of one and of `workers` environments, in processes of their own, same actions."""
    from envs import make_vector_env

    rates = {}
    for count in (1, workers):
        env = make_vector_env(task, count)
        env.reset(seed=list(range(count)))
        actions = np.tile(np.array([0.02, 0, 0, 0, 0, 0.05, 1], np.float32), (count, 1))
        for warm in (True, False):
            start = time.perf_counter()
            for step in range(5 if warm else steps):
                env.step(actions * (1 if step % 2 else -1) + np.eye(7, dtype=np.float32)[-1] * (step % 2 == 0) * 2)
        rates[count] = count * steps / (time.perf_counter() - start)
        env.close()
    efficiency = rates[workers] / (workers * rates[1])
    return {"task": task, "workers": workers, "steps_per_second": rates, "scaling_efficiency": efficiency}


def benchmark_memory(task: str, resets: int) -> dict:
    """Resident memory (MiB) while the scene is built anew over and over."""
    from envs import make_env

    env, samples = make_env(task), {}
    for number in track(range(resets), "resets", console=None, disable=not sys.stderr.isatty()):
        env.reset(seed=number, options={"reconfigure": True})
        if number % max(resets // 20, 1) == 0 or number == resets - 1:
            samples[number] = resident_mib()
    settled = [mib for number, mib in samples.items() if number >= resets // 5]
    return {"task": task, "resets": resets, "mib": samples, "growth_mib": settled[-1] - settled[0]}


def benchmark_train(
    model: str,
    batch_size: int,
    rounds: int,
    device: str,
    reference: Path | None = None,
    data: Path | None = None,
    compiled: bool = False,
) -> dict:
    """Whole training steps of both methods, scalar against per-token levels, fp32 against bf16, with and without
    torch.compile, ours against the published network, interleaved so that all meet the same machine; medians of
    `rounds`, ratios round by round."""
    import torch

    from selfflow_robot import plan
    from selfflow_robot.codec import CodecConfig
    from selfflow_robot.model import Model, computes_bf16, preset
    from selfflow_robot.selfflow import objective
    from selfflow_robot.tokens import Layout, Packer

    torch.manual_seed(0)
    packer = Packer(Layout(future=(4, 8)), CodecConfig()).to(device)
    network, config = Model(preset(model), packer.channels).to(device), preset(model)
    batch = {"video": torch.randint(0, 256, (batch_size, 3, 128, 160, 3), dtype=torch.uint8)}
    steps = {method: training_steps(network, packer, batch, method) for method in ("flow_matching", "self_flow")}
    variants = {f"step {method}": take for method, take in steps.items()}
    if compiled:
        variants |= {f"compiled {m}": training_steps(network, packer, batch, m, compiled=True) for m in steps}
    variants |= level_steps(network, packer.pack(batch, "pretrain"))
    variants |= precision_steps(network, packer.pack(batch, "pretrain"))
    variants |= draw_steps(network, packer, batch_size)
    variants |= muon_steps(network)
    if reference:
        variants |= reference_steps(reference, config, batch_size, device)
    samples = interleaved(variants, rounds, device)
    ratios = {
        "selfflow_step_ratio": ("step self_flow", "step flow_matching"),
        "per_token_ratio": ("per-token levels", "scalar levels"),
        "bf16_speedup": ("fp32", "bf16"),
        "compile_speedup": ("step flow_matching", "compiled flow_matching"),
        "compile_speedup_self_flow": ("step self_flow", "compiled self_flow"),
        "draws_speedup": ("4 draws, each alone", "4 draws"),
        "muon_speedup": ("torch's Muon, one matrix", "our Muon, one matrix"),
        "reference_forward_speedup": ("published forward", "our forward"),
        "reference_step_speedup": ("published step", "our step"),
    }
    measured = {key: spread(samples[a], samples[b]) for key, (a, b) in ratios.items() if {a, b} <= samples.keys()}
    tokens, goals = plan.blank_tokens(packer, "pretrain"), {m: objective(m) for m in steps}
    flops = {m: plan.step_flops(config, packer.channels, tokens, goals[m], batch_size) for m in steps}
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    peak = plan.peak_flops(device)
    result = {
        "model": model,
        "batch_size": batch_size,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": "bf16" if computes_bf16(device) else "fp32",
        **{key: ratio["median"] for key, ratio in measured.items()},
        "spread": measured,
        "selfflow_flops_ratio": flops["self_flow"] / flops["flow_matching"],
        "seconds": seconds,
        "mfu": {m: flops[m] / seconds[f"step {m}"] / peak for m in steps} if peak else None,
    }
    if data:
        result["loader_ratio"] = loader_rate(data, batch_size) * seconds["step self_flow"] / batch_size
    return result


def training_steps(network, packer, batch: dict, method: str, compiled: bool = False) -> Callable[[], None]:
    """One call is one step of `train.train`: pack, loss, backward, clip, optimiser, averaged weights."""
    from copy import deepcopy

    from selfflow_robot import train
    from selfflow_robot.selfflow import loss, objective

    schedule = train.TrainConfig(steps=1_000_000)
    state, goal = train.new_state(deepcopy(network), schedule), objective(method, given_noise=0.2)
    if compiled:
        train.compile_blocks(state)

    def loss_fn(model, teacher, batch, generator):
        return loss(model, teacher, packer.pack(batch, "pretrain"), goal, generator)

    steps = train.train(state, repeat(batch), loss_fn, schedule)
    return lambda: next(steps) and None


def forward_backward(network, function: Callable, fast: bool = True) -> Callable[[], None]:
    """One call: function() -> a tensor, the mean of its squares backwards, gradients dropped. fast: as in training, in
    bf16 where the processor computes in it."""
    from selfflow_robot.model import precision

    device = next(network.parameters()).device

    def take():
        with precision(device) if fast else nullcontext():
            output = function()
        output.float().square().mean().backward()
        network.zero_grad()

    return take


def level_steps(network, tokens) -> dict[str, Callable[[], None]]:
    """Conditioning on one level per sample, and on two of which every token has one."""
    import torch

    from selfflow_robot.model import Levels

    B, N = tokens.x.shape[:2]
    values, index = (
        torch.rand(B, 3, device=tokens.x.device),
        torch.zeros(B, N, dtype=torch.long, device=tokens.x.device),
    )
    several = (torch.rand(B, N, device=tokens.x.device) < 0.1).long()
    several[:, : tokens.prefix] = 2
    shapes = {"scalar levels": values[:, :1].contiguous(), "per-token levels": Levels(values, several)}
    shapes["scalar levels"] = Levels(shapes["scalar levels"], index) if tokens.x.device.type == "cpu" else values[:, :1]
    return {name: forward_backward(network, lambda t=t: network(tokens.x, t, tokens)[0]) for name, t in shapes.items()}


def precision_steps(network, tokens) -> dict[str, Callable[[], None]]:
    """None where there is no bf16 but an emulated one, many times slower, which nothing here uses."""
    import torch

    from selfflow_robot.model import computes_bf16

    if not computes_bf16(tokens.x.device):
        return {}
    t = torch.rand(tokens.x.shape[0], 1, device=tokens.x.device)
    return {
        name: forward_backward(network, lambda: network(tokens.x, t, tokens)[0], fast=name == "bf16")
        for name in ("bf16", "fp32")
    }


def draw_steps(network, packer, batch_size: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of mode policy with four noise draws per window: of one observation, which is computed once,
    and of four copies of it."""
    import torch

    from selfflow_robot import plan
    from selfflow_robot.model import precision
    from selfflow_robot.selfflow import SelfFlowConfig, loss

    def step(tokens, draws):
        goal = SelfFlowConfig(scheduling="single", features="none", draws=draws)

        def take():
            with precision(tokens.x.device):
                total, _ = loss(network, None, tokens, goal, torch.Generator().manual_seed(0))
            total.backward()
            network.zero_grad()

        return take

    together, alone = (plan.blank_tokens(packer, "policy", rows) for rows in (batch_size, 4 * batch_size))
    return {"4 draws": step(together, 4), "4 draws, each alone": step(alone, 1)}


def muon_steps(network) -> dict[str, Callable[[], None]]:
    """A step of torch's Muon, always in bf16, and of the one that training takes; the same where bf16 is fast."""
    import torch

    from selfflow_robot.muon import make_muon

    def step(make):
        matrix = torch.nn.Parameter(network.blocks[0].qkv.weight.detach().clone())
        matrix.grad = torch.randn_like(matrix)
        return make([matrix], lr=1e-3, weight_decay=0.01).step

    return {"torch's Muon, one matrix": step(torch.optim.Muon), "our Muon, one matrix": step(make_muon)}


def reference_steps(folder: Path, config, batch_size: int, device: str) -> dict[str, Callable[[], None]]:
    """Forward, and forward and backward, of both networks: equal width, depth, heads and tokens (16 x 16 of 16
    channels), every token with a level of its own out of two per sample, both at training's precision."""
    import torch

    from selfflow_robot.model import Levels, Model, precision
    from selfflow_robot.tokens import GENERATED, Span, Tokens

    N, C = 256, 16
    published = load_reference(folder).SelfFlowPerTokenDiT(
        input_size=32, patch_size=2, in_channels=4, hidden_size=config.width, depth=config.depth,
        num_heads=config.heads, mlp_ratio=4.0, num_classes=1000, learn_sigma=False,
    ).to(device)  # fmt: skip
    ours = Model(config, {"video": C, "action": 7, "proprio": 10}).to(device)
    x, values = torch.randn(batch_size, N, C, device=device), torch.rand(batch_size, 2, device=device)
    index = (torch.rand(batch_size, N, device=device) < 0.25).long()
    levels, labels = Levels(values, index), torch.zeros(batch_size, dtype=torch.long, device=device)
    ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, 16, 16, 1))).float()
    weight, spans = torch.ones(batch_size, N, device=device), (Span("video", GENERATED, 0, N),)
    tokens = Tokens(x=x, ids=ids, weight=weight, spans=spans, text=None, frames=None)
    calls = {
        "published": (published, lambda: published(x, levels.per_token(), labels)),
        "our": (ours, lambda: ours(x, levels, tokens)[0]),
    }

    def forward(call):
        def take():
            with torch.no_grad(), precision(device):
                call()

        return take

    return {f"{name} forward": forward(call) for name, (_, call) in calls.items()} | {
        f"{name} step": forward_backward(network, call) for name, (network, call) in calls.items()
    }


def load_reference(folder: Path):
    """The module src/model.py of a checkout."""
    path = folder / "src" / "model.py"
    if not path.exists():
        sys.exit(f"error: {path} is not there: --reference needs a checkout of github.com/black-forest-labs/Self-Flow")
    spec = importlib.util.spec_from_file_location("published_self_flow", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"error: the published network needs {error.name}: pip install {error.name}")
    return module


def interleaved(
    variants: dict[str, Callable[[], None]], rounds: int, device: str, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each, in turns, after one that does not count; without `clock` those of the
    processor on a CPU."""
    import torch

    cpu = torch.device(device).type == "cpu"
    clock = clock or (time.process_time if cpu else time.perf_counter)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in track(range(rounds + 1), "rounds", disable=not sys.stderr.isatty()):
        for name, take in variants.items():
            start = clock()
            take()
            if not cpu:
                torch.cuda.synchronize()
            if number:
                samples[name].append(clock() - start)
    return samples


def spread(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratio, round by round."""
    low, median, high = np.percentile(np.array(numerator) / np.array(denominator), [25, 50, 75])
    return {"low": float(low), "median": float(median), "high": float(high)}


def loader_rate(folder: Path, batch_size: int, batches: int = 20) -> float:
    """Windows per second that the data set delivers, decoded."""
    from selfflow_robot import data

    dataset = data.open_dataset(str(folder))
    source = data.batches(data.windows(dataset, (0,), (4, 8), horizon=1), batch_size, seed=0, start=0)
    next(source)
    start = time.perf_counter()
    for _ in range(batches):
        next(source)
    return batches * batch_size / (time.perf_counter() - start)


def benchmark_policy(
    model: str, checkpoint: str | None, steps: int, rounds: int, device: str, compiled: bool = False
) -> dict:
    """Wall-clock milliseconds from one observation to its action chunk, of variants in turns: given tokens cached and
    not, more or fewer sampling steps, more or less imagination; and of the stages of the default one.

    Without a checkpoint: a network of the preset as it is before training, which is as fast.
    cache_speedup: the same tokens, all of them computed in every step, against the default. full_speedup: frames too.
    """
    import torch

    from policies.flow_policy import FlowPolicy
    from selfflow_robot.codec import CodecConfig
    from selfflow_robot.model import Model, preset
    from selfflow_robot.tokens import Layout, Packer

    if checkpoint:
        policy = FlowPolicy.load(checkpoint, steps=steps, compiled=compiled)
    else:
        packer = Packer(Layout(future=(4, 8)), CodecConfig())
        policy = FlowPolicy(Model(preset(model), packer.channels), packer, steps, compiled=compiled)
    policy.device = torch.device(device)
    policy.model.to(device), policy.sampler.to(device), policy.packer.to(device)
    layout, rng = policy.layout, np.random.default_rng(0)
    picture = rng.integers(0, 256, (layout.height, layout.width, 3), dtype=np.uint8)
    now = {"images": {layout.view: picture}, "proprio": np.zeros(10, np.float32), "instruction": "open top drawer"}
    history = [now] * len(layout.past)

    def variant(steps=steps, imagination=0.0, cached=True):
        def take():
            policy.steps, policy.imagination, policy.cached = steps, imagination, cached
            policy.plan(history, (0, 0))

        return take

    variants = {"chunk": variant(), "every token in every step": variant(cached=False)}
    variants |= {f"{n} steps": variant(steps=n) for n in (1, 2, 4, 8, 10) if n != steps}
    variants |= {f"imagination {share}": variant(imagination=share) for share in (0.5, 1.0)}
    variants["frames too, in every step"] = variant(imagination=1.0, cached=False)
    samples = interleaved(variants, rounds, device, time.perf_counter)
    variant()()  # the stages are those of the default
    stages = interleaved(policy_stages(policy, history), rounds, device, time.perf_counter)
    milliseconds = {
        name: {f"p{q}": 1000 * float(np.percentile(times, q)) for q in (50, 95)}
        for name, times in (samples | {f"stage: {name}": times for name, times in stages.items()}).items()
    }
    ratios = {"cache_speedup": "every token in every step", "full_speedup": "frames too, in every step"}
    ratios = {name: spread(samples[slow], samples["chunk"]) for name, slow in ratios.items()}
    return {
        "model": checkpoint or model,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "sample_steps": steps,
        "rounds": rounds,
        "compiled": compiled,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "chunk_ms_p50": milliseconds["chunk"]["p50"],
        "chunk_ms_p95": milliseconds["chunk"]["p95"],
        **{name: ratio["median"] for name, ratio in ratios.items()},
        "spread": ratios,
        "actions": layout.horizon,
        "milliseconds": milliseconds,
    }


def policy_stages(policy, history: list) -> dict[str, Callable[[], None]]:
    """What a chunk consists of, each by itself."""
    import torch

    from policies.flow_policy import observed
    from selfflow_robot.flow import generator
    from selfflow_robot.model import precision
    from selfflow_robot.tokens import generate

    model, packer = policy.sampler, policy.packer
    batch = observed([history], policy.layout.view)
    tokens = packer.pack(batch, "policy")
    zeros = torch.zeros_like(tokens.x[..., 0])

    def computed(function):
        def take():
            with torch.no_grad(), precision(policy.device):
                return function()

        return take

    cache = computed(lambda: model.prefix_cache(tokens.x, zeros, tokens))()
    return {
        "pack": computed(lambda: packer.pack(batch, "policy")),
        "given tokens": computed(lambda: model.prefix_cache(tokens.x, zeros, tokens)),
        "one sampling step": computed(lambda: model(tokens.x, zeros, tokens, cache=cache)),
        "all of the sampler": computed(lambda: generate(model, tokens, policy.steps, generator(0))),
        "unpack": computed(lambda: packer.actions(tokens, tokens.x).cpu()),
    }


def policy_lines(result: dict) -> list[str]:
    """Of `benchmark_policy`, for people."""
    compiled = ", compiled" if result["compiled"] else ""
    text = [f"{result['model']}, {result['parameters'] / 1e6:.1f} M parameters, {result['device']}{compiled}: ms"]
    text += [f"{name:28} p50 {ms['p50']:8.2f}   p95 {ms['p95']:8.2f}" for name, ms in result["milliseconds"].items()]
    text.append(
        f"chunk of {result['actions']} actions, p95 {result['chunk_ms_p95']:.1f} ms (target 150 on 2 CPU cores)"
    )
    for name, target in (("cache_speedup", "target at least 5, "), ("full_speedup", "")):
        quartiles = result["spread"][name]
        between = f"{target}quartiles {quartiles['low']:.2f} to {quartiles['high']:.2f}"
        text.append(f"{name} {result[name]:.2f} ({between})")
    return text


def lines(result: dict) -> list[str]:
    """Of `benchmark_train`, for people."""
    limits = {"selfflow_step_ratio": "at most 1.27", "per_token_ratio": "at most 1.05", "bf16_speedup": "2 with AMX"}
    limits |= {
        "compile_speedup": "above 1",
        "compile_speedup_self_flow": "above 1",
        "draws_speedup": "above 1",
        "muon_speedup": "1 with bf16 units, above 1 without",
        "reference_forward_speedup": "1.3",
        "reference_step_speedup": "1.3",
        "loader_ratio": "at least 2",
    }
    text = [f"{result['model']}, {result['batch_size']} windows, {result['device']}, {result['precision']}"]
    text += [f"{name:24} {1000 * seconds:9.1f} ms" for name, seconds in result["seconds"].items()]
    for key, limit in limits.items():
        if key in result:
            quartiles = result["spread"].get(key)
            between = f", quartiles {quartiles['low']:.3f} to {quartiles['high']:.3f}" if quartiles else ""
            text.append(f"{key:26} {result[key]:.3f} (target {limit}{between})")
    text.append(f"{'selfflow_flops_ratio':26} {result['selfflow_flops_ratio']:.3f}: by arithmetic, projector included")
    for method, share in (result["mfu"] or {}).items():
        text.append(f"{'model FLOPs utilisation':26} {share:.0%} ({method})")
    return text


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["env", "vector", "memory", "train", "policy"])
    parser.add_argument("--task", default="open_and_place", help="a task, or all (env)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="control steps measured (vector)")
    parser.add_argument("--resets", type=int, default=200)
    parser.add_argument("--model", default="small", help="preset (train, policy)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per step (train)")
    parser.add_argument("--rounds", type=int, default=15, help="of all variants in turn (train, policy)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: torch's choice (train), one (policy)")
    parser.add_argument(
        "--device", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one (train, policy)"
    )
    parser.add_argument("--checkpoint", help="a run instead of an untrained preset (policy)")
    parser.add_argument("--sample_steps", type=int, default=4, help="of the flow sampler (policy)")
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile: a minute or more first (train, policy)"
    )
    parser.add_argument("--reference", type=Path, help="checkout of the published Self-Flow (train)")
    parser.add_argument("--data", type=Path, help="a data set, to time the loader too (train)")
    parser.add_argument("--json", action="store_true", help="print one object instead of lines")
    arguments = parser.parse_args()
    with in_one_line():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """What was asked for, printed. Raises ValueError for a task or checkpoint that does not exist."""
    if arguments.what in ("train", "policy"):
        import torch

        threads = arguments.threads or (1 if arguments.what == "policy" else 0)  # one observation is little work
        if threads:
            torch.set_num_threads(threads)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        a = arguments
        if arguments.what == "train":
            result = benchmark_train(a.model, a.batch_size, a.rounds, device, a.reference, a.data, a.compile)
            text = lines(result)
        else:
            result = benchmark_policy(a.model, a.checkpoint, a.sample_steps, a.rounds, device, a.compile)
            text = policy_lines(result)
    elif arguments.what == "vector":
        result = benchmark_vector(arguments.task, arguments.workers, arguments.steps)
        text = [f"{n} environments: {rate:.1f} control steps/s" for n, rate in result["steps_per_second"].items()]
        text.append(f"scaling efficiency {result['scaling_efficiency']:.2f}")
    elif arguments.what == "memory":
        result = benchmark_memory(arguments.task, arguments.resets)
        text = [f"after {number:5} resets {mib:6.0f} MiB" for number, mib in result["mib"].items()]
        text.append(f"growth over the last four fifths: {result['growth_mib']:.1f} MiB")
    else:
        names = [task.short for task in TASKS] if arguments.task == "all" else [get_task(arguments.task).short]
        results, text = [], []
        for name in names:
            r = benchmark_env(name, arguments.width, arguments.height, arguments.episodes)
            results.append(r)
            split = ", ".join(f"{part} {ms:.1f}" for part, ms in r["split_ms"].items())
            line = (
                f"{name:30} {r['size'][0]}x{r['size'][1]}: {r['steps_per_second']:5.1f} control steps/s, "
                f"{r['ratio_to_target']:.2f} of the target {TARGET:.0f}, {r['ratio_to_upstream']:.1f} times upstream; "
                f"reset {r['reset_seconds']:.2f} s; ms: {split}"
            )
            text.append(line)
            if not arguments.json:
                print(line, flush=True)
        result, text = (results if arguments.task == "all" else results[0]), []
    if arguments.json:
        print(json.dumps(result))
    elif text:
        print("\n".join(text))


if __name__ == "__main__":
    main()
