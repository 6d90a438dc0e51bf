"""What a study's folders hold, by point: outcomes of episodes, probes and modes, and the look it is at."""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selfflow_robot.metrics import Estimate

from . import analysis, plan
from .plan import Point, Setting, Study

if __package__ == "experiments.studies":  # imported, by a test; else study.py runs as a script, beside report.py
    from experiments.report import ReportError, read_arm
else:
    from report import ReportError, read_arm

KEY = "success_final"
IDLE = "nothing learned"  # the column of modes.py for what takes no training


class Cell(NamedTuple):
    setting: Setting
    arm: str
    length: int  # fine-tuning steps


def by_cell(points: list[Point]) -> dict[Cell, list[Point]]:
    """The training seeds of every point."""
    cells: dict[Cell, list[Point]] = {}
    for point in points:
        cells.setdefault(Cell(point.setting, point.arm, point.length), []).append(point)
    return cells


def wanted(study: Study, point: Point) -> range:
    """Evaluation seeds of a point."""
    count = study.evaluate["episodes" if point.last else "on_the_way"]
    return range(study.evaluate["first_seed"], study.evaluate["first_seed"] + count)


class Outcomes:
    """Of all evaluations; every file is read once. Raises ReportError naming a damaged one."""

    def __init__(self, study: Study):
        self.study, self.read = study, {}

    def of(self, point: Point, key: str = KEY) -> dict[int, bool]:
        """{evaluation seed: outcome} of one training, as far as it was evaluated."""
        if point.evaluation not in self.read:
            self.read[point.evaluation] = read_arm(Path(self.study.root) / point.evaluation)
        arm = self.read[point.evaluation]
        there = arm.outcomes(key) if arm else {}
        return {seed: there[seed] for seed in wanted(self.study, point) if seed in there}

    def complete(self, points: list[Point], key: str = KEY) -> list[Point]:
        """Those whose evaluation is finished; where the simulator crashed twice an episode may be missing."""
        return [p for p in points if len(self.of(p, key)) + len(self.crashed(p)) >= len(wanted(self.study, p))]

    def crashed(self, point: Point) -> set[int]:
        self.of(point)
        arm = self.read[point.evaluation]
        return set(arm.results.get("crashed", ())) & set(wanted(self.study, point)) if arm else set()

    def table(self, *arms: list[Point], key: str = KEY) -> list[np.ndarray]:
        """bool (S, E) of each of `arms`, lists of the trainings of one cell, on the episodes that all have; complete
        evaluations only, an arm without one is (0, 0)."""
        finished, common = self._common(arms, key)
        return [
            np.array([[self.of(point, key)[seed] for seed in common] for point in points], bool).reshape(
                len(points), len(common) if points else 0
            )
            for points in finished
        ]

    def starts(self, *arms: list[Point], key: str = KEY) -> list[str]:
        """(E,) where the episodes of `table` begin; of an old record, which does not say, each elsewhere."""
        finished, common = self._common(arms, key)
        records = [self.read[point.evaluation].episodes for points in finished for point in points]
        starts = [next((e[seed]["start"] for e in records if "start" in e[seed]), f"seed {seed}") for seed in common]
        return [json.dumps(start, sort_keys=True) for start in starts]

    def same_seeds(self, *arms: list[Point], key: str = KEY) -> list[list[Point]]:
        """Of each arm the trainings whose seed is evaluated completely in all of them, in the same order."""
        finished = [{point.seed: point for point in self.complete(points, key)} for points in arms]
        common = sorted(set.intersection(*(set(points) for points in finished)))
        return [[points[seed] for seed in common] for points in finished]

    def _common(self, arms: tuple[list[Point], ...], key: str) -> tuple[list[list[Point]], list[int]]:
        """The trainings of each arm whose evaluation is complete, and the episodes that all of them have."""
        finished = [self.complete(points, key) for points in arms]
        each = [self.of(point, key) for points in finished for point in points]
        return finished, sorted(set.intersection(*(set(outcomes) for outcomes in each))) if each else []


# --------------------------------------------------------------------------------------------------------- the decision


