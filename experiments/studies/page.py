"""A study's report: one HTML page that loads nothing, in the dress of experiments/report.py, whose parts it is made of.

Every number is computed here from the results that are there; what is not there is said, with the reason.
"""

import re
from collections import Counter
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from envs.workers import write_text
from selfflow_robot.metrics import Estimate

from . import analysis, forest, plan, results
from .plan import Job, Point, Setting, Study
from .results import Cell, Outcomes

if __package__ == "experiments.studies":  # imported, by a test; else study.py runs as a script, beside report.py
    from experiments import report as parts
else:
    import report as parts

STYLE = re.search("<style>.*?</style>", parts.PAGE.template, re.DOTALL).group()
COLOURS = (*parts.COLOURS, "#c0392b", "#16837a", "#b8860b", "#5d6d7e", "#8e5a3c")  # one per arm of a study
MEASURES = {  # of modes.py: title, digits, whether high is good
    "world_model_psnr_moving": ("predicted video, PSNR of what moves, dB", 2, True),
    "world_model_psnr": ("predicted video, PSNR, dB", 2, True),
    "world_model_gap": ("action following, dB lost under wrong actions", 2, True),
    "policy_mm": ("policy's action error, mm", 1, False),
    "inverse_dynamics_mm": ("inverse dynamics' action error, mm", 1, False),
}
CURVE_POINTS = 200  # of a training curve, at most
EXAMPLES = 4  # seeds shown as videos
LISTED = 40  # jobs that are named on the page, at most


def write(study: Study, points: list[Point], jobs: list[Job], states: dict[str, str], plans: dict, look: int) -> Path:
    """The page from what is there; returns its path. states: of the jobs, by name. Raises ReportError for damage.

    Beside it the curves of success as success_1.svg and on, one per setting, for use elsewhere.
    """
    outcomes = Outcomes(study)
    success = success_section(study, points, outcomes)
    content = PAGE.substitute(
        title=escape(f"Study: {study.name}"),
        style=STYLE,
        question=escape(study.question),
        conclusion=conclusion_section(study, points, outcomes, look),
        state=state_section(study, jobs, states, plans),
        success=success,
        differences=difference_section(study, points, outcomes),
        probes=probe_section(study, points),
        modes=modes_section(study, points),
        cosine=cosine_section(study, points),
        examples=example_section(study, points),
        missing=missing_section(study, points, jobs, states),
        plan=escape(study.text),
        command=escape(f"python experiments/study.py --study {study.name}"),
    )
    files = {f"success_{number}.svg": curve for number, curve in enumerate(pictures(success), 1)}
    files["report.html"] = content
    for name, text in files.items():
        write_text(study.own / name, text)
    return study.own / "report.html"


