"""Success rate of a policy on a SIMPLER task, in runs/<name>: results.json, one JSON and one H.264 video per episode.

    python experiments/eval_simpler.py --task open_and_place                        newest run, or what is shipped
    python experiments/eval_simpler.py --task open_and_place --checkpoint runs/finetune_self_flow --episodes 50
    python experiments/eval_simpler.py --task open_top_drawer --policy expert       or hold: no motion at all
    python experiments/eval_simpler.py --policy remote --server gpu-box:8000        what serve.py serves there
    python experiments/eval_simpler.py --task pick_coke_can --protocol visual_matching    the 300 published episodes

SIMPLER's rule: episodes run to the step limit, success does not end them; `success_final` is success at the last step,
`success_any` at any step. An episode depends on its seed and the policy alone, not on workers or order. Interrupt it at
any time: the same command continues with the seeds that are missing.
"""

import json
import os
import shlex
import shutil
import sys
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from envs.protocol import PHYSICS, PUBLISHED, average, make_protocol, protocol_episodes, protocol_hash
from envs.rollout import Demonstrator, Episode, HoldStill, expert_rng, rollout
from envs.tasks import VISUAL_MATCHING, get_task
from envs.workers import Workers, progress, write_json
from selfflow_robot import checkpoint
from selfflow_robot.config import EvalConfig, run
from selfflow_robot.data import encode_video
from selfflow_robot.metrics import auc, wilson_interval

POLICIES = ("checkpoint", "expert", "hold", "remote")
SIMULATORS = ("ours", "upstream")
ACTING = ("execute", "sample_steps", "temperature")  # settings of a checkpoint that every record names
VIDEO_CRF, VIDEO_GOP = 26, 60  # for looking at: a tenth of what training data needs
VIDEO_HEIGHT, VIDEO_FPS, BAR = 384, 6, 40  # px, twice as fast as the control, px for the words below
FAILING = 8  # kinds of starts named that most failures began from
GREEN, RED, GREY = (60, 170, 90), (200, 70, 60), (90, 90, 90)


