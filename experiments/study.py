"""A whole comparison from one file: expands it into jobs, runs what is missing, and reports on one offline page.

    python experiments/study.py --study quick                            every part, in minutes
    python experiments/study.py --study selfflow_vs_flow_matching --list what would run, and how long it takes
    python experiments/study.py --study selfflow_vs_flow_matching        run it, or go on with it
    python experiments/study.py --study selfflow_vs_flow_matching --only seed0 --jobs 2
    python experiments/study.py --study selfflow_vs_flow_matching --report
    python experiments/study.py --study few_labels --keep few_labels.zip     what it measured, in one small file
    python experiments/study.py --study few_labels --take few_labels.zip     and back, on another machine; then as above
    python experiments/study.py --compare first_look longer_look few_labels    differences found so far, side by side

Stop it at any time: the same command goes on. Start it on as many machines as share the folder: each job is claimed by
one of them, and a claim whose holder is gone is taken over. A job that fails is reported and the others go on; the next
start tries it again. All lies in runs/<study>: a folder per training, evaluation and measurement, jobs/ with a log and
a record of each, report.html; with `runs: OTHER` in the file all but the page lies in runs/OTHER. docs/study.md says
what is compared, and why so.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

from envs.workers import write_json, write_text

if __package__:  # imported, by a test; as a script it finds its neighbours beside it
    from experiments.studies import archive, forest, page, plan, results
else:
    from studies import archive, forest, page, plan, results

HERE = Path(__file__).resolve().parent
STALE = 900.0  # seconds without a sign of life after which a claim counts for nothing
HEARTBEAT = 30.0  # seconds between signs of life
RESCAN = 10.0  # seconds between looks at what others have done
POLL = 0.3  # seconds
FAREWELL = 30.0  # seconds an interrupted script has to save


# --------------------------------------------------------------------------------------------------------------- claims


def place() -> list[str]:
    """Where a process number means something: host, its present run, and the container."""
    where = [socket.gethostname()]
    with suppress(OSError):
        where += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return where


def birth(pid: int) -> str | None:
    """When a process began, in ticks of its machine; None if it is gone. A number alone is used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def clock(folder: Path) -> float:
    """Now, by the clock that dates the folder's files: machines that share it may disagree about the time."""
    path = folder / f".clock_{socket.gethostname()}_{os.getpid()}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def claims(folder: Path, name: str) -> list[Path]:
    """Of a job, the latest last."""
    return sorted(folder.glob(f"{name}.claim.*"), key=lambda path: int(path.suffix[1:]))


def claim(folder: Path, name: str) -> Path | None:
    """Take a job; None if another has it.

    Claims are numbered and creating a file that exists fails, so of several who take over a stale claim with the next
    number one succeeds, and nobody removes a claim that counts.
    """
    found = claims(folder, name)
    if found and not stale(found[-1]):
        return None
    number = int(found[-1].suffix[1:]) + 1 if found else 1
    path = folder / f"{name}.claim.{number}"
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    if claims(folder, name)[-1] != path:  # others released and claimed while we looked
        os.close(file)
        path.unlink()
        return None
    holder = {"place": place(), "pid": os.getpid(), "birth": birth(os.getpid()), "since": time.strftime("%F %T")}
    with os.fdopen(file, "w") as opened:
        opened.write(json.dumps(holder))
    return path


