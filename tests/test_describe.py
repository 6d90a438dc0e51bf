"""What is printed about checkpoints of every kind, and what is found odd."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.describe import describe, main, show
from selfflow_robot import checkpoint
from tests.synthetic import STATS, make_batch, make_model, make_packer

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {
    "method": "self_flow",
    "identity": {"model": "tiny", "data_hash": "12" * 32, "pretrained": "34" * 32},
    "config": {"data": "data/toys", "steps": 7, "modes": {"policy": 0.75, "world_model": 0.25}},
}


def save(folder, kind="finetune", change=lambda packer, model: None, **more):
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    model = make_model(packer)
    change(packer, model)
    parts = {"model": model, "ema": model, "packer": packer}
    tensors = {k: v.clone() for prefix, part in parts.items() for k, v in checkpoint.collect(prefix, part).items()}
    checkpoint.save(
        folder / "checkpoint", 7, tensors, {"kind": kind, **checkpoint.describe(model, packer), **ABOUT, **more}
    )
    return folder, sum(p.numel() for p in model.parameters())


def test_a_policy(tmp_path):
    folder, parameters = save(tmp_path / "run")
    about = describe(folder)
    assert (about["kind"], about["step"], about["preset"], about["parameters"]) == ("finetune", 7, "tiny", parameters)
    assert about["layout"]["view"] == "overhead" and about["layout"]["horizon"] == 3
    assert about["action"]["trained_on"]["rz"] == {"q01": -0.5, "q99": 1.5}  # STATS
    assert about["action"]["trained_on"]["gripper"] == {"q01": 0, "q99": 1}
    assert about["proprio"]["z"] == {"mean": 2, "std": 2} and STATS["proprio"]["mean"][2] == 2
    assert about["modes"] == {"policy": 0.75, "world_model": 0.25} and about["odd"] == []
    manifest = checkpoint.read_manifest(checkpoint.saved(folder / "checkpoint")[-1])
    assert about["sha256"] == manifest["sha256"] and about["codec_hash"] == manifest["codec_hash"]
    text = show(about)
    for part in (
        "policy and world model", "uint8 (32, 48, 3)", "float32 (3, 7)", "metres and radians per control step",
        "q01   -0.5000, q99    1.5000  rad/step", "data/toys", "12" * 8, "34" * 8, about["sha256"], "policy 0.75",
    ):  # fmt: skip
        assert part in text
    assert "odd" not in text


def test_exported_folders_and_other_kinds(tmp_path):
    folder, parameters = save(tmp_path / "run")
    exported = describe(checkpoint.export(folder, tmp_path / "out"))
    assert exported["weights"] == "ema" and exported["parameters"] == parameters and exported["odd"] == []
    backbone = describe(save(tmp_path / "backbone", "pretrain")[0])
    assert backbone["proprio"] is None and backbone["action"]["trained_on"] is None and backbone["odd"] == []
    assert "video backbone" in show(backbone) and "acts" not in show(backbone)
    codec = describe(save(tmp_path / "codec", "codec")[0])
    assert codec["layout"] is None and codec["action"] is None and codec["odd"] == []
    assert "video codec" in show(codec) and "sees" not in show(codec)


def test_oddities(tmp_path):
    def constant(packer, model):
        stats = {part: {name: values.copy() for name, values in ends.items()} for part, ends in STATS.items()}
        stats["action"]["q99"][3] = stats["action"]["q01"][3]
        stats["proprio"]["std"][9] = 0
        packer.fit_statistics(stats)

    def broken(packer, model):
        packer.proprio_scale[1] = torch.nan
        next(model.parameters()).data.view(-1)[0] = torch.inf

    about = describe(save(tmp_path / "a", change=constant)[0])
    assert about["odd"] == [
        "action rx: never varied in the training data",
        "proprio gripper: never varied in the training data",
    ]
    assert about["action"]["trained_on"]["rx"] is None and "rx        constant" in show(about)
    about = describe(save(tmp_path / "b", change=broken)[0])
    assert len(about["odd"]) == 2 and about["odd"][1] == "packer.proprio_scale: not finite"
    assert json.loads(json.dumps(about, allow_nan=False)) and "std not finite" in show(about)
    early = {"config": {**ABOUT["config"], "steps": 9}, "action": {"names": ["x"], "units": "miles"}}
    about = describe(save(tmp_path / "c", **early)[0])
    assert "another action contract" in about["odd"][0] and about["odd"][1].endswith("step 7 of 9")
    assert "odd:" in show(about)
    assert "kind 'dream' is unknown" in describe(save(tmp_path / "d", "dream")[0])["odd"][0]


def test_altered_tensors_are_noticed(tmp_path):
    folder, _ = save(tmp_path / "run")
    file = checkpoint.tensors_of(checkpoint.saved(folder / "checkpoint")[-1])
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(checkpoint.CheckpointError, match="truncated or altered"):
        describe(folder)
    file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        describe(folder)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs/mine")
    for arguments in (["mine"], []):  # the newest
        monkeypatch.setattr(sys, "argv", ["describe.py", *arguments, "--json"])
        main()
        assert json.loads(capsys.readouterr().out)["path"] == "runs/mine/checkpoint"
    done = subprocess.run(
        [sys.executable, ROOT / "experiments/describe.py", "nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: no checkpoint at nowhere nor in runs/nowhere. Runs there: mine\n"