def primary(study: Study, points: list[Point], budget: str | None = None) -> list[list[Point]]:
    """The trainings of the two arms of the primary comparison, at the last length; of another budget if asked."""
    where = Setting.of(study.primary | ({"budget": budget} if budget else {}))
    found = []
    for side in ("first", "second"):
        arm = study.primary[side]
        found.append([p for p in points if p.setting == where and p.arm == arm and p.last])
    return found


def primary_difference(study: Study, points: list[Point], outcomes: Outcomes, budget: str | None = None):
    """(rates, difference) at the level of the looks; None unless all its trainings were evaluated."""
    arms = primary(study, points, budget)
    if not all(arms) or any(len(outcomes.complete(one)) < len(one) for one in arms):
        return None
    level = analysis.level_of(len(study.looks))
    (first, second), starts = outcomes.table(*arms), outcomes.starts(*arms)
    rates = analysis.rate(first, level, starts=starts), analysis.rate(second, level, starts=starts)
    return rates, analysis.difference(first, second, level, starts=starts)


def current_look(study: Study) -> int:
    """Counted from 0: the first whose data are not complete or after which the rule says stop."""
    for look, seeds in enumerate(study.looks):
        found = primary_difference(study, plan.points(study, seeds), Outcomes(study))
        margin, looks = study.primary["margin"], len(study.looks)
        if found is None or analysis.decide(found[1], look + 1, looks, margin, seeds).stop:
            return look
    return len(study.looks) - 1


# --------------------------------------------------------------------------------------------------------- measurements


def read_json(path: Path) -> dict | None:
    """None where there is no such file. Raises ReportError for a damaged one."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path} is damaged ({error!r}). Delete it and run the study again.") from error
    return content


def probes(study: Study, points: list[Point]) -> dict[tuple, dict[int, dict]]:
    """{(setting, arm, pretraining length): {training seed: its probe.py result}}, of what is there. A
    pretraining is there once per budget, under the first setting and arm that it belongs to."""
    found: dict[tuple, dict[int, dict]] = defaultdict(dict)
    owners: dict[tuple, tuple] = {}
    for point in points:
        for length, backbone in point.backbones if point.last else ():
            whose = (point.setting, point.arm)
            if owners.setdefault((backbone, point.setting.budget), whose) != whose:
                continue
            path = Path(study.root) / backbone.replace("pretrain_", "probe_", 1) / "results.json"
            if content := read_json(path):
                seeds = found[point.setting, point.arm, length]
                seeds[point.seed] = content["runs"][0] | {"baselines": content["baselines"]}
    return dict(found)


def probe_layers(runs: dict[int, dict], target: str) -> dict[int, Estimate]:
    """{block: score over training seeds} of one arm."""
    layers = set.intersection(*(set(run["layers"]) for run in runs.values()))
    scores = {
        int(layer): analysis.over_seeds([run["layers"][layer][target]["value"] for run in runs.values()])
        for layer in layers
    }
    return dict(sorted(scores.items()))


def probe_best(runs: dict[int, dict], target: str) -> dict[int, float]:
    """{training seed: score of its best block}, chosen by cross-validation on the fitted episodes."""
    best = {}
    for seed, run in runs.items():
        scores = [layer[target] for layer in run["layers"].values()]
        best[seed] = max(scores, key=lambda score: -1e9 if score["validated"] is None else score["validated"])["value"]
    return best


def modes(study: Study, points: list[Point]) -> dict[tuple, dict[int, dict[str, float]]]:
    """{(setting, arm): {training seed: {measure: value}}} of modes.py at the last length; one arm is IDLE."""
    found: dict[tuple, dict[int, dict[str, float]]] = defaultdict(dict)
    for point in points:
        path = Path(study.root) / point.policy.replace("finetune_", "modes_", 1) / "modes.json"
        if point.last and (content := read_json(path)):
            for name, arm in ((point.policy, point.arm), (IDLE, IDLE)):
                values = {measure: row[name]["value"] for measure, row in content["measures"].items()}
                found[point.setting, arm][point.seed] = values
    return dict(found)
