"""How fast things are, as ratios measured in one run.

    python experiments/benchmark.py env                           Open-and-Place: steps/s and where the time goes
    python experiments/benchmark.py env --task all                every task
    python experiments/benchmark.py env --width 640 --height 512  at upstream's resolution
    python experiments/benchmark.py vector --workers 2            several environments against one
    python experiments/benchmark.py memory --resets 1000          resident memory over many resets

Each process is held to one core (LP_NUM_THREADS=1 unless set: software Vulkan takes all cores otherwise). Quote a quiet
machine; `--json` prints one object.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the Vulkan driver loads

import numpy as np
from rich.progress import track

from envs.tasks import TASKS, get_task

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
    """The expert acts for `episodes` episodes while every control step is timed."""
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
            _, _, _, truncated, info = env.step(action)
            samples.append(1000 * (time.perf_counter() - start))
            if info["success"]:
                break
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


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["env", "vector", "memory"])
    parser.add_argument("--task", default="open_and_place", help="a task, or all (env)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="control steps measured (vector)")
    parser.add_argument("--resets", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print one object instead of lines")
    arguments = parser.parse_args()
    if arguments.what == "vector":
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