def pictures(html: str) -> list[str]:
    """Its charts, each a file that stands alone."""
    return re.findall("<svg.*?</svg>", html, re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- sections


def sentence(study: Study, points: list[Point], outcomes: Outcomes, look: int) -> str:
    """The conclusion, from the numbers alone; what is missing where there is none yet."""
    first, second = (study.arms[study.primary[side]]["label"] for side in ("first", "second"))
    found = results.primary_difference(study, points, outcomes)
    arms = results.primary(study, points)
    if found is None:
        have = sum(len(outcomes.complete(one)) for one in arms)
        text = f"Not decided yet: {have} of {sum(map(len, arms))} trainings of the primary comparison were evaluated."
        if look:
            before = sentence(study, plan.points(study, study.looks[look - 1]), outcomes, look - 1)
            text += f" The look before said: {before}"
        return text
    rates, gap = found
    seeds, point, count = len(arms[0]), arms[0][0], len(set(outcomes.starts(*arms)))
    episodes = len(results.wanted(study, point))
    few = f" from {count} starts" if count < episodes else ""
    about = (
        f"{study.task.replace('_', ' ')}, {point.setting.data} demonstrations{with_actions(point.setting)}, "
        f"equal {point.setting.budget}, "
        f"{seeds} training seed{'s' if seeds > 1 else ''} per arm, {episodes} episodes each{few}"
    )
    text = analysis.conclusion((first, second), rates, gap, study.primary["margin"], about)
    if seeds == 1:
        text += (
            " With one training seed the interval is over starts alone: it speaks of two checkpoints, not of methods."
        )
    return text


def conclusion_section(study: Study, points: list[Point], outcomes: Outcomes, look: int) -> str:
    text = f"<p><b>{escape(sentence(study, points, outcomes, look))}</b></p>"
    found = results.primary_difference(study, points, outcomes)
    if found is None:
        return text
    decision = analysis.decide(found[1], look + 1, len(study.looks), study.primary["margin"], study.looks[look])
    verb = "Stop" if decision.stop else "Go on"
    text += (
        f"<p>{verb} after look {look + 1} of {len(study.looks)}: {escape(decision.why)}. Intervals of the primary "
        f"comparison are at {100 * (1 - level(study, True)):.1f}%, so that all looks together keep 95%.</p>"
    )
    if study.primary["budget"] == "steps" and (
        compute := results.primary_difference(study, points, outcomes, "compute")
    ):
        counted = found[1].low > 0 or found[1].high < 0
        role = (
            "tested, for the first excludes zero"
            if counted
            else "shown, not tested, for the first does not exclude zero"
        )
        text += f"<p>At equal compute ({role}): {difference_text(compute[1])} points.</p>"
    return text


def state_section(study: Study, jobs: list[Job], states: dict[str, str], plans: dict) -> str:
    counts = Counter(text.split(" on ")[0] for text in states.values())
    lines = [
        f"<p>Plan <code>{study.hash}</code>, {len(jobs)} jobs: "
        + ", ".join(f"{count} {escape(text)}" for text, count in counts.items())
        + (f"; shared with the study {escape(study.runs)}, in its folder.</p>" if study.runs else ".</p>")
    ]
    versions = plans.get("versions", [])
    if len(versions) > 1 or (versions and versions[-1]["hash"] != study.hash):
        history = "; ".join(f"{version['hash']} since {version['since']}" for version in versions)
        lines.append(parts.note(f"The plan was changed after work had begun: {history}; now {study.hash}."))
    rows = []
    for number, block in enumerate(study.plan):
        for arm in block["arms"]:
            before, after = plan.steps(study, arm, block["budget"])
            shown = [str(max(before.values())) if before else "none", ", ".join(map(str, after.values()))]
            rows.append([str(number + 1), *setting_cells(Setting.of(block)), key(study, arm), *shown])
    head = ["block", "model", "demonstrations", "equal", "arm", "pretraining steps", "fine-tuning steps, evaluated at"]
    costs = ", ".join(f"{name} {cost}" for name, cost in study.cost["pretrain"].items())
    return (
        "".join(lines)
        + parts.table(head, rows)
        + f"<p class='small'>A pretraining step costs, in plain steps: {escape(costs)}.</p>"
    )


def success_section(study: Study, points: list[Point], outcomes: Outcomes) -> str:
    cells = results.by_cell(points)
    html = []
    for where in settings(points):
        ours = {c: seeds for c, seeds in cells.items() if c.setting == where and outcomes.complete(seeds)}
        if not ours:
            continue
        arms, lengths = list(dict.fromkeys(c.arm for c in ours)), sorted({c.length for c in ours})
        html.append(f"<h3>{escape(heading(where))}</h3>" + curve_chart(study, ours, arms, outcomes))
        rows = []
        for arm in arms:
            row = [key(study, arm)]
            for length in lengths:
                seeds = ours.get(Cell(where, arm, length), [])
                (table,) = outcomes.table(seeds) if seeds else [None]
                row.append(rate_cell(table, outcomes.starts(seeds)) if table is not None and table.size else "")
            rows.append(row)
        html.append(parts.table(["arm", *(f"{length} steps" for length in lengths)], rows))
    if not html:
        return parts.note("No evaluation is finished yet.")
    note = (
        "Success at the last step of an episode. Table: successes / episodes of all training seeds, 95% Wilson "
        "interval of as many trials as seeds times starts, number of seeds, and of starts where several episodes share "
        "one. Curves: 95% intervals over training seeds and starts together; the points of a "
        "curve are the same trainings at several lengths, so they are not independent of each other. At equal compute "
        "the axis is the fine-tuning steps of a plain arm that cost as much."
    )
    return "".join(html) + f"<p class='small'>{note}</p>"


def curve_chart(study: Study, cells: dict, arms: list[str], outcomes: Outcomes) -> str:
    pyplot = parts.load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 3))
    for place, arm in enumerate(arms):
        ours = {c.length: seeds for c, seeds in cells.items() if c.arm == arm}
        shown = sorted(
            (length, analysis.rate(outcomes.table(seeds)[0], starts=outcomes.starts(seeds)))
            for length, seeds in ours.items()
        )
        # Moved sideways a little, or the intervals of arms hide each other.
        x = [length * (1 + 0.01 * (place - (len(arms) - 1) / 2)) for length, _ in shown]
        y = [100 * estimate.value for _, estimate in shown]
        around = [
            [max(100 * (e.value - e.low), 0) for _, e in shown],
            [max(100 * (e.high - e.value), 0) for _, e in shown],
        ]
        style = {"markersize": 4, "linewidth": 1.3, "capsize": 3, "color": colour(study, arm)}
        axis.errorbar(x, y, around, fmt="o-", label=study.arms[arm]["label"], **style)
    axis.set(xlabel="fine-tuning steps", ylabel="success, % of episodes", ylim=(-3, 103))
    axis.set_xticks(sorted({c.length for c in cells}))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # in the picture: it is a file of its own too
    return f'<div class="scroll wide">{parts.draw(figure, "success against training steps")}</div>'


