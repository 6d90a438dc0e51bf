"""One data set of several: the tasks of a policy, or demonstrations and what was labelled for a policy (DAgger).

    python experiments/merge_demos.py data/open_and_place data/drawers --name mixture

Episodes keep their seeds, so the data sets must have been collected with different ones (`--first_seed`). The same
command again adds what has come since.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders of data sets")
    parser.add_argument("--name", required=True, help="the result is data/<name>")
    arguments = parser.parse_args()
    from selfflow_robot.data import DatasetError, merge

    root = Path("data") / arguments.name
    try:
        info = merge(arguments.data, root)
    except (DatasetError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{root}: {info['total_episodes']} episodes, {info['total_frames']} frames, {info['total_tasks']} instructions"
    )


if __name__ == "__main__":
    main()