def evaluate(cfg: EvalConfig, start=None) -> dict:
    """Run what is missing of an evaluation; returns (and writes) its results.

    start(cfg, folder) -> work(seed) runs in the workers. Raises ValueError or WorkerError with the remedy.
    """
    task = get_task(cfg.task)
    if cfg.policy not in POLICIES:
        raise ValueError(f"unknown policy {cfg.policy!r}; known: {', '.join(POLICIES)}")
    if cfg.episodes < 1:
        raise ValueError(f"episodes is {cfg.episodes}; it must be at least 1")
    if cfg.simulator not in SIMULATORS:
        raise ValueError(f"unknown simulator {cfg.simulator!r}; known: {', '.join(SIMULATORS)}")
    refuse_unused(cfg)
    identity = identify(cfg)
    subject = Path(identity["checkpoint"]).name if identity["checkpoint"] else cfg.policy
    usual = {"protocol": "random", "simulator": "ours", "physics": "default"}
    parts = [getattr(cfg, name) for name, value in usual.items() if getattr(cfg, name) != value]
    parts += [f"margin_{cfg.margin}"] if cfg.margin else []
    folder = Path("runs") / (cfg.name or "_".join(["eval", subject, task.short, *parts]))
    protocol = make_protocol(
        cfg.task, cfg.protocol, cfg.first_seed, cfg.episodes,
        cfg.width, cfg.height, cfg.shader, cfg.simulator, cfg.physics, cfg.margin,
    )  # fmt: skip
    starts = protocol_episodes(cfg.task, cfg.protocol, cfg.first_seed, cfg.episodes, cfg.margin)
    seeds = [start.number for start in starts]
    if not cfg.resume:
        shutil.rmtree(folder / "episodes", ignore_errors=True)
        shutil.rmtree(folder / "videos", ignore_errors=True)
    elif (folder / "results.json").exists():
        refuse_other(folder / "results.json", identity, protocol)

    results = {
        "task": task.short,
        **identity,
        "protocol": protocol,
        "protocol_hash": protocol_hash(protocol),
        "success_rule": protocol["success_rule"],
        "command": typed(sys.orig_argv),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "sapien", "mani_skill", "numpy")},
        "crashed": [],
    }
    episodes = read_episodes(folder, seeds)

    def save():  # after every episode: whatever happens next, the file says what is known
        results["episodes"] = [episodes[seed] for seed in seeds if seed in episodes]
        results["summary"] = summarize(results["episodes"])
        results["score"] = score(starts, results["episodes"])
        results["groups"] = summarize_groups(starts, results["episodes"])
        results["alarm"] = alarm_quality(results["episodes"])
        results["starts"] = count_starts(results["episodes"])
        results["standins"] = sorted({text for episode in results["episodes"] for text in episode.get("standins", [])})
        write_json(folder / "results.json", results)

    save()
    if len(episodes) < len(seeds):
        print(f"Evaluating {subject} on {task.short} in {folder}: {len(episodes)} of {len(seeds)} episodes are there")
    if cfg.protocol == "visual_matching" and task.short not in PUBLISHED:
        print(f"No rate was published for {task.short}, only for {', '.join(PUBLISHED)}: compare this with ours alone.")
    with (
        Workers(start or start_evaluating, (cfg, identity, str(folder)), cfg.workers) as workers,
        progress("episodes", len(seeds)) as update,
    ):
        for seed in seeds:
            if seed not in episodes:
                workers.submit(seed)
        update(len(episodes), "")
        for seed, episode in workers.results():
            if episode is None:
                results["crashed"].append(seed)
            else:
                episodes[seed] = episode
            save()
            update(len(episodes), f"success {results['summary']['success_final']['k']}" if episodes else "")
    print_table(results, folder)
    return results


def typed(argv: list[str]) -> str:
    """A process's command as one types it in a checkout, wherever that lies (`demo.py` uses full paths)."""
    root = f"{Path(__file__).resolve().parent.parent}/"
    return shlex.join(["python", *(word.removeprefix(root) for word in argv[1:])])


def refuse_unused(cfg: EvalConfig) -> None:
    """ValueError for a setting that would change nothing about this policy, or in this simulator: whoever gave it meant
    something else."""
    acting = ("sample_steps", "imagination", "temperature", "samples", "delay", "committed", "cached", "alarm_every")
    used = {"checkpoint": ("checkpoint", "execute", *acting), "remote": ("server", "execute")}.get(cfg.policy, ())
    for name in ("checkpoint", "server", "execute", *acting):
        if name not in used and getattr(cfg, name) != getattr(EvalConfig, name):
            raise ValueError(f"--{name} changes nothing with --policy {cfg.policy}: leave it out, or choose another")
    if not cfg.committed and cfg.delay is None:
        raise ValueError("--committed false changes nothing without --delay: give one, or leave it out")
    if cfg.simulator == "upstream" and (cfg.policy == "expert" or cfg.protocol == "variant_aggregation"):
        what = "the expert reads the state of our scenes" if cfg.policy == "expert" else "its variants are not built"
        raise ValueError(f"not with --simulator upstream: {what}")
    for name in ("shader", "physics"):
        if cfg.simulator == "upstream" and getattr(cfg, name) != "default":
            raise ValueError(f"{name} {getattr(cfg, name)}: upstream has its own, leave --{name} out")