def comparisons(study: Study, points: list[Point]) -> list[tuple[Setting, str, str]]:
    """(setting, arm, what it is compared with) in the order of the plan."""
    there = {(point.setting, point.arm) for point in points}
    found = [
        (Setting.of(block), arm, other)
        for block in study.plan
        for arm in block["arms"]
        for other in study.arms[arm].get("against", [])
    ]
    return [one for one in dict.fromkeys(found) if {one[:2], one[::2]} <= there]


def difference_groups(study: Study, points: list[Point], outcomes: Outcomes) -> forest.Groups:
    """Every comparison at the last length, as far as it was evaluated; 95% intervals, of the primary one at the level
    of the looks."""
    cells, modes, last = results.by_cell(points), results.modes(study, points), max(study.finetune["lengths"])
    groups: forest.Groups = {}
    for where, arm, other in comparisons(study, points):
        sides = [cells[Cell(where, name, last)] for name in (arm, other)]
        tables = outcomes.table(*sides)
        if not all(table.size for table in tables):
            continue
        decides = is_primary(study, where, arm, other)
        success = analysis.difference(*tables, level(study, decides), starts=outcomes.starts(*sides))
        label = f"{study.arms[arm]['label']} − {study.arms[other]['label']}"
        video = measured_difference(modes, where, arm, other, "world_model_psnr_moving")
        row = forest.Row(label, compared(study, sides), success, video, decides)
        groups.setdefault(heading(where), []).append(row)
    return groups


def is_primary(study: Study, where: Setting, arm: str, other: str) -> bool:
    return (where, arm, other) == (Setting.of(study.primary), study.primary["first"], study.primary["second"])


def level(study: Study, decides: bool) -> float:
    """Of an interval: of the comparison that decides, so that all looks together keep 5%."""
    return analysis.level_of(len(study.looks)) if decides else 0.05


def compared(study: Study, sides: list[list[Point]]) -> tuple[str, str]:
    """What was evaluated of the first training seed of each of two arms."""
    first, second = (f"{study.root}/{side[0].evaluation}" for side in sides)
    return first, second


def measured_difference(modes: dict, where: Setting, arm: str, other: str, measure: str) -> Estimate:
    """Of a measure of modes.py, seed by seed; NaN where it was not measured."""
    first, second = (
        {
            seed: values[measure]
            for seed, values in modes.get((where, name), {}).items()
            if values.get(measure) is not None
        }
        for name in (arm, other)
    )
    return analysis.paired_over_seeds(first, second)


