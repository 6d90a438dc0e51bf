"""Write a run as a folder in Hugging Face's layout: config.json, model.safetensors, README.md (the model card).

    python experiments/export.py --checkpoint finetune_self_flow --out exported/policy
    python experiments/export.py --checkpoint exported/policy --out exported/policy --results runs/eval_policy
    python experiments/export.py --checkpoint second --pretrained runs/first --share 0.5    half-way to it
    hf upload my_name/my_policy exported/policy

`checkpoint.load_model`, `policies.load_policy` and --checkpoint of every script take such a folder like a run. It has
the averaged weights (or --weights model: the ones in training) and no optimiser, so training cannot continue from it;
fine-tuning can start from it (--pretrained exported/backbone). --dtype bfloat16 makes it half as large: where the
processor computes in bf16 its outputs are the same to the bit, elsewhere those of matrices rounded to 8 bits.
--share 0.5 with the --pretrained that a policy was fine-tuned from takes the weights half-way between the two: where
fine-tuning taught something new and undid something old, there may be both. Evaluations given as --results are in its
card, beside those that the checkpoint has already where it is an export itself, and how each episode ended in
evaluations/, which report.py compares with another policy's.
"""

import json
from pathlib import Path

from selfflow_robot.config import ExportConfig, run


def export(cfg: ExportConfig) -> Path:
    """Returns the folder written."""
    from selfflow_robot import checkpoint

    source = checkpoint.chosen(cfg.checkpoint)
    results = [json.loads((Path(run) / "results.json").read_text()) for run in cfg.results]
    out = cfg.out or Path("exported") / Path(source).name
    folder = checkpoint.export(source, out, cfg.weights, results, cfg.dtype, cfg.pretrained, cfg.share)
    weights = checkpoint.read_manifest(folder / "config.json")["weights"]
    size = (folder / checkpoint.EXPORTED).stat().st_size / 1e6
    print(f"{folder}: {weights} weights of {source}, {size:.0f} MB")
    return folder


if __name__ == "__main__":
    run(ExportConfig, export)
