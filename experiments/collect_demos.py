"""Demonstrations of a task from the scripted expert, as a LeRobot v3.0 data set in data/<name>.

    python experiments/collect_demos.py --task open_and_place --episodes 300 --workers 2
    python experiments/collect_demos.py --task pick_coke_can,move_near,open_drawer --name mixture --episodes 600
    python experiments/collect_demos.py --episodes 400 --policy runs/finetune    a policy drives too (DAgger)

The seeds first_seed, first_seed + 1, ... are run until the data set holds `episodes` episodes; which seeds those are
does not depend on the number of workers. Interrupt it at any time: the same command continues. With a policy, each
stretch of an episode is driven by it with probability `policy_fraction` while the expert labels the states it visits;
failures are kept then, for their labels are right all the same.
"""

import json
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

from envs.protocol import check_margin
from envs.rollout import HOLD_STEPS, Demonstrator, expert_rng, rollout
from envs.tasks import get_tasks
from envs.workers import Workers, progress, write_json
from selfflow_robot.config import CollectConfig, EvalConfig, run
from selfflow_robot.data import VIEW, DatasetError, committed_seeds, finalize, succeeded, write_episode
from selfflow_robot.metrics import wilson_interval

PATIENCE = 20  # failures allowed beyond one per wanted episode
# What episodes depend on beside their seed: one data set holds episodes of one kind.
KIND = ("width", "height", "variation", "disturbance", "linger", "margin", "policy", "policy_fraction", "keep_failures")


def collect(cfg: CollectConfig, start=None) -> Path:
    """Collect until the data set is complete; returns its folder.

    start(cfg, root) -> work(seed) runs in the workers. Raises ValueError, DatasetError or WorkerError with the remedy.
    """
    tasks = get_tasks(cfg.task)
    shorts = ",".join(task.short for task in tasks)
    check_margin(cfg.margin, tasks)
    if cfg.linger < 0:
        raise ValueError(f"linger {cfg.linger}: control steps, from 0")
    root = Path("data") / (cfg.name or "+".join(task.short for task in tasks))
    keep_failures = cfg.keep_failures or cfg.policy is not None
    attempts = read_attempts(root, {"task": shorts} | {name: getattr(cfg, name) for name in KIND})
    present = committed_seeds(root)
    for seed in sorted(present - set(map(int, attempts["success"]))):  # written, and killed before it was noted
        attempts["success"][str(seed)] = succeeded(root, seed)
    seeds = (seed for seed in count(cfg.first_seed) if seed not in present and attempts["success"].get(str(seed), True))
    allowed = len(attempts["success"]) + 2 * cfg.episodes + PATIENCE

    if len(present) < cfg.episodes:
        print(f"Collecting {shorts} into {root}: {len(present)} of {cfg.episodes} episodes are there")
    with (
        Workers(start or start_collecting, (cfg, str(root), keep_failures), cfg.workers) as workers,
        progress("demonstrations", cfg.episodes) as update,
    ):
        update(len(present), "")

        def top_up():  # every pending seed is expected to succeed, so the set of seeds is the same for any timing
            while len(workers) < workers.count and len(present) + len(workers) < cfg.episodes:
                workers.submit(next(seeds))

        top_up()
        for seed, result in workers.results():
            success = bool(result and result["success"])
            attempts["success"][str(seed)] = success
            write_json(root / "collection.json", attempts)
            if result and (success or keep_failures):
                present.add(seed)
            elif len(attempts["success"]) >= allowed:
                hint = f"python experiments/eval_simpler.py --task {tasks[0].short} --policy expert"
                raise DatasetError(f"{root}: only {yield_text(attempts)} succeed. To see why: {hint}")
            update(len(present), f"success {yield_text(attempts)}")
            top_up()

    info = finalize(root)
    print(
        f"{root}: {info['total_episodes']} episodes, {info['total_frames']} frames; success {yield_text(attempts)} "
        "of the seeds tried (95% Wilson interval)"
    )
    return root


def start_collecting(cfg: CollectConfig, root: str, keep_failures: bool):
    """In a worker: build the scene (and load the policy), return the function that records one seed."""
    from envs import make_env
    from envs.expert import make_expert

    @cache
    def scene(short: str):
        return make_env(short, width=cfg.width, height=cfg.height)

    driver = None
    if cfg.policy is not None:
        from policies import load_policy

        driver = load_policy(cfg.policy, execute=EvalConfig.execute, temperature=EvalConfig.temperature)  # as it acts
    tasks = get_tasks(cfg.task)

    def work(seed: int) -> dict:
        return record(scene(tasks[seed % len(tasks)].short), make_expert, driver, cfg, root, keep_failures, seed)

    return work


def record(env, make_expert, driver, cfg: CollectConfig, root: str, keep_failures: bool, seed: int) -> dict:
    """Run one seed and commit it to the data set. make_expert(env, rng, variation) gives an episode's expert."""
    expert = make_expert(env, expert_rng(seed, cfg.margin), cfg.variation)
    rng = np.random.default_rng([seed, 1])
    demonstrator = Demonstrator(expert, rng, cfg.disturbance, driver, cfg.policy_fraction, hold=HOLD_STEPS)
    place = env.unwrapped.task.beyond(seed, cfg.margin)
    episode = rollout(env, demonstrator, seed, linger=cfg.linger, options=place)
    if episode.success_final or keep_failures:
        arrays = (episode.frames, episode.proprio, episode.action, episode.executed)
        robot, fps = env.unwrapped.task.robot, env.unwrapped.control_freq
        about = (episode.instructions, episode.success_final, fps, robot, episode.environment)
        write_episode(root, seed, *arrays, *about)
    return {"success": episode.success_final, "steps": episode.steps}


def read_attempts(root: Path, kind: dict) -> dict:
    """collection.json of this data set: its kind, and for every seed tried whether it succeeded. What the file of an
    older version does not say of its kind is not compared. Raises DatasetError when it is of another kind."""
    path = root / "collection.json"
    if not path.exists():
        wanted = [kind["height"], kind["width"]]
        shape = committed_seeds(root) and finalize(root)["features"][f"observation.images.{VIEW}"]["shape"][:2]
        if shape and wanted != [None, None] and shape != wanted:
            raise DatasetError(f"{root} holds pictures of another size. Choose another --name.")
        write_json(path, {**kind, "success": {}})
    try:
        attempts = json.loads(path.read_text())
        attempts["success"].items(), [attempts[name] for name in ("task", "width", "height")]  # in every version
        other = {name: attempts[name] for name in kind if attempts.get(name, kind[name]) != kind[name]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}). Delete it and the same command rebuilds it.") from error
    if other:
        asked = {name: kind[name] for name in other}
        raise DatasetError(f"{root} holds episodes of {other}, not {asked}. Choose another --name.")
    return attempts


def yield_text(attempts: dict) -> str:
    k, n = sum(attempts["success"].values()), len(attempts["success"])
    if n == 0:
        return "0/0"
    low, high = wilson_interval(k, n)
    return f"{k}/{n} = {k / n:.0%} [{low:.0%}, {high:.0%}]"


if __name__ == "__main__":
    run(CollectConfig, collect)