def identify(cfg: EvalConfig) -> dict:
    """What is measured: policy, checkpoint and the SHA-256 of its tensors, settings of the policy.

    Raises ValueError naming the command that makes a checkpoint where there is none.
    """
    if cfg.policy == "remote":
        with connect(cfg) as planner:
            served = planner.metadata
        names = ("checkpoint", "sample_steps", "temperature", "imagination")
        said = {name: None if served.get(name) is None else str(served[name]) for name in (*names, "checkpoint_hash")}
        hashed = said.pop("checkpoint_hash")
        settings = {"server": cfg.server, "execute": cfg.execute, **said}
        return {"policy": "remote", "checkpoint": None, "checkpoint_hash": hashed, "policy_settings": settings}
    if cfg.policy != "checkpoint":
        return {"policy": cfg.policy, "checkpoint": None, "checkpoint_hash": None, "policy_settings": {}}
    path = checkpoint.chosen(cfg.checkpoint)
    folder = checkpoint.find(path)
    manifest = checkpoint.read_manifest(checkpoint.saved(folder)[-1])
    if manifest.get("kind") == "pretrain":
        raise ValueError(
            f"{path} is a video backbone. Fine-tune it: python experiments/finetune.py --pretrained {path}"
        )
    return {
        "policy": "checkpoint",
        "checkpoint": str(checkpoint.run_folder(path)),
        "checkpoint_hash": manifest["sha256"],
        "policy_settings": {name: getattr(cfg, name) for name in ACTING} | changed_settings(cfg) | choosing(cfg, path),
    }


def choosing(cfg: EvalConfig, path: str) -> dict:
    """Which judge chooses among several samples: fitted anew, it is another policy."""
    if cfg.samples == 1:
        return {}
    from policies import judge

    return {"judge": judge.read_manifest(path)["sha256"]}


def changed_settings(cfg: EvalConfig) -> dict:
    """How the checkpoint is made to act, where it is not by default."""
    names = ("imagination", "samples", "delay", "committed", "cached", "alarm_every")
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(EvalConfig, name)}


def checkpoint_policy(cfg: EvalConfig, path: str):
    """The policy of a run as the settings want it to act, and its alarm or None."""
    from policies import judge
    from policies.alarm import Alarm
    from policies.chunking import ChunkedPolicy
    from policies.flow_policy import FlowPolicy
    from policies.planning import BestOfN
    from policies.realtime import Holding, RealTimePolicy

    settings = dict(imagination=cfg.imagination, cached=cfg.cached, temperature=cfg.temperature)
    planner = FlowPolicy.load(path, steps=cfg.sample_steps, **settings)
    if cfg.samples != 1:
        planner = BestOfN(planner, judge.load(path, planner), cfg.samples)
    alarm = planner = Alarm(planner, cfg.alarm_every) if cfg.alarm_every else planner
    if cfg.delay is None:
        policy = ChunkedPolicy(planner, execute=cfg.execute)
    else:
        policy = RealTimePolicy(
            planner, planner.layout.fps, cfg.execute, delay=cfg.delay, committed=cfg.committed, threaded=False
        )
        # While a plan is made for an instruction that has just changed, nothing may be left to do.
        policy = Holding(policy)
    return policy, alarm if cfg.alarm_every else None


def connect(cfg: EvalConfig):
    """The planner behind --server. Raises ValueError or ServerError with the remedy."""
    from policies.remote import Foreign, RemotePlanner

    if cfg.server is None:
        raise ValueError("--policy remote needs --server host:port; python experiments/serve.py starts one")
    return RemotePlanner(cfg.server, foreign=Foreign(horizon=cfg.execute))


