"""Fit what reads the world model's pictures: drawer opening, task done, steps left, where the hand is.

    python experiments/judge.py --checkpoint runs/finetune_self_flow

Ridge regressions on the network's own features of demonstrations, real and as the world model imagines them; scored on
held-out episodes. Writes judge.safetensors and judge.json into the run's folder, where `WorldModelEnv`,
`eval_simpler.py --samples N` and `rank_policies.py` find it.
"""

import argparse
import json
from pathlib import Path

from envs.workers import progress
from policies import judge as judging
from policies.flow_policy import FlowPolicy
from selfflow_robot import checkpoint
from selfflow_robot.config import in_one_line
from selfflow_robot.data import open_dataset


def make(run: str | Path, data: str | Path, frames: int, imagined: int, steps: int) -> dict:
    """Fits and saves the judge of a run; returns what judge.json says."""
    policy, dataset = FlowPolicy.load(run, steps=steps), open_dataset(data)

    def watch(split, count, imagined):
        name = f"{'imagined' if imagined else 'real'} frames, {split}"
        with progress(name, count) as update:
            return judging.watch(policy, dataset, split, count, imagined, lambda done, total: update(done, ""))

    judge = judging.fit([watch("train", frames, False), watch("train", imagined, True)])
    held_out = {kind: watch("validation", 300, kind == "imagined") for kind in ("real", "imagined")}
    about = {
        "checkpoint_hash": policy.manifest["sha256"],
        "data_hash": dataset.hash,
        "frames": frames,
        "imagined": imagined,
        "sample_steps": steps,
        "errors": {kind: judging.errors(judge, seen) for kind, seen in held_out.items()},
    }
    judging.save(judge, checkpoint.run_folder(run), about)
    return about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or folder (default: the newest fine-tuned run, or the one shipped)")
    parser.add_argument("--data", type=Path, default=Path("data/open_and_place"), help="default %(default)s")
    parser.add_argument("--frames", type=int, default=4000, help="real ones fitted on (default 4000)")
    parser.add_argument("--imagined", type=int, default=1000, help="imagined ones fitted on (default 1000)")
    parser.add_argument("--sample_steps", type=int, default=8, help="of the flow sampler (default 8)")
    parser.add_argument("--json", action="store_true", help="print judge.json's facts as one object")
    arguments = parser.parse_args()
    with in_one_line():
        run = checkpoint.chosen(arguments.checkpoint)
        about = make(run, arguments.data, arguments.frames, arguments.imagined, arguments.sample_steps)
    if arguments.json:
        print(json.dumps(about))
        return
    print(f"The judge of {run}, errors on held-out episodes:")
    names = list(about["errors"]["real"])
    print(f"{'frames':10}" + "".join(f"{name:>24}" for name in names))
    for kind, errors in about["errors"].items():
        print(f"{kind:10}" + "".join(f"{errors[name]:24.2f}" for name in names))


if __name__ == "__main__":
    main()