def difference_section(study: Study, points: list[Point], outcomes: Outcomes) -> str:
    cells = results.by_cell(points)
    last = max(study.finetune["lengths"])
    groups, rows, early = difference_groups(study, points, outcomes), [], []
    found = {(title, row.of): row.success for title, group in groups.items() for row in group}
    for where, arm, other in comparisons(study, points):
        for length in study.finetune["lengths"]:
            sides = [cells[Cell(where, name, length)] for name in (arm, other)]
            (first, second), starts = outcomes.table(*sides), outcomes.starts(*sides)
            if not first.size or not second.size:
                continue
            row = [*setting_cells(where), less(study, arm, other)]
            seeds = f"{len(first)}, {len(second)}"
            if length != last:
                gap = analysis.difference(first, second, starts=starts)
                early.append([*row, str(length), seeds, difference_text(gap)])
                continue
            both = outcomes.same_seeds(*sides)
            pairs = analysis.mcnemar(*outcomes.table(*both), outcomes.starts(*both)) if all(both) else []
            values = ", ".join(f"{pair.p_value:.2g}&nbsp;({pair.only_first}:{pair.only_second})" for pair in pairs)
            estimate = difference_text(found[heading(where), compared(study, sides)])
            rows.append([*row, "success", seeds, estimate, f"<span class='wrap'>{values}</span>"])
            for subgoal in subgoals(outcomes, sides[0]):
                one, two = outcomes.table(*sides, key=subgoal)
                alone = not (np.array_equal(one, first) and np.array_equal(two, second))  # else it is the success
                if one.size and two.size and alone:
                    at = level(study, is_primary(study, where, arm, other))
                    gap = analysis.difference(one, two, at, starts=outcomes.starts(*sides, key=subgoal))
                    text = difference_text(gap)
                    rows.append([*[""] * 4, escape(parts.label(subgoal)), "", text, ""])
    if not rows and not early:
        return parts.note("No two arms of a comparison are evaluated at the same length yet.")
    head = ["model", "demonstrations", "equal", "difference"]
    note = (
        "Percentage points; 95% intervals from a bootstrap over training seeds and starts together (Student's t, "
        "never narrower than Newcombe's paired interval). McNemar's exact p per training seed, with the starts of "
        "which one of the two checkpoints solved more: it compares those, not the methods. All but the primary "
        "comparison is exploration: of twenty such intervals one misses zero by chance. In the picture it is filled; "
        "its interval at the last length is that of the looks."
    )
    html = ""
    if rows:
        html = f'<div class="scroll wide">{forest.chart(groups)}</div>'
        html += parts.table([*head, f"after {last} steps", "seeds", "points", "McNemar per seed"], rows)
    if early:
        shown = parts.table([*head, "steps", "seeds", "points"], early)
        html += f"<details><summary>at the other lengths</summary>{shown}</details>"
    return html + f"<p class='small'>{note}</p>"


def probe_section(study: Study, points: list[Point]) -> str:
    found = results.probes(study, points)
    if not found:
        return parts.note("No probe is finished yet.")
    pyplot, html = parts.load_pyplot(), []
    last = max(study.pretrain["lengths"])
    for where in settings(points):
        ours = {arm: runs for (place, arm, length), runs in found.items() if place == where and length == last}
        if not ours:
            continue
        targets = common_targets(ours.values())
        figure, axes = pyplot.subplots(1, len(targets), figsize=(2.5 * len(targets), 2.6), squeeze=False)
        rows = []
        for axis, target in zip(axes[0], targets):
            for arm, runs in ours.items():
                layers = results.probe_layers(runs, target)
                line = dict(color=colour(study, arm))
                axis.plot(list(layers), [e.value for e in layers.values()], linewidth=1.3, **line)
                axis.fill_between(list(layers), *zip(*((e.low, e.high) for e in layers.values())), alpha=0.15, **line)
            baselines = next(iter(next(iter(ours.values())).values()))["baselines"]
            for style, name in ((":", "untrained"), ("--", "pixels")):
                axis.axhline(baselines[name][target]["value"], linestyle=style, color=parts.GREY, linewidth=1)
            axis.set(xlabel="block", title=target.replace("_", " "))
        for arm, runs in ours.items():
            scores = [analysis.over_seeds(list(results.probe_best(runs, target).values())) for target in targets]
            rows.append([key(study, arm), *(score.text() for score in scores)])
        for place, arm, other in comparisons(study, points):
            if place == where and arm in ours and other in ours:
                gaps = [
                    analysis.paired_over_seeds(results.probe_best(ours[arm], t), results.probe_best(ours[other], t))
                    for t in targets
                ]
                rows.append([less(study, arm, other), *(gap.text() for gap in gaps)])
        html.append(f"<h3>{escape(heading(where))}, after {last} pretraining steps</h3>" + legend(study, list(ours)))
        html.append(f'<div class="scroll wide">{parts.draw(figure, "probe accuracy by block")}</div>')
        html.append(parts.table(["best block", *(escape(t.replace("_", " ")) for t in targets)], rows))
    note = (
        "R^2 of positions, balanced accuracy of the rest, on demonstrations that no run was trained on; 95% intervals "
        "over training seeds (none for one). A pretraining that several arms or settings share is shown once. Dotted: "
        "untrained; dashed: a small picture."
    )
    return "".join(html) + f"<p class='small'>{note}</p>"


def common_targets(arms) -> list[str]:
    layers = [layer for runs in arms for run in runs.values() for layer in run["layers"].values()]
    return [target for target in layers[0] if all(target in layer for layer in layers)]


