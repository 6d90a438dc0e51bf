"""Does the world model rank policies as the simulator does? The same policies, from the same first frames, in both.

    python experiments/rank_policies.py --world runs/finetune_self_flow --policies runs/a runs/b runs/c runs/d runs/e

Every policy executes whole chunks in both worlds, and the second instruction comes at the same step. In the simulator
success is SIMPLER's; inside the world model it is what the judge sees (`experiments/judge.py` makes one). Prints both
rates per policy, MMRV (0: ranked alike) and Pearson's correlation with 95% intervals over the starts; writes
runs/<name>: rank.json, rank.png, imagined_*.mp4. Interrupt it at any time: the same command continues.
"""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from envs.protocol import FORCED_ADVANCE
from envs.tasks import get_task
from envs.workers import progress, write_json
from policies import judge as judging
from policies.chunking import ChunkedPolicy
from policies.flow_policy import FlowPolicy
from policies.world_model import WorldModelEnv
from selfflow_robot import checkpoint
from selfflow_robot.config import in_one_line
from selfflow_robot.data import encode_video
from selfflow_robot.metrics import mean_maximum_rank_violation, pearson, wilson_interval

GOALS = ("success", "drawer_opened")
RESAMPLES = 2000  # of the starts, for intervals
FPS = 2  # of imagined videos, two frames per chunk of 8 control steps at 3 Hz: 1.5 times real time


def first_frames(task: str, seeds: range, layout) -> tuple[list, dict[int, str]]:
    """Observations after reset, in the size of `layout`, and the task's later instructions {control step: text}."""
    from envs import make_env

    env, starts, later = make_env(task, width=layout.width, height=layout.height), [], {}
    for seed in seeds:
        starts.append(env.reset(seed=seed, options={"reconfigure": True})[0])
        instructions = env.unwrapped.setup.instructions
        later = {FORCED_ADVANCE + 1: instructions[1]} if len(instructions) > 1 else {}
    env.close()
    return starts, later


def imagine_episode(env: WorldModelEnv, policy: ChunkedPolicy, seed: int, start) -> tuple[dict, np.ndarray]:
    """-> outcome {success: at the end, drawer_opened}, and the frames uint8 (T, H, W, 3)."""
    observation, info = env.reset(seed=seed, options={"start": start})
    policy.reset(observation["instruction"])
    frames, truncated = list(info["frames"]), False
    while not truncated:
        observation, _, _, truncated, info = env.step(policy.act(observation))
        frames += info["frames"] if info["fresh"] else []
    return {goal: bool(info[goal]) for goal in GOALS if goal in info}, np.array(frames)


def imagine_all(arguments, env: WorldModelEnv, planner: FlowPolicy, run: str, starts: list) -> dict[int, dict]:
    """Outcomes of a policy inside the world model by seed; those of earlier calls are read."""
    folder = Path("runs") / arguments.name
    path = folder / f"imagined_{Path(run).name}.json"
    identity = {"world": env.policy.manifest["sha256"], "policy": planner.manifest["sha256"]}
    identity |= {"sample_steps": arguments.sample_steps, "limit": env.max_steps}
    identity |= {"judge": judging.read_manifest(arguments.world)["sha256"]}
    found = json.loads(path.read_text()) if path.exists() else {}
    outcomes = {int(k): v for k, v in found.get("outcomes", {}).items()} if found.get("identity") == identity else {}
    policy = ChunkedPolicy(planner, execute=planner.layout.horizon)
    with progress(f"imagined, {Path(run).name}", len(starts)) as update:
        for number, start in enumerate(starts):
            seed = arguments.first_seed + number
            if seed not in outcomes:
                outcomes[seed], frames = imagine_episode(env, policy, seed, start)
                write_json(path, {"identity": identity, "outcomes": outcomes})
                if number < arguments.videos:
                    video = encode_video(frames.repeat(2, 1).repeat(2, 2), FPS, crf=23, gop=60)
                    checkpoint.write_atomic(folder / f"imagined_{Path(run).name}_{seed}.mp4", video)
            update(number + 1, "")
    return outcomes


def simulate(arguments, run: str, layout, episodes: int) -> dict:
    """Results of a policy in the simulator; finished episodes of earlier calls are kept."""
    name = f"{arguments.name}/simulated_{Path(run).name}"
    settings = dict(
        task=arguments.task, checkpoint=run, episodes=episodes, first_seed=arguments.first_seed, execute=layout.horizon,
        sample_steps=arguments.sample_steps, workers=arguments.workers, video="false", name=name,
        width=layout.width, height=layout.height,
    )  # fmt: skip
    script = Path(__file__).with_name("eval_simpler.py")
    command = [sys.executable, str(script), *(f"{k}={v}" for k, v in settings.items())]
    done = subprocess.run(command, stdout=sys.stderr if arguments.json else None, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f"the evaluation of {run} failed, see above")
    return json.loads((Path("runs") / name / "results.json").read_text())


