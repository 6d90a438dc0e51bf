import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from experiments.report import read_arm
from policies import load_policy
from selfflow_robot import checkpoint
from selfflow_robot.checkpoint import CheckpointError
from selfflow_robot.grow import grow
from tests.synthetic import SMALL, make_batch, make_model, make_packer


def save(folder, step, value=None, **manifest):
    tensors = {"a": torch.full((3,), float(step if value is None else value))}
    return checkpoint.save(folder, step, tensors, {"kind": "finetune", "method": "self_flow"} | manifest)


def test_newest_complete_step_is_loaded_and_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    tensors, manifest = checkpoint.load(tmp_path)
    assert manifest["step"] == 3 and torch.equal(tensors["a"], torch.full((3,), 3.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md"] + [
        f"step_{step:08d}.{kind}" for step in (2, 3) for kind in ("json", "safetensors")
    ]


def test_a_step_without_its_manifest_does_not_exist(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002.safetensors").write_bytes(b"half")  # killed between the two files
    assert checkpoint.load(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent", "manifest"])
def test_damage_is_named_with_the_way_back(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = path.with_suffix(".safetensors")
    content = data.read_bytes()
    if damage == "truncated":
        data.write_bytes(content[:-4])
    elif damage == "flipped":
        data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "absent":
        data.unlink()
    else:
        path.write_text(path.read_text()[:20])
    with pytest.raises(
        CheckpointError, match=r"step_00000002.*Remove .*step_00000002\.json to continue from step_00000001"
    ):
        checkpoint.load(tmp_path)
    path.unlink()  # the advice
    assert checkpoint.load(tmp_path)[1]["step"] == 1


def test_a_full_disk_leaves_the_last_step(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step_00000002\.safetensors cannot be written \(No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[1]["step"] == 1
    assert not list(tmp_path.glob(".*"))  # no temporary file


def test_other_settings_are_listed():
    with pytest.raises(CheckpointError, match=r"lr: 0\.1 there, 0\.2 now; model\.depth: 4 there, None now"):
        checkpoint.require_same({"lr": 0.1, "model": {"depth": 4}, "b": [1]}, {"lr": 0.2, "b": (1,)}, "runs/x")


def test_future_formats_are_refused(tmp_path):
    path = save(tmp_path, 1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(tmp_path)


def test_find_and_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.newest_run("finetune") is None
    with pytest.raises(CheckpointError, match="Runs there: none"):
        checkpoint.find("mine")
    for i, (name, kind, method) in enumerate(
        [("a", "pretrain", "self_flow"), ("b", "pretrain", "flow_matching"), ("c", "finetune", "self_flow")]
    ):
        path = save(tmp_path / "runs" / name / "checkpoint", 5, kind=kind, method=method)
        os.utime(path, (1000 + i, 1000 + i))
    assert checkpoint.newest_run("pretrain").name == "b"
    assert checkpoint.newest_run("pretrain", "self_flow").name == "a"
    assert checkpoint.newest_run("finetune", "flow_matching") is None
    assert {checkpoint.find(p).resolve() for p in ("a", "runs/a", "runs/a/checkpoint", tmp_path / "runs" / "a")} == {
        tmp_path / "runs" / "a" / "checkpoint"
    }
    with pytest.raises(CheckpointError, match="Runs there: a, b, c"):
        checkpoint.find("d")


def test_a_model_comes_back_with_its_scales(tmp_path):
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    model, averaged = make_model(packer), make_model(packer, seed=1)
    tensors = (
        checkpoint.collect("model", model) | checkpoint.collect("ema", averaged) | checkpoint.collect("packer", packer)
    )
    checkpoint.save(tmp_path, 1, tensors, checkpoint.describe(model, packer))
    for weights, original in (("ema", averaged), ("model", model)):
        loaded, scales, _ = checkpoint.load_model(tmp_path, weights)
        for (name, a), b in zip(loaded.state_dict().items(), original.state_dict().values()):
            assert torch.equal(a, b), name
    assert scales.layout == packer.layout
    assert torch.equal(scales.pack(make_batch(), "joint_plan").x, packer.pack(make_batch(), "joint_plan").x)
    tensors["ema.position.weight"] = tensors["ema.position.weight"][:3]
    checkpoint.save(tmp_path, 2, tensors, checkpoint.describe(model, packer))
    with pytest.raises(CheckpointError, match=r"position\.weight"):
        checkpoint.load_model(tmp_path)


def test_what_the_disk_gives_back_is_checked_before_the_old_step_goes(tmp_path, monkeypatch):
    """A disk that flips a bit on the way: the new step is refused, both earlier ones stay."""
    for step in (1, 2):
        save(tmp_path, step)
    write = checkpoint.save_file

    def flip(tensors, path):
        write(tensors, path)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(checkpoint, "save_file", flip)
    with pytest.raises(CheckpointError, match=r"step_00000003\.safetensors cannot be written .*tensor a reads back"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert [path.stem for path in checkpoint.saved(tmp_path)] == ["step_00000001", "step_00000002"]
    assert checkpoint.load(tmp_path)[1]["step"] == 2


def test_what_a_killed_process_left_is_swept(tmp_path):
    save(tmp_path, 1)
    for name in (".step_00000002.safetensors.123.tmp", ".tmpAbc123", "step_00000002.safetensors"):
        (tmp_path / name).write_bytes(b"half")
    save(tmp_path, 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md"} | {f"step_{n:08d}.{kind}" for n in (1, 3) for kind in ("json", "safetensors")}


def trained(folder, network=SMALL, seed=0, **manifest):
    """A checkpoint of random weights; (model, averaged weights, packer)."""
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    model, averaged = make_model(packer, network, seed), make_model(packer, network, seed + 1)
    tensors = checkpoint.collect("model", model) | checkpoint.collect("ema", averaged)
    tensors |= checkpoint.collect("packer", packer) | {"optimizer.exp_avg.x": torch.zeros(3)}
    about = {"kind": "finetune", "method": "self_flow", "config": {"data": "data/x"}, "identity": {"data_hash": "abc"}}
    checkpoint.save(folder, 7, tensors, about | checkpoint.describe(model, packer) | manifest)
    return model, averaged, packer


def test_exported_folders_load_like_runs(tmp_path):
    model, averaged, packer = trained(tmp_path / "run" / "checkpoint")
    for weights, original in (("ema", averaged), ("model", model)):
        folder = checkpoint.export(tmp_path / "run", tmp_path / weights, weights)
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        loaded, scales, manifest = checkpoint.load_model(folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), original.state_dict().values()))
        assert torch.equal(scales.pack(make_batch(), "joint_plan").x, packer.pack(make_batch(), "joint_plan").x)
        assert manifest["step"] == 7 and manifest["weights"] == weights
        names = load_file(folder / "model.safetensors").keys()
        assert {name.split(".")[0] for name in names} == {"model", "packer"}  # no optimiser
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever reads the card reads the weights
    again = checkpoint.export(tmp_path / "ema", tmp_path / "again")  # of an export
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "ema" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="no weights 'teacher': choose ema or model"):
        checkpoint.export(tmp_path / "run", tmp_path / "x", "teacher")
    (tmp_path / "ema" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or altered"):
        checkpoint.load_model(tmp_path / "ema")


def test_a_bfloat16_export_is_half_as_large_and_computes_the_same_in_bf16(tmp_path):
    trained(tmp_path / "run" / "checkpoint")
    whole = checkpoint.export(tmp_path / "run", tmp_path / "whole")
    half = checkpoint.export(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.62 * sizes[0]  # of a network this small, vectors are a larger part
    tensors = load_file(half / "model.safetensors")
    for name, tensor in tensors.items():
        matrix = name.startswith("model.") and tensor.ndim > 1
        assert tensor.dtype == (torch.bfloat16 if matrix else load_file(whole / "model.safetensors")[name].dtype), name
    outputs = []
    for folder in (whole, half):
        model, packer, _ = checkpoint.load_model(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}  # to train on, and as every function expects
        tokens = packer.pack(make_batch(), "joint_plan")
        z = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            sampler = model.for_inference("cpu")
            outputs += [net(z, torch.full(z.shape[:2], 0.5), tokens)[0] for net in (model, sampler)]
    assert outputs[0].abs().max() > 0 and all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert "the network's matrices bfloat16" in (half / "README.md").read_text()
    again = checkpoint.export(half, tmp_path / "again")  # stays as it is, and says so
    assert (again / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    assert (again / "README.md").read_text() == (half / "README.md").read_text()
    with pytest.raises(CheckpointError, match="dtype 'float16': choose float32 or bfloat16"):
        checkpoint.export(half, tmp_path / "x", dtype="float16")


@pytest.mark.parametrize("growing", [False, True])
def test_a_share_of_the_way_from_where_fine_tuning_began(tmp_path, growing):
    _, began, _ = trained(tmp_path / "first" / "checkpoint")
    network = replace(SMALL, depth=5, width=64, heads=4) if growing else SMALL
    about = {
        "config": {"data": "data/x", "grow": growing, "seed": 3},
        "identity": {"pretrained": checkpoint.load_model(tmp_path / "first")[2]["sha256"]},
    }
    _, tuned, _ = trained(tmp_path / "second" / "checkpoint", network, seed=5, **about)
    began = grow(began, network, seed=3) if growing else began
    folder = checkpoint.export(tmp_path / "second", tmp_path / "out", start=tmp_path / "first", share=0.25)
    model, _, manifest = checkpoint.load_model(folder)
    for mixed, old, new in zip(*(network.state_dict().values() for network in (model, began, tuned)), strict=True):
        torch.testing.assert_close(mixed, 0.75 * old + 0.25 * new)
    assert manifest["share"] == 0.25
    assert "| share of them, the rest as fine-tuning began | 0.25 |" in (folder / "README.md").read_text()
    half = checkpoint.export(tmp_path / "second", tmp_path / "half", "ema", (), "bfloat16", tmp_path / "first", 0.0)
    assert torch.equal(
        load_file(half / "model.safetensors")["model.blocks.0.qkv.weight"], began.blocks[0].qkv.weight.bfloat16()
    )

    for start, share, why in (
        (None, 0.5, "with what fine-tuning began from"),
        (tmp_path / "first", 1.0, "from 0 and below 1"),
        (tmp_path / "first", 1.5, "from 0 and below 1"),
        (tmp_path / "second", 0.5, "was not fine-tuned from"),
    ):
        with pytest.raises(CheckpointError, match=why):
            checkpoint.export(tmp_path / "second", tmp_path / "x", start=start, share=share)
    with pytest.raises(CheckpointError, match=r"has a share of 0\.25 already"):
        checkpoint.export(folder, tmp_path / "x", start=tmp_path / "first", share=0.5)
    for measured in (checkpoint.load_model(tmp_path / "second")[2]["sha256"], None):
        result = {"task": "open_and_place", "checkpoint_hash": measured}
        with pytest.raises(CheckpointError, match="results of open_and_place are those of another checkpoint"):
            checkpoint.export(tmp_path / "second", tmp_path / "x", "ema", [result], None, tmp_path / "first", 0.5)
    assert not (tmp_path / "x").exists()


def test_a_card_has_what_was_measured_of_this_checkpoint(tmp_path):
    trained(tmp_path / "run" / "checkpoint")
    result = {
        "task": "open_and_place",
        "checkpoint_hash": checkpoint.load(tmp_path / "run" / "checkpoint")[1]["sha256"],
        "success_rule": "success_final counts the last step",
        "protocol_hash": "abc123",
        "command": "python experiments/eval_simpler.py --checkpoint run --task open_and_place",
        "protocol": {"protocol": "random", "seeds": {"first": 10000, "count": 100}, "success": "apple inside"},
        "summary": {"success_final": {"k": 80, "n": 100, "rate": 0.8, "low": 0.71, "high": 0.87}},
        "episodes": [{"seed": 10000, "success_final": True, "success_any": True}],
    }
    folder = checkpoint.export(tmp_path / "run", tmp_path / "exported", results=[result])
    card = (folder / "README.md").read_text()
    assert "| open_and_place | success final | 80/100 = 80% [71%, 87%] | random, 10000 and on | abc123 |" in card
    assert f"python experiments/eval_simpler.py --task open_and_place --checkpoint {tmp_path}/exported\n" in card
    assert "- open_and_place: apple inside. success_final counts the last step" in card
    again = checkpoint.export(folder, folder)  # over itself, as with results of the export
    assert (again / "README.md").read_text() == card
    (whole,) = folder.glob("evaluations/open_and_place_abc123_*/results.json")
    assert json.loads(whole.read_text()) == result
    assert read_arm(whole.parent).outcomes("success_final") == {10000: True}
    assert f"report.py --arms FOLDER/evaluations/{whole.parent.name} runs/" in card
    elsewhere = checkpoint.export(folder, tmp_path / "elsewhere")
    assert (elsewhere / whole.relative_to(folder)).read_bytes() == whole.read_bytes()
    checkpoint.export(tmp_path / "run", elsewhere, "model")  # other weights, which nothing was measured of
    assert not list(elsewhere.rglob("results.json")) and "evaluations/" not in (elsewhere / "README.md").read_text()
    published = {"protocol_hash": "def456", "protocol": result["protocol"] | {"protocol": "visual_matching"}}
    result["checkpoint_hash"] = checkpoint.load(folder)[1]["sha256"]
    better = {"summary": {"success_final": {"k": 90, "n": 100, "rate": 0.9, "low": 0.83, "high": 0.94}}}
    checkpoint.export(folder, folder, results=[result | better, result | published])  # beside what it has, or instead
    card = (folder / "README.md").read_text()
    assert "| 90/100 = 90% [83%, 94%] | random, 10000 and on | abc123 |" in card
    assert "| 80/100 = 80% [71%, 87%] | visual matching | def456 |" in card
    assert card.count("/100 =") == 2
    assert (
        len(list(folder.rglob("results.json"))) == 2 and json.loads(whole.read_text())["summary"] == better["summary"]
    )
    noisy = result | {"policy_settings": {"temperature": 1.0}}  # the same episodes, another way to act
    checkpoint.export(folder, folder, results=[noisy])
    card = (folder / "README.md").read_text()
    assert card.count("| abc123 |") == 2 and card.count("| def456 |") == 1
    checkpoint.export(folder, folder, results=[noisy])
    assert (folder / "README.md").read_text() == card
    assert len(list(folder.rglob("results.json"))) == 3
    reset = "upstream's random draws from the seed, robot_xy up to 0.05 m beyond"  # as envs.protocol has it
    wide = {"protocol": result["protocol"] | {"reset": reset}, "protocol_hash": "b"}
    checkpoint.export(folder, folder, results=[result | wide])
    assert "| random, 10000 and on, robot_xy up to 0.05 m beyond | b |" in (folder / "README.md").read_text()
    checkpoint.export(folder, folder, results=[result | {"task": "../../x"}])  # a damaged name stays inside
    assert not [path for path in tmp_path.rglob("results.json") if folder not in path.parents]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for wrong, whose in ((result | {"checkpoint_hash": "f00"}, "open_and_place"), ({"runs": []}, "something else")):
        with pytest.raises(CheckpointError, match=f"the results of {whose}.* are those of another checkpoint"):
            checkpoint.export(tmp_path / "run", folder, "model", results=[wrong])
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before  # a refusal costs nothing
    with pytest.raises(CheckpointError, match="export of its averaged weights"):
        checkpoint.export(folder, tmp_path / "x", "model")


def test_what_came_with_the_repository_is_the_last_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "elsewhere" / "checkpoint")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(ValueError, match=r"no fine-tuned run in runs/. Make one"):
        checkpoint.chosen(None)
    checkpoint.export(tmp_path / "elsewhere", tmp_path / "shipped")
    assert checkpoint.chosen(None) == tmp_path / "shipped"
    trained(tmp_path / "runs" / "mine" / "checkpoint")
    assert str(checkpoint.chosen(None)).endswith("runs/mine")
    assert checkpoint.chosen("other") == "other"


def test_an_exported_policy_acts(tmp_path):
    trained(tmp_path / "run" / "checkpoint")
    folder = checkpoint.export(tmp_path / "run", tmp_path / "exported")
    actions = []
    for path in (tmp_path / "run", folder):
        policy = load_policy(path, execute=1, steps=2)
        policy.reset("open")
        picture = np.zeros((32, 48, 3), np.uint8)
        actions.append(
            policy.act({"images": {"overhead": picture}, "proprio": np.zeros(10, np.float32), "instruction": "open"})
        )
    assert np.array_equal(*actions)


def test_model_card(tmp_path):
    trained(tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint", checkpoint.export(tmp_path, tmp_path / "exported")):
        text = (path / "README.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["library_name"] == "selfflow_robot" and "robotics" in head["tags"]
        for fact in (
            "| model: depth | 4 |",
            "| steps of training | 7 |",
            "| data hash | abc |",
            "load_policy",
            "gripper",
        ):
            assert fact in text, fact
    code = checkpoint.load(tmp_path / "checkpoint")[1]["code"]
    assert code["selfflow_robot"] and len(code.get("commit", 40 * "0")) == 40
