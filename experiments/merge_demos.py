"""One data set of several: the tasks of a policy, or demonstrations and what was labelled for a policy (DAgger).

    python experiments/merge_demos.py data/open_and_place data/drawers --name mixture

Episodes keep their seeds, so the data sets must have been collected with different ones (`--first_seed`). The same
command again adds what has come since.
"""

import argparse
from pathlib import Path

from selfflow_robot.config import in_one_line
from selfflow_robot.data import merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders of data sets")
    parser.add_argument("--name", required=True, help="the result is data/<name>")
    arguments = parser.parse_args()
    root = Path("data") / arguments.name
    with in_one_line():
        info = merge(arguments.data, root)
    print(
        f"{root}: {info['total_episodes']} episodes, {info['total_frames']} frames, {info['total_tasks']} instructions"
    )


if __name__ == "__main__":
    main()
