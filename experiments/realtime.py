"""What real-time chunking buys: a steady clock, smooth borders between chunks, success under latency.

    python experiments/realtime.py --checkpoint runs/finetune_self_flow --json runs/realtime.json
    python experiments/realtime.py --measure success --delay 2 --episodes 20      in the simulator, paired seeds

jitter: recorded pictures against a wall clock at --rates, RTC and the synchronous policy, which pauses to think.
smoothness: commanded actions where one chunk meets the next, on the same recorded observations: RTC, naive switching
(the same chunks at the same moments, not knowing what is on its way) and synchronous chunking. success: episodes of
SIMPLER with the same starts, RTC against naive switching. Pictures go to --out. Timing wants a quiet machine.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from policies.chunking import ChunkedPolicy
from policies.realtime import DeadlineMissed, Holding, RealTimePolicy, ticks
from selfflow_robot import checkpoint
from selfflow_robot.config import in_one_line
from selfflow_robot.data import Dataset, Episode, open_dataset
from selfflow_robot.interfaces import Observation
from selfflow_robot.metrics import paired_comparison

PAUSE = 1.5  # periods between two commands, above which the robot has waited
QUANTITIES = {  # name -> (columns of an action, factor to the unit)
    "translation, mm": (slice(0, 3), 1e3),
    "rotation, degrees": (slice(3, 6), 180 / np.pi),
}
MODES = ("rtc", "naive", "synchronous")
BOOTSTRAPS = 2000
WIDTH = None if sys.stdout.isatty() else 150  # of the tables, characters


# ------------------------------------------------------------------------------------------------------------ jitter


def drive(policy, observations: list[Observation], rate: float, seconds: float) -> dict:
    """Shows recorded observations, over and over, at `rate` Hz -> times (K,) s at which an action was there, act (K,)
    s that each took, missed: steps without one. Step 0, the first chunk, is not counted."""
    policy.reset()
    times, taken, missed = [], [], 0
    for step, _ in ticks(rate, seconds):
        began = time.monotonic()
        try:
            policy.act(observations[step % len(observations)])
        except DeadlineMissed:
            missed += 1
            continue
        if step:
            taken.append(time.monotonic() - began)
            times.append(time.monotonic())
    return {"times": np.array(times), "act": np.array(taken), "missed": missed}


def jitter(times: np.ndarray, rate: float) -> dict:
    """times (K,) s at which the robot got an action -> error_ms (K - 1,): period less the nominal one; pauses: gaps of
    more than PAUSE periods; lost_steps: control steps that passed in them without an action."""
    periods = np.diff(times) * rate
    long = periods[periods > PAUSE]
    return {
        "error_ms": 1e3 * (periods - 1) / rate,
        "pauses": len(long),
        "lost_steps": int(np.rint(long - 1).sum()),
    }


def measure_jitter(planner, observations: list[Observation], rates: list[float], seconds: float, execute: int) -> list:
    """A row per rate and policy; `error_ms` and `act_ms` are there for the histograms."""
    rows = []
    for rate in rates:
        for mode in ("rtc", "synchronous"):
            with RealTimePolicy(planner, rate, execute) as realtime:
                policy = realtime if mode == "rtc" else ChunkedPolicy(planner, execute)
                run = drive(policy, observations, rate, seconds)
                row = {"rate": rate, "mode": mode, "steps": len(run["times"]), "missed": run["missed"]}
                row |= jitter(run["times"], rate) | {"act_ms": 1e3 * run["act"]}
                if mode == "rtc":
                    row |= {"late": realtime.late, "delay": realtime.expected, "chunks": realtime.chunks}
                    row["inference_ms"] = 1e3 * max(realtime.latencies, default=0.0)
                rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------- smoothness


def recorded(data: Dataset, episode: Episode) -> list[Observation]:
    return [
        {
            "images": {data.view: np.asarray(data.frames[now])},
            "proprio": data.proprio[now],
            "instruction": data.instructions[data.task[now]],
        }
        for now in range(episode.start, episode.start + episode.length)
    ]


def make_policy(planner, mode: str, execute: int, delay: int, seed: int = 0):
    """The three ways of going from chunk to chunk, reproducible: no thread and no clock."""
    if mode == "synchronous":
        return ChunkedPolicy(planner, execute, seed)
    return RealTimePolicy(planner, 1.0, execute, seed, delay, committed=mode == "rtc", threaded=False)


def commanded(policy, observations: list[Observation]) -> tuple[np.ndarray, np.ndarray]:
    """actions float32 (T, 7), NaN where there was none; border bool (T,): another chunk than the step before."""
    policy.reset()
    actions, border, chunks = [], [], 1
    for observation in observations:
        try:
            actions.append(policy.act(observation))
        except DeadlineMissed:
            actions.append(np.full(7, np.nan, np.float32))
        if isinstance(policy, ChunkedPolicy):
            border.append(len(policy.queue) == policy.execute - 1)
        else:
            border.append(policy.chunks > chunks)
            chunks = policy.chunks
    return np.array(actions), np.array(border)


def jumps(actions: np.ndarray, border: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """actions (T, 7), border (T,) -> {quantity: {"border", "within": |a_t - a_t-1| at and between borders,
    "second": |a_t - 2 a_t-1 + a_t-2| at borders}}. Between steps without an action there is nothing to compare."""
    found = {}
    for name, (columns, factor) in QUANTITIES.items():
        part = actions[:, columns].astype(np.float64) * factor
        first, second = (np.linalg.norm(np.diff(part, n, axis=0), axis=1) for n in (1, 2))  # at t = n, n + 1, ...
        values = {"border": first[border[1:]], "within": first[~border[1:]], "second": second[border[2:]]}
        found[name] = {kind: value[np.isfinite(value)] for kind, value in values.items()}
    return found


def bootstrap(values: np.ndarray, seed: int = 0, confidence: float = 0.95) -> tuple[float, float, float]:
    """values (E,), one mean per episode -> their mean and its interval, by drawing episodes with replacement."""
    values = np.asarray(values, float)
    drawn = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)


def measure_smoothness(planner, data: Dataset, episodes: list[Episode], execute: int, delay: int) -> list[dict]:
    """A row per quantity and kind: mean, low and high of every mode, and of naive switching less RTC (paired)."""
    means: dict[tuple, list[float]] = {}
    for episode in episodes:
        observations = recorded(data, episode)
        for mode in MODES:
            policy = make_policy(planner, mode, execute, delay)
            for name, kinds in jumps(*commanded(policy, observations)).items():
                for kind, values in kinds.items():
                    means.setdefault((name, kind, mode), []).append(values.mean() if len(values) else np.nan)
    rows = []
    for name in QUANTITIES:
        for kind in ("border", "second", "within"):
            table = np.array([means[name, kind, mode] for mode in MODES])
            table = table[:, np.isfinite(table).all(0)]  # episodes with a border in every mode
            if not table.size:
                raise ValueError("smoothness: no episode is long enough to have a border between chunks")
            row = {"quantity": name, "kind": kind, "episodes": table.shape[1]}
            row |= {mode: bootstrap(values) for mode, values in zip(MODES, table)}
            rows.append(row | {"naive_minus_rtc": bootstrap(table[1] - table[0])})
    return rows


# ----------------------------------------------------------------------------------------------------------- success


def measure_success(planner, task: str, seeds: list[int], execute: int, delay: int) -> dict:
    """Success at the last step of the same episodes, RTC and naive switching at the same delay."""
    from envs import make_env
    from envs.rollout import rollout

    layout = planner.layout
    env, outcomes = make_env(task, width=layout.width, height=layout.height), {"rtc": [], "naive": []}
    for seed in seeds:
        for mode, done in outcomes.items():
            done.append(rollout(env, Holding(make_policy(planner, mode, execute, delay)), seed).success_final)
        print(f"seed {seed}: " + ", ".join(f"{mode} {sum(done)}/{len(done)}" for mode, done in outcomes.items()))
    env.close()
    paired = paired_comparison(outcomes["rtc"], outcomes["naive"])
    return {"task": task, "seeds": seeds, "delay": delay, **outcomes, "paired": asdict(paired)}


# ------------------------------------------------------------------------------------------------------------ output


def show_jitter(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    table = Table("Hz", "policy", "steps", "period error, ms: p95, max", "act, ms: p95, max", "pauses", "steps lost",
                  "missed", "inference, ms", "delay, steps", title="wall clock")  # fmt: skip
    rates = sorted({row["rate"] for row in rows})
    figure, axes = plt.subplots(2, len(rates), figsize=(4 * len(rates), 6), squeeze=False, layout="constrained")
    for row in rows:
        numbers = [f"{row['rate']:g}", row["mode"], str(row["steps"])]
        for name in ("error_ms", "act_ms"):
            values = np.abs(row[name])
            numbers.append(f"{np.quantile(values, 0.95):.2f}, {values.max():.2f}" if len(values) else "")
        rest = (row["pauses"], row["lost_steps"], row["missed"])
        spent = (f"{row['inference_ms']:.0f}", str(row["delay"])) if "delay" in row else ("", "")
        table.add_row(*numbers, *map(str, rest), *spent)
    for column, rate in enumerate(rates):
        for axis, name, title in zip(axes[:, column], ("error_ms", "act_ms"), ("period error", "act() takes")):
            values = {row["mode"]: row[name] for row in rows if row["rate"] == rate}
            bins = np.histogram_bin_edges(np.concatenate(list(values.values())), 40)
            axis.hist(list(values.values()), bins, label=list(values), log=True)
            axis.set(title=f"{rate:g} Hz: {title}", xlabel="ms", ylabel="control steps")
            axis.legend()
    Console(width=WIDTH).print(table)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def show_smoothness(rows: list[dict], path: Path, execute: int, delay: int) -> None:
    import matplotlib.pyplot as plt

    title = f"commanded actions, execute {execute}, delay {delay}: mean per episode, 95% bootstrap over episodes"
    table = Table("", "", *MODES, "naive - rtc", "episodes", title=title)
    words = {"border": "jump at borders", "second": "second difference there", "within": "jump inside chunks"}
    figure, axes = plt.subplots(1, len(QUANTITIES), figsize=(9, 4), layout="constrained")
    for row in rows:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) for name in (*MODES, "naive_minus_rtc")]
        table.add_row(row["quantity"], words[row["kind"]], *cells, str(row["episodes"]))
        axis, kinds = axes[list(QUANTITIES).index(row["quantity"])], list(words)
        for number, mode in enumerate(MODES):
            mean, low, high = row[mode]
            at, label = kinds.index(row["kind"]) + 0.25 * (number - 1), mode if row["kind"] == "border" else None
            axis.bar(at, mean, 0.22, yerr=[[mean - low], [high - mean]], color=f"C{number}", label=label)
        axis.set_xticks(range(len(kinds)), [words[kind] for kind in kinds], fontsize=8)
        axis.set(ylabel=row["quantity"])
        axis.legend()
    Console(width=WIDTH).print(table)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def plain(value):
    """As JSON has it."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or folder (default: the newest fine-tuned run, or the one shipped)")
    parser.add_argument("--measure", nargs="+", choices=("jitter", "smoothness", "success"),
                        default=["jitter", "smoothness"], help="default: jitter smoothness")  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="default %(default)s")
    parser.add_argument("--split", choices=("validation", "all"), default="validation", help="default %(default)s")
    parser.add_argument("--episodes", type=int, default=12, help="recorded, or of the simulator (default %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3, 15, 50], help="jitter, Hz: default 3 15 50")
    parser.add_argument("--seconds", type=float, default=20, help="jitter: per rate and policy (default %(default)g)")
    parser.add_argument("--execute", type=int, default=4, help="actions before the next inference (default 4)")
    parser.add_argument("--delay", type=int, default=2, help="smoothness, success: control steps an inference takes "
                        "(default 2); jitter measures its own")  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch (default 1, on a CPU the fastest; 0: its choice)"
    )
    parser.add_argument("--sample_steps", type=int, default=4, help="of the flow sampler (default %(default)s)")
    parser.add_argument("--task", default="open_and_place", help="success: SIMPLER's (default %(default)s)")
    parser.add_argument("--first_seed", type=int, default=10000, help="success: seeds from here on")
    parser.add_argument("--out", type=Path, default=Path("runs/realtime"), help="pictures (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    with in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from policies.flow_policy import FlowPolicy

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = checkpoint.chosen(arguments.checkpoint)
    planner = FlowPolicy.load(path, steps=arguments.sample_steps)
    execute, delay = arguments.execute, arguments.delay
    results: dict = {"checkpoint": str(path), "sha256": planner.manifest.get("sha256"), "execute": execute}
    results |= {"sample_steps": arguments.sample_steps, "delay": delay}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if {"jitter", "smoothness"} & set(arguments.measure):
        data = open_dataset(arguments.data)
        episodes = list(data.split(arguments.split))[: arguments.episodes]
        if not episodes:
            raise ValueError(f"{arguments.data} has no episode for --split {arguments.split}: take --split all")
    if "jitter" in arguments.measure:
        observations = recorded(data, episodes[0])
        instruction = observations[0]["instruction"]  # one: a change of instruction is meant to interrupt
        observations = [o for o in observations if o["instruction"] == instruction]
        rows = measure_jitter(planner, observations, arguments.rates, arguments.seconds, execute)
        show_jitter(rows, arguments.out / "jitter.png")
        results["jitter"] = rows
    if "smoothness" in arguments.measure:
        results["smoothness"] = measure_smoothness(planner, data, episodes, execute, delay)
        show_smoothness(results["smoothness"], arguments.out / "smoothness.png", execute, delay)
    if "success" in arguments.measure:
        seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.episodes))
        results["success"] = measure_success(planner, arguments.task, seeds, execute, delay)
        print(results["success"]["paired"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, default=plain))
        print(arguments.json)
    return results


if __name__ == "__main__":
    main()
