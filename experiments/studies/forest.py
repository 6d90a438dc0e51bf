"""Differences between arms at one glance: a forest plot of success and of predicted video, and the same as text."""

from typing import NamedTuple

from selfflow_robot.metrics import Estimate

from .analysis import percent

if __package__ == "experiments.studies":  # imported, by a test; else study.py runs as a script, beside report.py
    from experiments import report as parts
else:
    import report as parts

COLOUR = parts.COLOURS[0]


class Row(NamedTuple):
    """One arm less another."""

    label: str
    of: tuple[str, str]  # what was evaluated of the first training seed of each: tells comparisons of studies apart
    success: Estimate  # difference of rates, -1 to 1
    video: Estimate  # dB; NaN where it was not measured
    decides: bool  # the primary comparison of its study


Groups = dict[str, list[Row]]  # {what is the same for the two arms of all its rows: rows}


def chart(groups: Groups) -> str:
    """Inline SVG. Filled: primary comparisons; hollow: exploration."""
    pyplot = parts.load_pyplot()
    places = list(range(sum(len(rows) + 1 for rows in groups.values())))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(8.5, 0.7 + 0.19 * len(places)), sharey=True, gridspec_kw={"width_ratios": (3, 2)}
    )
    place = iter(places)
    ticks = {}
    for title, rows in groups.items():
        across = ("figure fraction", "data")
        axes[0].annotate(title, (0.01, next(place)), xycoords=across, va="center", fontweight="bold", in_layout=False)
        for row in rows:
            ticks[y := next(place)] = row.label
            for axis, found, scale in zip(axes, (row.success, row.video), (100, 1)):
                value, low, high = (scale * bound for bound in found)
                style = {"color": COLOUR, "markerfacecolor": COLOUR if row.decides else "none"}
                axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", markersize=4, capsize=2, **style)
    for axis, name in zip(axes, ("success, percentage points", "video of what moves, dB")):
        axis.axvline(0, color=parts.GREY, linewidth=0.8)
        axis.set(xlabel=name)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    axes[0].set_ylim(len(places) - 0.5, -0.5)
    return parts.draw(figure, "differences between arms, with intervals")


def text(groups: Groups) -> str:
    """For a terminal."""
    width = max((len(row.label) for rows in groups.values() for row in rows), default=0)
    lines = []
    for title, rows in groups.items():
        lines.append(title)
        for row in rows:
            value, low, high = map(percent, row.success)
            points = f"{value} [{low}, {high}]{' *' if row.decides else ''}"
            lines.append(f"  {row.label:<{width}}  {points:<18}  {row.video.text()}")
    return "\n".join(lines)
