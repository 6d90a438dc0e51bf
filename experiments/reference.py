"""Published success rates on SIMPLER beside ours, and how well the simulator ranks policies: MMRV and Pearson.

    python experiments/reference.py                                     the published table
    python experiments/reference.py runs/eval_a runs/eval_b             with results of ours below it
    python experiments/reference.py --json

Published rates are those of SimplerEnv's own metrics file: on the real robot, and in its visual matching. Ours are
shown, by either success rule, only if they were measured by that protocol; a random-seed evaluation is another
experiment and is refused.
MMRV near 0 and Pearson near 1 mean that success in simulation orders policies as the real robot does.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from envs.protocol import PUBLISHED
from envs.tasks import get_task
from selfflow_robot.metrics import mean_maximum_rank_violation, pearson

NUMBERS = Path(__file__).parent.parent / "envs" / "reference_numbers.json"


def published() -> dict[str, dict]:
    """{row: {"real", "visual_matching": {policy: rate}, "mmrv", "pearson"}}"""
    rows = json.loads(NUMBERS.read_text())["tasks"]
    for row in rows.values():
        policies = [policy for policy in row["real"] if policy in row["visual_matching"]]
        real, simulated = ([row[side][policy] for policy in policies] for side in ("real", "visual_matching"))
        row |= {"mmrv": mean_maximum_rank_violation(real, simulated), "pearson": pearson(real, simulated)}
    return rows


def read_result(folder: Path) -> dict:
    """{"row", "name", "score", "score_any", "episodes", "protocol_hash"} of an evaluation, scores at the last and at
    any step. ValueError if it is not comparable."""
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        results = json.loads(path.read_text())
        protocol, scores = results["protocol"], [results["score"][rule] for rule in ("success_final", "success_any")]
        short, count = get_task(protocol["task"]).short, results["summary"]["success_final"]["n"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a complete evaluation: {error!r}") from error
    if protocol["protocol"] != "visual_matching":
        hint = f"python experiments/eval_simpler.py --task {short} --protocol visual_matching"
        raise ValueError(f"{path} was measured by the protocol {protocol['protocol']!r}; the published one: {hint}")
    if short not in PUBLISHED:
        raise ValueError(f"{path}: nothing was published for {short}; published tasks: {', '.join(PUBLISHED)}")
    name = Path(results["checkpoint"] or results["policy"]).name
    return {
        "row": PUBLISHED[short],
        "name": name,
        "score": scores[0],
        "score_any": scores[1],
        "episodes": f"{count}/{protocol['seeds']['count']}",
        "protocol_hash": results["protocol_hash"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="evaluations by visual matching")
    parser.add_argument("--json", action="store_true", help="print one object instead of tables")
    arguments = parser.parse_args()
    try:
        ours = [read_result(folder) for folder in arguments.runs]
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = published()
    if arguments.json:
        print(json.dumps({"published": rows, "ours": ours}))
        return
    policies = list(dict.fromkeys(policy for row in rows.values() for policy in row["real"]))
    table = Table("task", *policies, "MMRV", "Pearson", title="published success: real robot | SIMPLER visual matching")
    for name, row in rows.items():
        cells = [
            f"{row['real'][policy]:.3f} | {row['visual_matching'][policy]:.3f}" if policy in row["real"] else ""
            for policy in policies
        ]
        table.add_row(name, *cells, f"{row['mmrv']:.3f}", f"{row['pearson']:.3f}")
    Console(width=200).print(table)
    if ours:
        columns = ("task", "policy", "at the last step", "at any step", "episodes done", "protocol")
        table = Table(*columns, title="ours, visual matching: success, averaged as upstream does")
        for result in ours:
            scores = [f"{result[name]:.3f}" for name in ("score", "score_any")]
            table.add_row(result["row"], result["name"], *scores, result["episodes"], result["protocol_hash"])
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
