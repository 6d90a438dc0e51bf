"""How fast things are, as ratios measured in one run: `python experiments/benchmark.py env [--json]`

env: control steps per second of one environment in one process, with physics, picture, overlay and observation, and
where the time goes. Quote the median; set LP_NUM_THREADS=1 (software Vulkan) to keep it to one core.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the Vulkan driver loads

import numpy as np

TARGET = 40.0  # control steps per second and core at 160 x 128, with rendering


def timed(function, repeats: int) -> float:
    """Median milliseconds of one call."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(1000 * (time.perf_counter() - start))
    return statistics.median(samples)


def benchmark_env(task: str, width: int, height: int, episodes: int) -> dict:
    """The expert solves `episodes` episodes while every control step is timed."""
    from envs import make_env
    from envs.expert import Expert

    env = make_env(task, width=width, height=height)
    sim, samples = env.unwrapped, []
    start = time.perf_counter()
    for seed in range(episodes):
        env.reset(seed=seed)
    resets = (time.perf_counter() - start) / episodes
    for seed in range(episodes):
        env.reset(seed=seed)
        expert, truncated = Expert(env, np.random.default_rng(seed)), False
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
    controller = sim.agent.controller

    def drive():
        for _ in range(sim._sim_steps_per_control):
            controller.before_simulation_step()

    parts = {
        "controller": timed(drive, 10) + timed(lambda: sim.agent.set_action(np.zeros((1, 7))), 10),
        "picture and overlay": timed(sim.render_picture, 20),
        "success and subgoals": timed(sim.evaluate, 10),
    }
    parts["physics and the rest"] = step - sum(parts.values())
    rate = 1000 / statistics.mean(samples)
    return {
        "task": task,
        "size": [width, height],
        "steps": len(samples),
        "steps_per_second": rate,
        "ratio_to_target": rate / TARGET,
        "step_ms_median": step,
        "split_ms": parts,
        "reset_seconds": resets,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["env"])
    parser.add_argument("--task", default="open_and_place")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object instead of lines")
    arguments = parser.parse_args()
    result = benchmark_env(arguments.task, arguments.width, arguments.height, arguments.episodes)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['task']} {result['size']}: {result['steps_per_second']:.1f} control steps/s in one process,")
    print(f"{result['ratio_to_target']:.2f} of the target {TARGET:.0f}; reset {result['reset_seconds']:.2f} s")
    for name, ms in result["split_ms"].items():
        print(f"  {name:24} {ms:6.2f} ms")


if __name__ == "__main__":
    main()
