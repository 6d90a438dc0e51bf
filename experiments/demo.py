"""The whole pipeline, small: from nothing to two policies compared on the benchmark scene, in 20 minutes on two cores.

Interrupt it at any time and run it again: finished stages are skipped, the interrupted one resumes where it stopped.
The commands it runs are the ones to type for the real thing, with larger numbers.

    python experiments/demo.py             (or `make demo`, which also sets the machine up)
    python experiments/demo.py --dry_run   print the commands only
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TASK = "open_and_place"
DEMONSTRATIONS = 20
PRETRAIN_STEPS = 100
FINETUNE_STEPS = 250
EVALUATIONS = 4  # episodes per policy, on the same seeds
METHODS = ("self_flow", "flow_matching")

HERE = Path(__file__).resolve().parent
FOLDER = Path("runs/demo")
DATA = "data/demo"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # two arms share two cores


class Stage(NamedTuple):
    title: str
    commands: list[str]  # run at the same time
    outputs: list[str]


def pipeline() -> list[Stage]:
    pretrained, policies, evaluations, videos = (
        [pattern.format(method) for method in METHODS]
        for pattern in ("demo_pretrain_{}", "demo_{}", "demo_eval_{}", f"{FOLDER}/imagined_{{}}.mp4")
    )
    runs = [f"runs/{name}" for name in pretrained + policies]
    results = [f"runs/{name}" for name in evaluations]
    report = f"{FOLDER}/report.html"
    return [
        Stage(
            "Collect demonstrations from the scripted expert",
            [f"collect_demos.py --task {TASK} --episodes {DEMONSTRATIONS} --workers 2 --name demo"],
            [DATA],
        ),
        Stage(
            "Pretrain the video backbone, with Self-Flow and with plain flow matching",
            [
                f"pretrain.py --method {method} --data {DATA} --name {name} --steps {PRETRAIN_STEPS}"
                for method, name in zip(METHODS, pretrained)
            ],
            [f"runs/{name}" for name in pretrained],
        ),
        Stage(
            "Fine-tune a policy from each backbone, everything else equal",
            [
                f"finetune.py --method {method} --pretrained {backbone} --data {DATA} --name {name}"
                f" --steps {FINETUNE_STEPS}"
                for method, backbone, name in zip(METHODS, pretrained, policies)
            ],
            [f"runs/{name}" for name in policies],
        ),
        Stage(
            "Roll both policies out on the same seeds",
            [
                f"eval_simpler.py --task {TASK} --checkpoint runs/{policy} --episodes {EVALUATIONS}"
                f" --workers 1 --name {name}"
                for policy, name in zip(policies, evaluations)
            ],
            [f"{folder}/results.json" for folder in results],
        ),
        Stage(
            "Predict video of held-out episodes",
            [
                f"imagine.py --checkpoint runs/{policy} --data {DATA} --out {video} --windows 32"
                for policy, video in zip(policies, videos)
            ],
            videos,
        ),
        Stage(
            "Write the report",
            [
                f"report.py --out {report} --arms {' '.join(results)} --training {' '.join(runs)}"
                f" --imagined {' '.join(videos)}"
            ],
            [report],
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    if parser.parse_args().dry_run:
        print("\n".join(f"python experiments/{command}" for stage in pipeline() for command in stage.commands))
        return 0

    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"error: another demo is running in {FOLDER.resolve()}; wait for it or stop it", file=sys.stderr)
            return 1
        if failed := run_pipeline(pipeline()):
            return failed

    print()
    for method in METHODS:
        print(f"{method:<14}{headline(Path(f'runs/demo_eval_{method}/results.json'))}")
    print(f"\nReport: {(FOLDER / 'report.html').resolve()}")
    return 0


def run_pipeline(stages: list[Stage]) -> int:
    """Run what is not done yet; returns the exit code of the stage that failed, or 0."""
    start = time.monotonic()
    record = FOLDER / "stages.json"  # {title: {"history", "seconds"}}
    done = json.loads(record.read_text()) if record.exists() else {}
    history = ""  # a stage is done if it, all before it and its outputs are as they were
    for number, (title, commands, outputs) in enumerate(stages, start=1):
        history = hashlib.sha256("\n".join([history, *commands]).encode()).hexdigest()
        print(f"\n[{number}/{len(stages)}] {title}", flush=True)
        if done.get(title, {}).get("history") == history and all(Path(output).exists() for output in outputs):
            print(f"    done before, in {minutes(done[title]['seconds'])}", flush=True)
            continue
        for command in commands:
            print(f"    python experiments/{command}", flush=True)
        stage_start = time.monotonic()
        if failed := run_together(commands):
            print(f"\n'{title}' stopped. To continue from there, run the same command again.", file=sys.stderr)
            return failed
        seconds = time.monotonic() - stage_start
        print(f"    {minutes(seconds)}; {minutes(time.monotonic() - start)} in total", flush=True)
        done[title] = {"history": history, "seconds": round(seconds, 1)}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(temporary, record)
    return 0


def run_together(commands: list[str]) -> int:
    """Run commands side by side; returns 0, or the exit code of the first to fail, which stops the others.

    The first has the terminal, so that its progress is seen; the others do the same work and write to a log.
    """
    processes: list[subprocess.Popen] = []
    logs = [FOLDER / f"{command.split('.py')[0]}_{number}.log" for number, command in enumerate(commands)]
    try:
        for command, log in zip(commands, logs):
            script, *arguments = shlex.split(command)
            with open(log, "w") as file:
                output, errors = (file, subprocess.STDOUT) if processes else (None, None)
                arguments = [sys.executable, str(HERE / script), *arguments]
                processes.append(
                    subprocess.Popen(
                        arguments, env=ENVIRONMENT, stdout=output, stderr=errors, preexec_fn=_stop_with_parent
                    )
                )
        for log in logs[1:]:
            print(f"    (running too: its output goes to {log})", flush=True)
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.2)
    except KeyboardInterrupt:  # the terminal has interrupted the children too
        for process in processes:
            _finish(process)
        return 130
    if not any(codes):
        return 0
    failed, code = next((index, code) for index, code in enumerate(codes) if code)
    for process in processes:
        process.send_signal(signal.SIGINT)
        _finish(process)
    if failed > 0:
        tail = logs[failed].read_text(errors="replace").splitlines()[-20:]
        print("\n".join(["", f"{logs[failed]} ends with:", *tail]), file=sys.stderr)
    return abs(code)


def headline(results: Path) -> str:
    """Counts of one arm; the report has the intervals."""
    episodes = json.loads(results.read_text())["episodes"]
    counts = {"success": sum(episode["success_final"] for episode in episodes)}
    for subgoal in episodes[0]["subgoals"]:
        counts[subgoal.replace("_", " ")] = sum(episode["subgoals"][subgoal] for episode in episodes)
    return ", ".join(f"{name} {count}/{len(episodes)}" for name, count in counts.items())


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _stop_with_parent() -> None:
    """If this process is killed, its children get an interrupt: none goes on writing where the next demo resumes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)


def _finish(process: subprocess.Popen) -> None:
    """Give an interrupted process half a minute to save."""
    try:
        process.wait(timeout=30)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