def agreement(real: np.ndarray, imagined: np.ndarray) -> dict:
    """Outcomes bool (policies, starts) in both worlds -> rates, and rank agreement with intervals over the starts."""

    def both(a, b):
        return mean_maximum_rank_violation(a, b), pearson(a, b)

    rng, count = np.random.default_rng(0), real.shape[1]
    draws = [rng.integers(count, size=count) for _ in range(RESAMPLES)]
    resampled = np.array([both(real[:, d].mean(1), imagined[:, d].mean(1)) for d in draws])
    low, high = np.nanquantile(resampled, [0.025, 0.975], axis=0)
    mmrv, correlation = both(real.mean(1), imagined.mean(1))
    return {
        "simulator": real.sum(1).tolist(),
        "world_model": imagined.sum(1).tolist(),
        "starts": count,
        "mmrv": {"value": mmrv, "low": low[0], "high": high[0]},
        "pearson": {"value": correlation, "low": low[1], "high": high[1]},
    }


def rank(arguments) -> dict:
    task, folder = get_task(arguments.task), Path("runs") / arguments.name
    limit = min(arguments.limit or task.max_steps, task.max_steps)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.starts)
    world = FlowPolicy.load(arguments.world, steps=arguments.sample_steps)
    starts, later = first_frames(arguments.task, seeds, world.layout)
    env = WorldModelEnv(world, judging.load(arguments.world, world), max_steps=limit, instructions=later)
    outcomes = {"simulator": [], "world_model": []}
    for run in arguments.policies:
        planner = FlowPolicy.load(run, steps=arguments.sample_steps)
        simulated = simulate(arguments, run, planner.layout, len(seeds))
        by_seed = {e["seed"]: {"success": e["success_final"], **e["subgoals"]} for e in simulated["episodes"]}
        outcomes["simulator"].append(by_seed)
        outcomes["world_model"].append(imagine_all(arguments, env, planner, run, starts))
    judged = GOALS if limit == task.max_steps else GOALS[1:]  # success is that of the last step, which is not reached
    goals = [g for g in judged if all(g in o for side in outcomes.values() for run in side for o in run.values())]
    usable = [seed for seed in seeds if all(seed in run for run in outcomes["simulator"])]  # not crashed
    table = {
        side: {goal: np.array([[run[s][goal] for s in usable] for run in runs]) for goal in goals}
        for side, runs in outcomes.items()
    }
    results = {goal: agreement(table["simulator"][goal], table["world_model"][goal]) for goal in goals}
    facts = {
        "world": arguments.world,
        "policies": arguments.policies,
        "task": task.short,
        "seeds": [*seeds],
        "limit": limit,
    }
    write_json(folder / "rank.json", facts | {"goals": results})
    checkpoint.write_atomic(folder / "rank.png", picture(results, arguments.policies))
    return facts | {"goals": results}


def picture(results: dict, policies: list[str]) -> bytes:
    """One scatter per goal: success in the simulator against success inside the world model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.6 * len(results), 4.4), squeeze=False)
    for axis, (goal, result) in zip(axes[0], results.items()):
        n = result["starts"]
        axis.plot([0, 1], [0, 1], color="0.8", zorder=0)
        for name, a, b in zip(policies, result["simulator"], result["world_model"]):
            (alow, ahigh), (blow, bhigh) = wilson_interval(a, n), wilson_interval(b, n)
            axis.errorbar(a / n, b / n, [[b / n - blow], [bhigh - b / n]], [[a / n - alow], [ahigh - a / n]], fmt="o")
            axis.annotate(Path(name).name, (a / n, b / n), xytext=(5, 5), textcoords="offset points", fontsize=8)
        mmrv, correlation = result["mmrv"]["value"], result["pearson"]["value"]
        axis.set(
            title=f"{goal.replace('_', ' ')}: MMRV {mmrv:.2f}, Pearson {correlation:.2f}",
            xlabel="in the simulator", ylabel="inside the world model", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05),
        )  # fmt: skip
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def print_table(facts: dict) -> None:
    for goal, result in facts["goals"].items():
        title = f"{facts['task']}, {goal.replace('_', ' ')}, {result['starts']} starts, 95% Wilson intervals"
        table = Table("policy", "simulator", "world model", title=title)
        for run, a, b in zip(facts["policies"], result["simulator"], result["world_model"]):
            cells = [f"{k}/{result['starts']} [{low:.0%}, {high:.0%}]" for k in (a, b)
                     for low, high in [wilson_interval(k, result["starts"])]]  # fmt: skip
            table.add_row(Path(run).name, *cells)
        Console().print(table)
        for name in ("mmrv", "pearson"):
            value = result[name]
            print(f"{name} {value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, help="run whose world model is asked; it needs a judge")
    parser.add_argument("--policies", nargs="+", required=True, help="runs to rank, five or more of different quality")
    parser.add_argument("--task", default="open_and_place", help="default %(default)s")
    parser.add_argument("--starts", type=int, default=20, help="first frames (default %(default)s)")
    parser.add_argument("--first_seed", type=int, default=10000, help="default %(default)s")
    parser.add_argument(
        "--limit", type=int, help="control steps inside the world model; default the task's. Fewer: subgoals alone"
    )
    parser.add_argument("--sample_steps", type=int, default=8, help="of the flow sampler (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="simulators in parallel (default 2)")
    parser.add_argument("--videos", type=int, default=1, help="imagined episodes per policy to keep (default 1)")
    parser.add_argument("--name", default="rank", help="results go to runs/<name> (default rank)")
    parser.add_argument("--json", action="store_true", help="print one object")
    arguments = parser.parse_args()
    with in_one_line():
        if len(arguments.policies) < 2:
            raise ValueError("--policies needs at least two runs to rank")
        facts = rank(arguments)
    print(json.dumps(facts)) if arguments.json else print_table(facts)


if __name__ == "__main__":
    main()