def modes_section(study: Study, points: list[Point]) -> str:
    found = results.modes(study, points)
    if not found:
        return parts.note("No measurement of the modes is finished yet.")
    html = []
    for where in settings(points):
        ours = {arm: seeds for (place, arm), seeds in found.items() if place == where}
        if not ours:
            continue
        (idle, *_), rows = ours.pop(results.IDLE).values(), []
        for arm, seeds in ours.items():
            estimates = {m: analysis.over_seeds([values.get(m) for values in seeds.values()]) for m in MEASURES}
            rows.append([key(study, arm), *(estimates[m].text(digits) for m, (_, digits, _) in MEASURES.items())])
        rows.append(
            ["nothing learned", *(analysis.over_seeds([idle.get(m)]).text(d) for m, (_, d, _) in MEASURES.items())]
        )
        for place, arm, other in comparisons(study, points):
            if place != where or arm not in ours or other not in ours:
                continue
            cells = [
                measured_difference(found, where, arm, other, measure).text(digits)
                for measure, (_, digits, _) in MEASURES.items()
            ]
            rows.append([less(study, arm, other), *cells])
        head = [f"{title} ({'high' if high else 'low'} is good)" for title, _, high in MEASURES.values()]
        html.append(f"<h3>{escape(heading(where))}</h3>" + parts.table(["", *map(escape, head)], rows))
    note = (
        "At the last length, on the same held-out windows with the same noise (experiments/modes.py); 95% intervals "
        "over training seeds, of differences seed by seed."
    )
    return "".join(html) + f"<p class='small'>{note}</p>"


def cosine_section(study: Study, points: list[Point]) -> str:
    """Of student and teacher against pretraining steps: whether there is anything left to learn from it."""
    curves: dict[str, list[tuple[int, float]]] = {}
    seen = set()
    for point in points:
        if point.backbones and point.seed == 0 and point.setting.budget == "steps" and point.arm not in curves:
            run = plan.split(point.backbones[-1][1])[0]
            read = parts.read_curves(Path(study.root) / run / "metrics.jsonl").get("cosine", {})
            line = sorted(read.items())[:: max(len(read) // CURVE_POINTS, 1)]
            if line and run not in seen:
                curves[point.arm] = line
                seen.add(run)
    if not curves:
        return parts.note("No pretraining with a feature loss yet.")
    pyplot = parts.load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 2.6))
    for arm, line in curves.items():
        axis.plot(*zip(*line), color=colour(study, arm), linewidth=1)
    axis.set(xlabel="pretraining steps", ylabel="cosine", ylim=(min(0, axis.get_ylim()[0]), 1.02))
    ends = ", ".join(f"{escape(study.arms[arm]['label'])} {line[-1][1]:.2f}" for arm, line in curves.items())
    note = f"Of the student's projected and the teacher's features, training seed 0; at the end: {ends}."
    note = f"<p class='small'>{note}</p>"
    return legend(study, list(curves)) + f'<div class="scroll wide">{parts.draw(figure, "cosine")}</div>' + note


def example_section(study: Study, points: list[Point]) -> str:
    html = []
    shown: set[str] = set()
    for point in points:
        name = point.policy.replace("finetune_", "imagine_", 1)
        path = Path(study.root) / name / "imagined.mp4"
        if point.last and point.seed == 0 and point.arm not in shown and path.exists():
            shown.add(point.arm)
            caption = f"{key(study, point.arm)}: real, then imagined under true, shuffled and no actions"
            html.append(parts.video(path, caption))
    imagined = f'<div class="pair">{"".join(html)}</div>' if html else parts.note("No imagined video yet.")
    arms = [one[0] for one in results.primary(study, points) if one]
    arms = [arm for point in arms if (arm := parts.read_arm(Path(study.root) / point.evaluation))]
    return imagined + (
        parts.rollout_section(arms, EXAMPLES) if len(arms) == 2 else parts.note("No rollouts of both arms yet.")
    )


def missing_section(study: Study, points: list[Point], jobs: list[Job], states: dict[str, str]) -> str:
    """Every job that is not done, and why."""
    left = [job for job in jobs if states[job.name] != "done"]
    if not left:
        return "<p>Everything that the plan holds was run.</p>"
    by_name = {job.name: job for job in jobs}
    reasons = {job.name: reason(job, by_name, states) for job in left}
    counts = Counter((job.kind, why_kind(reasons[job.name])) for job in left)
    rows = [[escape(kind), escape(why), str(count)] for (kind, why), count in counts.items()]
    named = [[escape(job.name), escape(reasons[job.name])] for job in left]
    named.sort(key=lambda row: not row[1].startswith("failed"))
    more = f"<p class='small'>and {len(named) - LISTED} more</p>" if len(named) > LISTED else ""
    detail = parts.table(["job", "why"], named[:LISTED]) + more
    blocks = block_progress(study, points, states)
    return (
        parts.table(["block", "model", "demonstrations", "equal", "evaluations done"], blocks)
        + parts.table(["kind", "why it was not run", "jobs"], rows)
        + f"<details><summary>by name</summary>{detail}</details>"
    )