def refuse_other(path: Path, identity: dict, protocol: dict) -> None:
    """ValueError if the results at `path` measured something else; other seeds of the same thing are welcome."""
    remedy = "Choose another --name, or --resume false to start it over."
    try:
        found = json.loads(path.read_text())
        before = {name: found[name] for name in identity} | {"protocol": {**found["protocol"], "seeds": None}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {remedy}") from error
    now = {**identity, "protocol": {**protocol, "seeds": None}}
    before.pop("checkpoint"), now.pop("checkpoint")  # the hash of its content decides, not where it lies
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(f"{path} measured another {name}: {before[name]}, now {now[name]}. {remedy}")


def start_evaluating(cfg: EvalConfig, identity: dict, folder: str):
    """In a worker: build scene and policy, return the function that runs one episode by its number."""
    from envs import make_env
    from envs.expert import make_expert
    from envs.upstream import make_upstream_env

    seeing = cfg.policy in ("checkpoint", "remote") or cfg.video
    if cfg.simulator == "upstream":  # whose pictures need a GPU or a new Mesa
        env = make_upstream_env(cfg.task, width=cfg.width, height=cfg.height, render=seeing)
    else:
        obs_mode = "rgb" if seeing else "none"
        picture = dict(width=cfg.width, height=cfg.height, shader=cfg.shader, obs_mode=obs_mode)
        env = make_env(cfg.task, **picture, physics=PHYSICS[cfg.physics])
    if cfg.policy == "expert":

        def make_policy(seed):
            expert = make_expert(env, rng=expert_rng(seed, cfg.margin))
            return Demonstrator(expert, np.random.default_rng([seed, 1]))

        return partial(run_episode, env, make_policy, cfg, folder)
    alarm = None
    if cfg.policy == "hold":
        policy = HoldStill()
    elif cfg.policy == "remote":
        from policies.chunking import ChunkedPolicy

        if identify(cfg) != identity:
            raise ValueError(f"{cfg.server} serves something else by now: choose another --name")
        policy = ChunkedPolicy(connect(cfg), execute=cfg.execute)
    else:
        policy, alarm = checkpoint_policy(cfg, identity["checkpoint"])
        if identify(cfg) != identity:  # a worker that replaces a crashed one must not measure something else
            raise ValueError(f"{identity['checkpoint']} is still being trained: wait, or evaluate a copy")
    return partial(run_episode, env, lambda seed: policy, cfg, folder, alarm=alarm)


def run_episode(env, make_policy, cfg: EvalConfig, folder: str, seed: int, alarm=None) -> dict:
    """Roll out one episode of the protocol; write its video, then its record, each at once."""
    began = datetime.now(timezone.utc)
    first = seed if cfg.protocol == "random" else 0
    start = next(e for e in protocol_episodes(cfg.task, cfg.protocol, first, margin=cfg.margin) if e.number == seed)
    policy = make_policy(seed)
    episode = rollout(env, policy, start.seed, options=start.options)
    variant = {} if start.variant == VISUAL_MATCHING else {"variant": start.variant.name}
    record = {
        "seed": seed,
        "group": list(start.group),
        "start": get_task(cfg.task).start(start.seed, start.choices) | variant,
        "standins": episode.standins,
        "steps": episode.steps,
        "success_final": episode.success_final,
        "success_any": episode.success_any,
        "subgoals": episode.subgoals,
        "advance_at": episode.advance_at,
        "seconds": round((datetime.now(timezone.utc) - began).total_seconds(), 1),
        "video": None,
    }
    if hasattr(policy, "held"):
        record["held"] = policy.held
    if alarm is not None:
        record["alarm"] = [[step, round(mm, 3), round(degrees, 3)] for step, mm, degrees in alarm.readings]
    if cfg.video:
        record["video"] = f"videos/seed_{seed:06d}.mp4"
        path = Path(folder) / record["video"]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(encode_video(annotate(episode), VIDEO_FPS, VIDEO_CRF, VIDEO_GOP))
        os.replace(temporary, path)
    write_json(Path(folder) / f"episodes/seed_{seed:06d}.json", record)
    return record


def read_episodes(folder: Path, seeds: list[int]) -> dict[int, dict]:
    """Finished episodes among `seeds`; a file that does not read counts as not finished."""
    episodes = {}
    for seed in seeds:
        try:
            episode = json.loads((folder / f"episodes/seed_{seed:06d}.json").read_text())
            if episode["seed"] == seed and {"success_final", "success_any", "subgoals", "steps"} <= set(episode):
                episodes[seed] = episode
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return episodes


def count_starts(episodes: list[dict]) -> int | None:
    """How many of the starts are different ones (`Task.start`); None where one is not known, in old records."""
    starts = [json.dumps(episode.get("start"), sort_keys=True) for episode in episodes]
    return None if "null" in starts else len(set(starts))


def where_it_fails(episodes: list[dict]) -> list[tuple[str, int, int]]:
    """(names, failures at the last step, episodes) for what episodes begin with by name, as drawer and pose, and differ
    in; most failures first, none where nothing fails or nothing is known, in old records."""
    named = []  # {field: words} of each episode
    for start in (episode.get("start") or {} for episode in episodes):
        named.append({k: v if isinstance(v, str) else f"{k} {v}" for k, v in start.items() if isinstance(v, str | int)})
    varied = [field for field in named[0] if len({words.get(field) for words in named}) > 1] if named else []
    rows: dict[str, list[bool]] = {}
    for words, episode in zip(named, episodes):
        names = " ".join(words[field] for field in varied if field in words).replace("_", " ")
        rows.setdefault(names, []).append(not episode["success_final"])
    failing = [(names, sum(failed), len(failed)) for names, failed in rows.items() if names and any(failed)]
    return sorted(failing, key=lambda row: (-row[1], row[0]))


def summarize(episodes: list[dict]) -> dict[str, dict]:
    """{success_final, success_any and each subgoal: {k, n, rate, low, high}}, 95% Wilson intervals."""
    if not episodes:
        return {}
    columns = {name: [e[name] for e in episodes] for name in ("success_final", "success_any")}
    columns |= {name: [e["subgoals"][name] for e in episodes] for name in episodes[0]["subgoals"]}
    summary = {}
    for name, outcomes in columns.items():
        k, n = sum(outcomes), len(outcomes)
        low, high = wilson_interval(k, n)
        summary[name] = {"k": k, "n": n, "rate": k / n, "low": low, "high": high}
    return summary


def score(starts: list, episodes: list[dict]) -> dict[str, float | None]:
    """The protocol's own average of both success rules (`envs.protocol.average`)."""
    names = ("success_final", "success_any")
    return {name: average(starts, {e["seed"]: e[name] for e in episodes}) for name in names}


def summarize_groups(starts: list, episodes: list[dict]) -> list[dict]:
    """Success at the last step for every group of the protocol, with its count and whether the average has it."""
    done = {episode["seed"]: episode["success_final"] for episode in episodes}
    groups: dict[tuple, list] = {}
    for start in starts:
        if start.number in done and start.group:
            groups.setdefault((start.group, start.averaged), []).append(done[start.number])
    rows = []
    for (group, averaged), outcomes in groups.items():
        k, n = sum(outcomes), len(outcomes)
        low, high = wilson_interval(k, n)
        rows.append(
            {"group": list(group), "averaged": averaged, "k": k, "n": n, "rate": k / n, "low": low, "high": high}
        )
    return rows


def alarm_quality(episodes: list[dict]) -> dict[str, dict]:
    """{outcome: {value, low, high, failures, n}}: the probability (area under the ROC curve) that an episode which
    failed has higher readings, mean over the episode, than one that did not. Empty without readings."""
    read = [episode for episode in episodes if episode.get("alarm")]
    scores = [float(np.mean([mm for _, mm, _ in episode["alarm"]])) for episode in read]
    outcomes = {"success_final": [e["success_final"] for e in read]}
    outcomes |= {name: [e["subgoals"][name] for e in read] for name in (read[0]["subgoals"] if read else ())}
    quality = {}
    for name, reached in outcomes.items():
        failed = [not outcome for outcome in reached]
        if any(failed) and not all(failed):
            quality[name] = auc(scores, failed)._asdict() | {"failures": sum(failed), "n": len(read)}
    return quality


def annotate(episode: Episode) -> np.ndarray:
    """Frames enlarged, with instruction and outcome below; the last one stands for a second. uint8 (T + 6, H, W, 3)."""
    height, width = episode.frames.shape[1:3]
    scale = max(VIDEO_HEIGHT // height, 1)
    size = (width * scale // 2 * 2, height * scale // 2 * 2)  # H.264 wants even sides
    font = ImageFont.load_default(size=15)
    outcome, color = ("success", GREEN) if episode.success_final else ("failure", RED)
    goals = ", ".join(f"{name.replace('_', ' ')}: {'yes' if done else 'no'}" for name, done in episode.subgoals.items())
    pictures = []
    for t in [*range(episode.steps), *[episode.steps - 1] * VIDEO_FPS]:
        last = len(pictures) >= episode.steps
        canvas = Image.new("RGB", (size[0], size[1] + BAR), color if last else GREY)
        canvas.paste(Image.fromarray(episode.frames[t]).resize(size, Image.Resampling.NEAREST))
        draw = ImageDraw.Draw(canvas)
        words = f"{outcome}  ({goals})" if last else episode.instructions[t]
        draw.text((8, size[1] + 10), words, "white", font)
        if not last:
            count = f"ends in {outcome}   step {t + 1}/{episode.steps}"
            draw.text((size[0] - 8, size[1] + 10), count, "white", font, anchor="ra")
        pictures.append(np.asarray(canvas))
    return np.array(pictures)


def print_table(results: dict, folder: Path) -> None:
    protocol, seeds = results["protocol"], results["protocol"]["seeds"]
    title = f"{results['checkpoint'] or results['policy']} on {results['task']}"
    table = Table("", "k/n", "rate", "95% Wilson interval", title=title)
    for name, row in results["summary"].items():
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(name.replace("_", " "), f"{row['k']}/{row['n']}", f"{row['rate']:.1%}", interval)
    Console().print(table)
    if results["groups"]:
        groups = Table("group", "k/n", "rate", "95% Wilson interval", title=f"{protocol['protocol']}, success_final")
        for row in results["groups"]:
            name = " / ".join(row["group"]) + ("" if row["averaged"] else " (not in the average)")
            groups.add_row(
                name, f"{row['k']}/{row['n']}", f"{row['rate']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}"
            )
        Console().print(groups)
    for name, q in results["alarm"].items():
        interval = f"AUC {q['value']:.2f} [{q['low']:.2f}, {q['high']:.2f}]"
        print(f"alarm for {name.replace('_', ' ')} missed: {interval}, {q['failures']} of {q['n']} episodes")
    if results["starts"] and results["starts"] < len(results["episodes"]):
        print(
            f"{len(results['episodes'])} episodes from {results['starts']} different starts, colours aside: what the "
            "policy does from one it mostly repeats, so as a sample of starts the intervals are too narrow"
        )
    if protocol["protocol"] != "random" and results["score"]["success_final"] is not None:
        print(f"score, averaged as upstream does: {results['score']['success_final']:.3f}")
    if failing := where_it_fails(results["episodes"]):
        rows = [f"{names} {k} of {n}" for names, k, n in failing[:FAILING]]
        print(f"fails at the last step from: {', '.join(rows)}" + (", and others" if len(failing) > FAILING else ""))
    for text in results["standins"]:
        print(f"stand-in: {text}")
    print(f"success: {protocol['success']}\nrule: {results['success_rule']}")
    kind = "seeds" if protocol["protocol"] == "random" else "episodes"
    print(f"{kind} {seeds['first']} to {seeds['first'] + seeds['count'] - 1}, protocol {results['protocol_hash']}")
    if results["crashed"]:
        print(f"crashed twice and left out: seeds {results['crashed']}; the same command tries them again")
    print(folder / "results.json")


if __name__ == "__main__":
    run(EvalConfig, evaluate)
