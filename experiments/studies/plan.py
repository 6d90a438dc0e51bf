"""A study as written down in YAML -> the points of its curves -> the jobs that make them, each a call of our scripts.

A point is one arm at one training length with one training seed. Names say what a thing is and hold no state, so that
any machine that shares the folder finds the same jobs, and points that need the same training share it: a run trained
to a length goes on to the next one, and what it was at each length is kept as an exported folder.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import yaml

from .analysis import NOMINAL

FOLDER = Path(__file__).resolve().parent
BUDGETS = ("steps", "compute")
MEASURED = ("evaluate", "probe", "modes")  # kinds of jobs whose output is numbers
OVERHEAD = 20.0  # seconds a script takes to start


@dataclass(frozen=True)
class Study:
    """The YAML's keys; docs/study.md explains them."""

    name: str
    question: str
    task: str
    arms: dict[str, dict]  # {arm: {label, pretrain, finetune, against}}
    plan: list[dict]  # blocks {model, data, labels, budget, arms}, the most important first
    primary: dict  # {first, second, model, data, labels, budget, margin}: the one comparison that decides
    looks: list[int]  # training seeds per arm at each look of the stopping rule
    pretrain: dict  # {lengths, settings}
    finetune: dict
    cost: dict  # {pretrain: {method: multiple}, finetune: {...}, reference}, in plain pretraining steps
    judge: dict  # {episodes, first_seed, test_share}: demonstrations for probes, in no training
    evaluate: dict  # {episodes, on_the_way, first_seed, settings}
    modes: dict  # {windows}
    seconds: dict  # for estimates: {step: {model: s}, episode, demonstration, probe, modes, imagine}
    margin: float = 0.0  # m, of demonstrations and evaluation (`Task.draw`): drawers are opened from anywhere
    runs: str = ""  # the study in whose folder it works, so that what both need is made once; empty: in its own
    text: str = ""  # the file

    @property
    def hash(self) -> str:
        """Of the content: comments and line breaks do not matter."""
        return hashlib.sha256(json.dumps(yaml.safe_load(self.text), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Of trainings, evaluations and measurements, under runs/."""
        return self.runs or self.name

    @property
    def root(self) -> str:
        return f"runs/{self.folder}"

    @property
    def own(self) -> Path:
        """For what is of this study alone: its page, and the versions of its file."""
        return Path("runs", self.name)


class Setting(NamedTuple):
    """What is the same for arms that are compared."""

    model: str
    data: int  # demonstrations whose video is pretrained on
    labels: int  # of them, the first, that are fine-tuned on with their actions
    budget: str

    @classmethod
    def of(cls, block: dict) -> "Setting":
        """Of a block of the plan, or of the primary comparison; without `labels` all demonstrations have them."""
        return cls(block["model"], block["data"], block.get("labels", block["data"]), block["budget"])


class Point(NamedTuple):
    block: int  # of the plan
    setting: Setting
    arm: str
    seed: int  # of the training
    length: int  # fine-tuning steps of a plain arm at equal budget: what curves are drawn over
    steps: int  # fine-tuning steps of this arm
    backbones: tuple[tuple[int, str], ...]  # (length, exported pretraining), the last is fine-tuned
    policy: str  # exported fine-tuning
    evaluation: str
    last: bool  # of its curve


@dataclass(frozen=True)
class Job:
    name: str
    kind: str  # collect, pretrain, finetune, evaluate, probe, modes, imagine
    commands: tuple[tuple[str, ...], ...]  # script and arguments, one after the other
    needs: tuple[str, ...]
    output: str  # done when this says so
    expected: int  # episodes, or step
    seconds: float  # estimate


def load(name: str | Path) -> Study:
    """A study by its name in experiments/studies, or a YAML file. Raises ValueError naming what is wrong with it."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ValueError(f"no study {name} ({path}); there are {known}")
    text = path.read_text()
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    optional = {"runs", "margin"}
    keys = {field.name for field in fields(Study)} - {"name", "text"} - optional
    given = content.keys() - optional if isinstance(content, dict) else set()
    if given != keys:
        raise ValueError(f"{path}: missing or unknown keys: {', '.join(sorted(keys ^ given))}")
    study = Study(name=path.stem, text=text, **content)
    try:
        _check(study, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: something is missing, or of another kind than it should be: {error!r}") from error
    return study


def _check(study: Study, path: Path) -> None:
    for number, block in enumerate(study.plan):
        unknown = [arm for arm in block["arms"] if arm not in study.arms]
        understood = block.keys() - {"labels"} == {"model", "data", "budget", "arms"}
        if unknown or not understood or block["budget"] not in BUDGETS:
            raise ValueError(f"{path}: block {number} of the plan is not understood: {block}")
        if not 0 < Setting.of(block).labels <= block["data"]:
            raise ValueError(f"{path}: block {number} of the plan: labels must be 1 to {block['data']}: {block}")
    for name, arm in study.arms.items():
        if wrong := arm.keys() - {"label", "pretrain", "finetune", "against"}:
            raise ValueError(f"{path}: arm {name} has unknown keys {', '.join(sorted(wrong))}")
        _step_costs(study, name)
    places = [(*Setting.of(block), arm) for block in study.plan for arm in block["arms"]]
    if twice := {str(place) for place in places if places.count(place) > 1}:
        raise ValueError(f"{path}: twice in the plan: {', '.join(sorted(twice))}")
    first, second = study.primary["first"], study.primary["second"]
    if not {first, second} <= {
        arm for block in study.plan if Setting.of(block) == Setting.of(study.primary) for arm in block["arms"]
    }:
        raise ValueError(f"{path}: the plan does not hold its primary comparison, {first} against {second}")
    for lengths in (study.pretrain["lengths"], study.finetune["lengths"], study.looks):
        if not lengths or lengths != sorted(set(lengths)):
            raise ValueError(f"{path}: lengths and looks must rise, got {lengths}")
    if len(study.looks) not in NOMINAL:
        raise ValueError(f"{path}: {len(study.looks)} looks, at most {max(NOMINAL)} are provided for")
    if study.runs and not (path.parent / f"{study.runs}.yaml").exists():
        raise ValueError(f"{path}: runs names a study beside it; there is no {study.runs}.yaml")
    if study.evaluate["on_the_way"] > study.evaluate["episodes"]:
        raise ValueError(f"{path}: on_the_way is more than episodes")


# -------------------------------------------------------------------------------------------------------------- points


def _step_costs(study: Study, arm: str) -> tuple[float | None, float]:
    """Of a step of pretraining (None: there is none) and of fine-tuning, in plain pretraining steps."""
    pretrain, finetune = study.arms[arm].get("pretrain"), study.arms[arm].get("finetune", {})
    kept = finetune.get("method", "self_flow") if finetune.get("self_flow_terms") else "flow_matching"
    try:
        before = study.cost["pretrain"][pretrain["method"]] if pretrain else None
        return before, study.cost["finetune"][kept]
    except KeyError as error:
        raise ValueError(f"study {study.name}: no cost of {error} for arm {arm}") from error


def steps(study: Study, arm: str, budget: str) -> tuple[dict[int, int], dict[int, int]]:
    """{length: steps of this arm} of pretraining and of fine-tuning.

    Equal compute: pretraining costs every arm what it costs the reference, fine-tuning what it costs a plain arm; an
    arm without pretraining spends that share on fine-tuning.
    """
    before, after = _step_costs(study, arm)
    long, short = study.pretrain["lengths"], study.finetune["lengths"]
    if budget == "steps":
        return ({n: n for n in long} if before else {}), {n: n for n in short}
    reference, plain = study.cost["pretrain"][study.cost["reference"]], study.cost["finetune"]["flow_matching"]
    if before is None:
        return {}, {n: round((n * plain + long[-1] * reference) / after) for n in short}
    return {n: round(n * reference / before) for n in long}, {n: round(n * plain / after) for n in short}


def points(study: Study, seeds: int) -> list[Point]:
    """All of the study, the most important first; `seeds` training seeds of the two arms that are compared first, the
    others have those of the first look."""
    found, decides = [], {(Setting.of(study.primary), study.primary[side]) for side in ("first", "second")}
    for number, block in enumerate(study.plan):
        where = Setting.of(block)
        counts = {arm: seeds if (where, arm) in decides else study.looks[0] for arm in block["arms"]}
        for seed in range(max(counts.values())):
            arms = [arm for arm in block["arms"] if seed < counts[arm]]
            found += [point for arm in arms for point in _curve(study, number, block, arm, seed)]
    return found


def _curve(study: Study, number: int, block: dict, arm: str, seed: int) -> Iterable[Point]:
    setting = Setting.of(block)
    before, after = steps(study, arm, setting.budget)
    video = f"{setting.model}_{setting.data}_seed{seed}"
    labelled = setting.labels if setting.labels == setting.data else f"{setting.labels}_of_{setting.data}"
    settings = study.arms[arm].get("pretrain") or {}
    kind = "_".join(f"{value}" if key == "method" else f"{key}_{value}" for key, value in settings.items())
    backbones = tuple((n, f"pretrain_{kind}_{video}_at_{before[n]}") for n in before)
    origin = f"{arm}_from_{before[max(before)]}" if before else arm
    for length, count in after.items():
        run = f"{origin}_{setting.model}_{labelled}_seed{seed}_at_{count}"
        yield Point(
            number, setting, arm, seed, length, count, backbones,
            f"finetune_{run}", f"evaluate_{run}", length == max(after),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- jobs


def jobs(study: Study, found: list[Point]) -> list[Job]:
    """What makes these points, in the order in which it should be made; what a job needs comes before it."""
    made: dict[str, Job] = {}
    chains: dict[str, set[int]] = {}  # {run: lengths it is wanted at}
    for point in found:
        for name in [*(name for _, name in point.backbones), point.policy]:
            run, step = split(name)
            chains.setdefault(run, set()).add(step)
    episodes = {point.evaluation: 0 for point in found}
    for point in found:  # a policy may end one curve and lie on the way of another
        wanted = study.evaluate["episodes" if point.last else "on_the_way"]
        episodes[point.evaluation] = max(episodes[point.evaluation], wanted)

    def add(job: Job) -> str:
        made.setdefault(job.name, job)
        return job.name

    def train(name: str, kind: str, point: Point, extra: list[str], needs: list[str]) -> str:
        run, step = split(name)
        earlier = [n for n in sorted(chains[run]) if n < step]
        if earlier:
            needs = [train(f"{run}_at_{earlier[-1]}", kind, point, extra, needs)]
        script, settings = f"{kind}.py", getattr(study, kind)["settings"]
        model = point.setting.model
        data = point.setting.data if kind == "pretrain" else point.setting.labels
        where = ["--name", f"{study.folder}/{run}", "--data", data_folder(study, data), "--model", model]
        command = [script, *where, "--seed", str(point.seed), "--steps", str(step), *flags(settings), *extra]
        export = ["export.py", "--checkpoint", f"{study.root}/{run}", "--out", f"{study.root}/{name}"]
        cost = _step_costs(study, point.arm)[kind == "finetune"] or 1.0
        seconds = (step - (earlier[-1] if earlier else 0)) * cost * study.seconds["step"][model] + 2 * OVERHEAD
        output = f"{study.root}/{name}/config.json"
        return add(Job(name, kind, (tuple(command), tuple(export)), tuple(needs), output, step, seconds))

    last = {point.policy for point in found if point.last}
    largest = max(block["data"] for block in study.plan)
    for number in range(len(study.plan)):
        ours = [point for point in found if point.block == number]
        for point in ours:
            arm = study.arms[point.arm]
            needs = []
            for _, backbone in point.backbones:
                collected = add(_collect(study, point.setting.data))
                needs = [train(backbone, "pretrain", point, flags(arm["pretrain"]), [collected])]
            needs.append(add(_collect(study, point.setting.labels)))
            # The run's own method is what it was pretrained with; a plain loss unless the arm keeps the terms.
            start = f"{study.root}/{point.backbones[-1][1]}" if point.backbones else "none"
            method = {"method": (arm.get("pretrain") or {"method": "flow_matching"})["method"]}
            extra = ["--pretrained", start, *flags(method | arm.get("finetune", {}))]
            train(point.policy, "finetune", point, extra, needs)
            watched = point.policy in last and point.seed == 0  # of the others only the numbers are wanted
            add(_evaluate(study, point, episodes[point.evaluation], watched))
        for point in (point for point in ours if point.last):
            for _, backbone in point.backbones:
                judged = add(_collect(study, study.judge["episodes"], study.judge["first_seed"]))
                add(_probe(study, backbone, judged))
            shared = add(_collect(study, largest))
            add(_modes(study, point.policy, largest, shared))
            if point.seed == 0:
                add(_imagine(study, point.policy, largest, shared))
    return list(made.values())


def split(name: str) -> tuple[str, int]:
    """ "pretrain_x_at_200" -> ("pretrain_x", 200)."""
    run, _, step = name.rpartition("_at_")
    return run, int(step)


def flags(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", _word(value))]


def _word(value) -> str:
    if isinstance(value, dict):  # as hydra writes it
        return "{" + ", ".join(f"{key}: {_word(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def data_folder(study: Study, episodes: int, first_seed: int = 0) -> str:
    wide = f"_margin_{study.margin}" if study.margin else ""
    return f"data/{study.task}{wide}_{episodes}" + (f"_from_{first_seed}" if first_seed else "")


def _margin(study: Study) -> list[str]:
    return flags({"margin": study.margin}) if study.margin else []


def _collect(study: Study, episodes: int, first_seed: int = 0) -> Job:
    folder = data_folder(study, episodes, first_seed)
    command = ["collect_demos.py", "--task", study.task, "--name", Path(folder).name, "--episodes", str(episodes)]
    command += ["--first_seed", str(first_seed), "--workers", "1", *_margin(study)]
    seconds = episodes * study.seconds["demonstration"] + OVERHEAD
    return Job(
        f"collect_{Path(folder).name}", "collect", (tuple(command),), (), f"{folder}/meta/info.json", episodes, seconds
    )


def _evaluate(study: Study, point: Point, episodes: int, watched: bool) -> Job:
    command = ["eval_simpler.py", "--task", study.task, "--checkpoint", f"{study.root}/{point.policy}"]
    command += ["--name", f"{study.folder}/{point.evaluation}", "--episodes", str(episodes), "--workers", "1"]
    command += ["--first_seed", str(study.evaluate["first_seed"]), *_margin(study)]
    command += flags({"video": watched} | study.evaluate["settings"])
    output = f"{study.root}/{point.evaluation}/results.json"
    seconds = episodes * study.seconds["episode"] + OVERHEAD
    return Job(point.evaluation, "evaluate", (tuple(command),), (point.policy,), output, episodes, seconds)


def _probe(study: Study, backbone: str, judged: str) -> Job:
    name = backbone.replace("pretrain_", "probe_", 1)
    data = data_folder(study, study.judge["episodes"], study.judge["first_seed"])
    command = ["probe.py", "--runs", f"{study.root}/{backbone}", "--data", data, "--name", f"{study.folder}/{name}"]
    command += ["--test_share", str(study.judge["test_share"])]
    output = f"{study.root}/{name}/results.json"
    return Job(name, "probe", (tuple(command),), (backbone, judged), output, 0, study.seconds["probe"])


def _modes(study: Study, policy: str, data: int, collected: str) -> Job:
    name = policy.replace("finetune_", "modes_", 1)
    output = f"{study.root}/{name}/modes.json"
    command = ["modes.py", "--runs", f"{study.root}/{policy}", "--data", data_folder(study, data), "--json", output]
    command += ["--windows", str(study.modes["windows"])]
    return Job(name, "modes", (tuple(command),), (policy, collected), output, 0, study.seconds["modes"])


def _imagine(study: Study, policy: str, data: int, collected: str) -> Job:
    name = policy.replace("finetune_", "imagine_", 1)
    output = f"{study.root}/{name}/imagined.mp4"
    command = ["imagine.py", "--checkpoint", f"{study.root}/{policy}", "--data", data_folder(study, data)]
    command += ["--out", output, "--windows", "0"]
    return Job(name, "imagine", (tuple(command),), (policy, collected), output, 0, study.seconds["imagine"])


def done(job: Job) -> bool:
    """By what its last command leaves behind, wherever and whenever that was made."""
    path = Path(job.output)
    if job.kind == "imagine":
        return path.exists()
    try:
        content = json.loads(path.read_text())
        match job.kind:
            case "collect":
                return content["total_episodes"] >= job.expected
            case "pretrain" | "finetune":
                return content["step"] == job.expected
            case "evaluate":  # episodes that crash the simulator twice are left out, and named
                return len({e["seed"] for e in content["episodes"]} | set(content["crashed"])) >= job.expected
            case _:
                return bool(content)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def needed(all_jobs: list[Job]) -> list[Job]:
    """Without trainings that are not there and that no measurement needs any more, nor pictures of them."""
    keep = {job.name for job in closure(all_jobs, [job.name for job in all_jobs if job.kind in MEASURED])}
    keep |= {job.name for job in all_jobs if done(job)}
    return [job for job in all_jobs if job.name in keep or (job.kind == "imagine" and keep >= set(job.needs))]


def closure(all_jobs: list[Job], wanted: Iterable[str]) -> list[Job]:
    """The jobs `wanted`, and what they need; of what is done only itself, for it may have been made elsewhere."""
    by_name, keep = {job.name: job for job in all_jobs}, set()

    def visit(name: str) -> None:
        if name not in keep:
            keep.add(name)
            for need in () if done(by_name[name]) else by_name[name].needs:
                visit(need)

    for name in wanted:
        visit(name)
    return [job for job in all_jobs if job.name in keep]