def block_progress(study: Study, points: list[Point], states: dict[str, str]) -> list[list[str]]:
    rows = []
    for number, block in enumerate(study.plan):
        names = {point.evaluation for point in points if point.block == number}
        finished = sum(states.get(name) == "done" for name in names)
        rows.append([str(number + 1), *setting_cells(Setting.of(block)), f"{finished} of {len(names)}"])
    return rows


def reason(job: Job, by_name: dict[str, Job], states: dict[str, str]) -> str:
    if states[job.name] == "failed":
        return "failed: see its log"
    if states[job.name].startswith("running"):
        return states[job.name]
    for need in job.needs:
        if states[need] != "done":
            above = reason(by_name[need], by_name, states)
            if above.startswith("failed"):
                return f"failed: {need}" if states[need] == "failed" else above
    return "not here: the time given to the study ended before, or it was made elsewhere"


def why_kind(text: str) -> str:
    return text.split(":")[0].split(" on ")[0]


# --------------------------------------------------------------------------------------------------------------- pieces


def settings(points: list[Point]) -> list[Setting]:
    return list(dict.fromkeys(point.setting for point in points))


def setting_cells(where: Setting) -> list[str]:
    """Of a table: model, demonstrations, equal."""
    return [escape(where.model), f"{where.data}{with_actions(where)}", escape(where.budget)]


def with_actions(where: Setting) -> str:
    """After a number of demonstrations: how many have their actions, where not all have."""
    return f", {where.labels} of them with actions" if where.labels < where.data else ""


def heading(where: Setting) -> str:
    count = f"{where.data} demonstrations{with_actions(where)}"
    return f"{count}, preset {where.model}, equal {where.budget}"


def colour(study: Study, arm: str) -> str:
    return COLOURS[list(study.arms).index(arm) % len(COLOURS)]


def key(study: Study, arm: str) -> str:
    return f'<span class="key" style="background:{colour(study, arm)}"></span>{escape(study.arms[arm]["label"])}'


def less(study: Study, arm: str, other: str) -> str:
    """A difference of two arms; a narrow table breaks it between them."""
    one, two = (f'<span class="whole">{key(study, name)}</span>' for name in (arm, other))
    return f'<span class="wrap">{one}&nbsp;− {two}</span>'


def legend(study: Study, arms: list[str]) -> str:
    return f'<p class="legend">{"".join(f"<span>{key(study, arm)}</span>" for arm in arms)}</p>'


def subgoals(outcomes: Outcomes, points: list[Point]) -> list[str]:
    arm = outcomes.read.get(points[0].evaluation) if points else None
    return list(dict.fromkeys(name for episode in arm.episodes.values() for name in episode["subgoals"])) if arm else []


def rate_cell(table: np.ndarray, starts: list[str]) -> str:
    found, count = analysis.wilson(table, starts), len(set(starts))
    few = f", {count} starts" if count < len(starts) else ""
    return (
        f"<b>{found.value:.0%}</b> {int(table.sum())}/{table.size} "
        f"<span class='small'>[{found.low:.0%}, {found.high:.0%}], {len(table)}{few}</span>"
    )


def difference_text(found: Estimate) -> str:
    value, low, high = map(analysis.percent, found)
    return f"<b>{value}</b> <span class='small'>[{low}, {high}]</span>"


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
$style
</head>
<body>
<h1>$title</h1>
<p>$question</p>
$conclusion
<h2>What was planned, and what was done</h2>
$state
<h2>Success against training</h2>
$success
<h2>Differences between arms</h2>
$differences
<h2>What the layers know</h2>
$probes
<h2>World model and actions</h2>
$modes
<h2>Does the cosine saturate?</h2>
$cosine
<h2>Imagined and real</h2>
$examples
<h2>What was not run, and why</h2>
$missing
<h2>Reproduce</h2>
<pre>$command</pre>
<details><summary>the plan</summary><pre>$plan</pre></details>
</body>
</html>
""")