def stale(path: Path) -> bool:
    """Whether the holder of a claim is gone: at once where that can be seen, else after STALE seconds of silence."""
    try:
        silent = clock(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return False  # released just now: whoever looks again finds no claim
    except ValueError:
        return silent > STALE  # being written
    if len(holder["place"]) > 1 and holder["place"] == place() and birth(holder["pid"]) != holder["birth"]:
        return True
    return silent > STALE


def release(path: Path) -> None:
    """Remove a claim and those it took over."""
    name, number = path.name.split(".claim.")
    for other in claims(path.parent, name):
        if int(other.suffix[1:]) <= int(number):
            other.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- runner


@dataclass
class Running:
    job: plan.Job
    claim: Path
    slot: int
    process: subprocess.Popen
    rest: list[tuple[str, ...]]  # commands after this one
    began: float = field(default_factory=time.monotonic)
    alive: float = field(default_factory=time.monotonic)  # last sign of life


class Runner:
    """Runs jobs in `slots` processes until nothing is left that it could do."""

    def __init__(
        self, folder: Path, slots: list[dict[str, str]], about: dict, say: Callable[[str], None] | None = None
    ):
        self.folder, self.slots, self.about = folder / "jobs", slots, about
        self.say = say or (lambda line: print(line, flush=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = clock(self.folder)
        self.running: list[Running] = []
        self.done: set[str] = set()
        self.failed: set[str] = set()  # since this runner began, here or elsewhere
        self.elsewhere: set[str] = set()

    def run(self, jobs: list[plan.Job]) -> bool:
        """Do what can be done; True if all jobs are done. Interrupted, it ends its scripts and its claims."""
        waiting, scanned = list(jobs), float("-inf")
        try:
            while True:
                changed = self._reap(jobs)
                self._beat()
                if changed or time.monotonic() - scanned > RESCAN:
                    scanned = time.monotonic()
                    self._scan(waiting)
                    waiting = [job for job in waiting if job.name not in self.done]
                    self._fill(waiting)
                    if not waiting:
                        return True
                    if not self.running and not self._worth_waiting(waiting):
                        return False
                time.sleep(POLL)
        finally:
            self._stop()

    def _scan(self, waiting: list[plan.Job]) -> None:
        """What has been done or has failed since, here or elsewhere."""
        # A script that runs may write more after what says that its job is done.
        passed = self.done | {running.job.name for running in self.running}
        for job in waiting:
            if job.name not in passed and plan.done(job):
                self.done.add(job.name)
            record = self.folder / f"{job.name}.json"
            if record.exists() and record.stat().st_mtime >= self.began and read(record).get("state") == "failed":
                self.failed.add(job.name)
        self.elsewhere.clear()

    def _ready(self, waiting: list[plan.Job]) -> list[plan.Job]:
        busy = self.failed | self.elsewhere | {running.job.name for running in self.running}
        return [job for job in waiting if job.name not in busy and self.done >= set(job.needs)]

    def _fill(self, waiting: list[plan.Job]) -> None:
        free = [slot for slot in range(len(self.slots)) if slot not in {running.slot for running in self.running}]
        for job in self._ready(waiting):
            if not free:
                return
            if (claimed := claim(self.folder, job.name)) is None:
                self.elsewhere.add(job.name)
            elif plan.done(job):  # by another, between our look and our claim
                release(claimed)
                self.done.add(job.name)
            else:
                self._start(job, claimed, free.pop(0))

    def _worth_waiting(self, waiting: list[plan.Job]) -> bool:
        """Whether others are at work on something that is wanted here; if they give up, we take it."""
        return bool(self._ready(waiting)) or bool(self.elsewhere - self.failed)

    def _start(self, job: plan.Job, claimed: Path, slot: int) -> None:
        self.say(f"start  {job.name}")
        first, *rest = job.commands
        try:
            self.running.append(Running(job, claimed, slot, self._popen(job, first, slot), rest))
        except BaseException:
            release(claimed)
            raise

    def _popen(self, job: plan.Job, command: tuple[str, ...], slot: int) -> subprocess.Popen:
        script, *arguments = command
        with open(self.folder / f"{job.name}.log", "a") as log:
            log.write(f"\n$ python experiments/{' '.join(command)}\n")
            log.flush()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | self.slots[slot]
            return subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _reap(self, jobs: list[plan.Job]) -> bool:
        """Take note of scripts that have ended; True if a job has."""
        ended = False
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                continue
            if code == 0 and running.rest:
                running.process = self._popen(running.job, running.rest.pop(0), running.slot)
                continue
            ended = True
            self.running.remove(running)
            self._record(running, code, jobs)
            release(running.claim)
        return ended

    def _record(self, running: Running, code: int, jobs: list[plan.Job]) -> None:
        job, seconds = running.job, time.monotonic() - running.began
        good = code == 0 and plan.done(job)
        record = {"state": "done" if good else "failed", "code": code, "seconds": round(seconds, 1)}
        record |= {"expected_seconds": round(job.seconds, 1), "kind": job.kind, "host": socket.gethostname()}
        record |= {"ended": time.strftime("%F %T"), "commands": job.commands} | self.about
        write_json(self.folder / f"{job.name}.json", record)
        if good:
            self.done.add(job.name)
            states = Counter(other.name in self.done for other in jobs)
            left = [other for other in jobs if other.name not in self.done]
            remaining = duration(remaining_seconds(left, self.folder) / len(self.slots))
            self.say(f"done   {job.name} in {duration(seconds)}; {states[True]}/{len(jobs)}, {remaining} left")
            return
        self.failed.add(job.name)
        log = self.folder / f"{job.name}.log"
        what = f"exit code {code}" if code else f"{job.output} is not what it should be"
        tail = "\n".join(f"       {line}" for line in log.read_text(errors="replace").splitlines()[-4:])
        self.say(f"FAILED {job.name} after {duration(seconds)} ({what}); {log} ends with\n{tail}")

    def _beat(self) -> None:
        for running in list(self.running):
            if time.monotonic() - running.alive < HEARTBEAT:
                continue
            running.alive = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(running.claim)
            latest = claims(self.folder, running.job.name)
            if not latest or latest[-1] != running.claim:  # we were asleep for so long that another took over
                self.say(f"lost   {running.job.name}: another has taken it over")
                self.running.remove(running)
                end([running.process])

    def _stop(self) -> None:
        end([running.process for running in self.running])
        for running in self.running:
            release(running.claim)
        self.running.clear()


def end(processes: list[subprocess.Popen]) -> None:
    """Interrupt scripts, then do without their consent."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    limit = time.monotonic() + FAREWELL
    for process in processes:
        try:
            process.wait(timeout=max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """If this process is killed, its scripts get an interrupt: none goes on writing where the next runner resumes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)


# ------------------------------------------------------------------------------------------------------------ estimates


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def pace(folder: Path) -> dict[str, float]:
    """{kind: how much longer than estimated its jobs took}, the median of those that ran."""
    ratios: dict[str, list[float]] = {}
    for path in folder.glob("*.json"):
        record = read(path)
        if record.get("state") == "done" and record.get("expected_seconds"):
            ratios.setdefault(record["kind"], []).append(record["seconds"] / record["expected_seconds"])
    return {kind: median(values) for kind, values in ratios.items()}


def remaining_seconds(jobs: list[plan.Job], folder: Path) -> float:
    factor = pace(folder)
    return sum(job.seconds * factor.get(job.kind, 1.0) for job in jobs)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def state(job: plan.Job, folder: Path, done: set[str]) -> str:
    """done, running on HOST, failed, ready or waiting. folder: the study's jobs."""
    if job.name in done:
        return "done"
    if (found := claims(folder, job.name)) and not stale(found[-1]):
        return f"running on {read(found[-1]).get('place', ['?'])[0]}"
    if read(folder / f"{job.name}.json").get("state") == "failed":
        return "failed"
    return "ready" if done >= set(job.needs) else "waiting"


def states(jobs: list[plan.Job], folder: Path) -> dict[str, str]:
    done = {job.name for job in jobs if plan.done(job)}
    return {job.name: state(job, folder, done) for job in jobs}


def print_list(jobs: list[plan.Job], folder: Path) -> None:
    found, factor = states(jobs, folder), pace(folder)
    for job in jobs:
        print(f"{found[job.name]:<10} {duration(job.seconds * factor.get(job.kind, 1.0)):>12}  {job.name}")
    kinds = Counter(job.kind for job in jobs)
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    counts = Counter(text.split(" on ")[0] for text in found.values())
    print(", ".join(f"{count} {text}" for text, count in counts.items()))
    left = [job for job in jobs if found[job.name] != "done"]
    print(f"{duration(remaining_seconds(left, folder))} left, one after the other")


# ----------------------------------------------------------------------------------------------------------------- main


def accelerators() -> list[str]:
    """Numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [number for number in visible.split(",") if number.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    whole = [line for line in listed.splitlines() if line.startswith("GPU ")]  # below one, indented, its parts (MIG)
    return [str(number) for number, _ in enumerate(whole)]


def slots(count: int) -> list[dict[str, str]]:
    """What each of `count` jobs at a time finds in its environment: GPUs in turn. 0: one per GPU, or per core."""
    if count < 0:
        raise ValueError(f"jobs must be at least 1, or 0 for one per GPU or core, got {count}")
    gpus = accelerators()
    count = count or len(gpus) or len(os.sched_getaffinity(0))
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {} for number in range(count)]


def require_same_commands(jobs: list[plan.Job], folder: Path) -> None:
    """ValueError if something was made under this name by another command: the file was changed since."""
    changed = []
    for job in jobs:
        made = read(folder / f"{job.name}.json")
        if made.get("state") == "done" and plan.done(job) and made["commands"] != json.loads(json.dumps(job.commands)):
            changed.append(job)
    if changed:
        names = ", ".join(job.name for job in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ValueError(
            f"{len(changed)} jobs were done by other commands ({names}): the study's file was changed. Give the "
            f"new one another file name, which keeps both; or remove those jobs' folders and their records in {folder}"
        )


def note_plan(study: plan.Study) -> None:
    """Every version of the file that ran something is kept, with the time: a change after the fact is seen."""
    path = study.own / "plans.json"
    versions = read(path).get("versions", [])
    if not versions or versions[-1]["hash"] != study.hash:
        versions.append({"hash": study.hash, "since": time.strftime("%F %T"), "text": study.text})
        write_json(path, {"versions": versions})


def selected(study: plan.Study, look: int, patterns: Sequence[str] = ()) -> tuple[list[plan.Point], list[plan.Job]]:
    """Points and jobs of a look of the stopping rule, counted from 0; of the jobs those that a pattern names, if any is
    given, and what they need. What is not done and nothing needs any more, for it was measured elsewhere, is no job."""
    points = plan.points(study, study.looks[look])
    jobs, wanted = plan.needed(plan.jobs(study, points)), []
    for pattern in patterns:
        matches = [job.name for job in jobs if fnmatch(job.name, f"*{pattern}*")]
        if not matches:
            raise ValueError(f"no job is called *{pattern}*; --list shows their names")
        wanted += matches
    return points, plan.closure(jobs, wanted) if patterns else jobs


def report(study: plan.Study, look: int) -> Path:
    points, jobs = selected(study, look)
    folder = Path(study.root) / "jobs"
    return page.write(study, points, jobs, states(jobs, folder), read(study.own / "plans.json"), look)


def compare(names: Sequence[str]) -> Path:
    """All differences between two arms that these studies have found at their last length: printed, and drawn in the
    file that is returned. What two studies share is shown once, with the first of them."""
    groups, shown = {}, set()
    for study in map(plan.load, names):
        points = plan.points(study, study.looks[results.current_look(study)])
        for where, rows in page.difference_groups(study, points, results.Outcomes(study)).items():
            if new := [row for row in rows if row.of not in shown]:
                groups[f"{study.name}: {where}"] = new
                shown |= {row.of for row in new}
    if not groups:
        raise ValueError(f"{', '.join(names)}: no two arms of a comparison are evaluated at the last length yet")
    print(forest.text(groups))
    path = Path("runs/differences.svg")
    write_text(path, *page.pictures(forest.chart(groups)))
    return path


def execute(study: plan.Study, patterns: Sequence[str], count: int) -> int:
    """Look after look, until the stopping rule or the work ends; returns the exit code."""
    folder = Path(study.root)
    runner = Runner(folder, slots(count), {"plan": study.hash})
    note_plan(study)
    look, complete = results.current_look(study), False
    while True:
        _, jobs = selected(study, look, patterns)
        require_same_commands(jobs, folder / "jobs")
        print(f"{study.name}, plan {study.hash}: {len(jobs)} jobs, {len(runner.slots)} at a time", flush=True)
        complete = runner.run(jobs)
        if patterns or look + 1 == len(study.looks) or results.current_look(study) == look:
            break
        look += 1
        print(f"The stopping rule asks for more training seeds: {study.looks[look]} per arm", flush=True)
    if runner.failed:
        print(f"{len(runner.failed)} failed: {', '.join(sorted(runner.failed))}. The same command tries again.")
    print(report(study, look))
    return 0 if complete else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--study", help="name of a file in experiments/studies, or a YAML file")
    which.add_argument(
        "--compare", nargs="+", metavar="STUDY", help="show the differences found so far by one or several, run nothing"
    )
    parser.add_argument("--jobs", type=int, default=0, help="at a time; 0 (default): one per GPU, or per core")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PATTERN",
        help="jobs with one of these in their name (* matches anything), and their needs",
    )  # fmt: skip
    parser.add_argument("--keep", metavar="FILE", help="write what was measured, without weights and videos, as a zip")
    parser.add_argument("--take", metavar="FILE", help="put what such a file holds where this study looks for it")
    parser.add_argument("--list", action="store_true", help="show the jobs, their state and time, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the page from what is there, and run nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a cluster ends a job
    try:
        if arguments.compare:
            print(compare(arguments.compare))
            return 0
        study = plan.load(arguments.study)
        if arguments.take:
            print(f"{archive.take(study, arguments.take)} measurements taken from {arguments.take}")
        if arguments.keep:
            print(f"{archive.keep(study, arguments.keep)} measurements kept in {arguments.keep}")
        if arguments.keep or (arguments.take and not (arguments.list or arguments.report)):
            return 0
        look = results.current_look(study)
        if arguments.list:
            print_list(selected(study, look, arguments.only)[1], Path(study.root) / "jobs")
            return 0
        if arguments.report:
            print(report(study, look))
            return 0
        return execute(study, arguments.only, arguments.jobs)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.", file=sys.stderr)
        return 130
    except (ValueError, OSError, results.ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
