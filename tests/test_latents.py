import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.finetune import finetune
from experiments.pretrain import pretrain
from experiments.train_codec import crop, psnr, train_codec
from policies.flow_policy import FlowPolicy
from selfflow_robot import autoencoder, checkpoint, data, latents, model
from selfflow_robot.checkpoint import CheckpointError
from selfflow_robot.codec import Codec, CodecConfig
from selfflow_robot.config import FinetuneConfig, PretrainConfig, TrainCodecConfig
from selfflow_robot.data import DatasetError
from selfflow_robot.tokens import Layout, Packer
from tests.synthetic import SMALL, STATS, write_dataset
from tests.test_codec import random_autoencoder, tiny

OFFSETS = {"past": (-1, 0), "future": (2, 4)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return data.open_dataset(write_dataset(tmp_path_factory.mktemp("data") / "moving", episodes=7))  # 84 frames


@pytest.fixture
def windows(dataset):
    for path in (dataset.root / ".cache").glob("latents-*"):
        path.unlink()
    return data.windows(dataset, **OFFSETS, horizon=3)


def linear():
    return Codec(CodecConfig(luma=4, chroma=2))


def groups(dataset, codec, offsets):
    """All clips encoded directly, in the cache's groups: float16 (N, T, h, w, C)."""
    rows = latents.clips(dataset, offsets)
    parts = [rows[i : i + latents.CLIPS] for i in range(0, len(rows), latents.CLIPS)]
    return np.concatenate([codec.raw(torch.from_numpy(dataset.frames[part])).half().numpy() for part in parts])


def test_cache_equals_direct_encoding_to_the_bit(dataset, windows):
    for codec, offsets in ((linear(), (0,)), (random_autoencoder(), (-1, 0, 2, 4))):
        cached = latents.cached(windows, codec, "on")
        expected = groups(dataset, codec, offsets)
        assert cached.latents.dtype == np.float16
        assert np.array_equal(cached.latents, expected[:, 0] if codec.framewise else expected)
        batch = cached.gather(np.arange(len(cached)))  # ends of episodes included
        direct = codec.raw(batch["video"])
        assert batch["latents"].shape == direct.shape
        torch.testing.assert_close(batch["latents"].float(), direct, atol=2e-3, rtol=2e-3)


def test_a_clip_stays_in_its_episode(dataset):
    rows = latents.clips(dataset, (-1, 0, 2))
    assert rows[[0, 5, 11, 12]].tolist() == [[0, 0, 2], [4, 5, 7], [10, 11, 11], [12, 12, 14]]


def test_packing_needs_no_codec_once_cached(windows, monkeypatch):
    layout = Layout(**OFFSETS, horizon=3, text_bytes=16, height=32, width=48)
    for codec in (linear(), random_autoencoder()):
        packer = Packer(layout, codec.fit([windows.gather(range(8))["video"]])).fit_statistics(STATS)
        cached = latents.cached(windows, codec, "on")
        modes = ("policy", "joint_plan", "inverse_dynamics", "pretrain_all")
        fresh = [packer.pack(windows.gather([0, 9, 11]), mode) for mode in modes]
        with monkeypatch.context() as patch:
            patch.setattr(Codec, "raw", lambda *_: pytest.fail("encoded"))
            patch.setattr(data, "decode_video", lambda *_: pytest.fail("decoded"))
            batch = latents.cached(windows, codec, "on").gather([0, 9, 11])
            kept = [packer.pack(batch, mode) for mode in modes]
            # a world model is given the past alone
            packer.pack(
                batch | {"video": batch["video"][:, :2], "video_mask": batch["video_mask"][:, :2]}, "joint_plan"
            )
        for a, b in zip(fresh, kept):
            torch.testing.assert_close(a.x, b.x, atol=3e-2, rtol=1e-2)
            assert a.spans == b.spans and (a.frames is None or torch.equal(a.frames, b.frames))
        wrong = batch | {"latents": batch["latents"][..., :3]}
        with pytest.raises(ValueError, match=r"latents .*3\): this codec gives \(2, 3, "):
            packer.pack(wrong, "policy")
        assert cached.latents is not None


def test_given_latents_say_nothing_of_the_future(windows):
    layout = Layout(**OFFSETS, horizon=3, text_bytes=16, height=32, width=48)
    packer = Packer(layout, random_autoencoder()).fit_statistics(STATS)
    batch = windows.gather([0, 9])
    other = batch | {"video": batch["video"].clone()}
    other["video"][:, 2:] = 255 - other["video"][:, 2:]
    given = slice(0, packer.pack(batch, "joint_plan").prefix)
    a, b, acting = (
        packer.pack(x, "joint_plan").x[:, given] for x in (batch, other, batch | {"video": batch["video"][:, :2]})
    )
    assert torch.equal(a, b) and torch.equal(a, acting)


def test_generated_frames_are_decoded_after_the_given_ones(windows):
    layout = Layout(**OFFSETS, horizon=3, text_bytes=16, height=32, width=48)
    packer = Packer(layout, random_autoencoder()).fit_statistics(STATS)
    batch = windows.gather([3])
    tokens = packer.pack(batch, "joint_plan")
    whole = packer.codec.decode(packer.codec.encode(batch["video"]))
    shown = packer.video(tokens, tokens.x)
    assert shown.shape == (1, 2, 32, 48, 3)
    assert (shown.int() - whole[:, 2:].int()).abs().max() <= 1
    alone = packer.codec.decode(packer.codec.encode(batch["video"])[:, 2:])
    assert not torch.equal(shown, alone)  # their past matters


def test_killed_and_continued_gives_the_same_bits(dataset, windows, monkeypatch):
    codec = linear()
    expected, calls, encode = groups(dataset, codec, (0,))[:, 0], [], latents.encode_rows

    def killed(dataset, codec, frames):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(frames))
        return encode(dataset, codec, frames)

    monkeypatch.setattr(latents, "encode_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        latents.cached(windows, codec, "on")
    path = latents.cache_path(dataset, codec, (0,))
    part = path.with_suffix(".part")
    assert not path.exists() and calls == [32, 32]
    content = part.read_bytes()
    for torn in (content + b"half a group", content[:-5], content[:100], b""):  # killed within a write
        part.write_bytes(torn)
        path.unlink(missing_ok=True)
        calls.clear()
        monkeypatch.setattr(latents, "encode_rows", lambda d, c, f: calls.append(len(f)) or encode(d, c, f))
        cached = latents.cached(windows, codec, "on")
        assert np.array_equal(cached.latents, expected) and not part.exists()
        assert calls == {0: [20], 1: [32, 20], 2: [32, 32, 20]}[{12: 0, -5: 1}.get(len(torn) - len(content), 2)]


def test_a_damaged_cache_is_made_again(dataset, windows):
    codec = linear()
    expected = np.array(latents.cached(windows, codec, "on").latents)
    path = latents.cache_path(dataset, codec, (0,))
    content = path.read_bytes()
    np.save(path, expected[:3])
    other_shape = path.read_bytes()
    for damage in (content[:-1], content[:40], b"", other_shape):
        path.write_bytes(damage)
        assert np.array_equal(latents.cached(windows, codec, "on").latents, expected)


def test_every_codec_and_data_set_has_its_own_cache(dataset, windows):
    first, second = random_autoencoder(0), random_autoencoder(1)
    paths = {latents.cache_path(dataset, codec, (0, 2)) for codec in (first, second, linear())}
    paths.add(latents.cache_path(dataset, first, (0, 3)))  # a causal codec's latents depend on the clip
    assert len(paths) == 4
    assert latents.cache_path(dataset, linear(), (0,)) == latents.cache_path(dataset, linear().fit([torch.zeros(
        1, 1, 32, 32, 3, dtype=torch.uint8)]), (0,))  # not on statistics: raw latents are kept  # fmt: skip
    stale = dataset.root / ".cache" / "latents-0123456789abcdef-0123456789abcdef.npy"
    stale.write_bytes(b"of an earlier state of the data set")
    latents.cached(windows, linear(), "on")
    latents.cached(windows, first, "auto")
    assert not stale.exists() and len(list(stale.parent.glob("latents-*.npy"))) == 2


def test_modes(windows):
    assert latents.cached(windows, linear(), "auto").latents is None
    assert latents.cached(windows, random_autoencoder(), "off").latents is None
    with pytest.raises(ValueError, match="choose auto, on or off"):
        latents.cached(windows, linear(), "maybe")


def test_a_full_disk_is_named_and_continued(dataset, windows, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents.os, "fsync", full)
    with pytest.raises(DatasetError, match=r"latents-.*\(No space left.*--cache_latents off"):
        latents.cached(windows, linear(), "on")
    monkeypatch.undo()
    assert len(latents.cached(windows, linear(), "on").latents) == dataset.num_frames


def test_latents_beyond_float16_are_refused(windows):
    codec = random_autoencoder()
    codec.network.to_latent.bias.data += 1e6
    with pytest.raises(DatasetError, match="exceed float16"):
        latents.cached(windows, codec)


def test_unknown_codecs_are_refused_with_the_choice(windows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'vae': choose dct, pixels, sd, flux2, wan2\.1, wan2\.2, .*train_codec\.py"):
        latents.open_codec("vae", windows)


# ------------------------------------------------------------------------------------------------------ the scripts


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.PRESETS, "tiny", SMALL)
    return write_dataset(Path("data/moving"))


CODEC = {"data": "data/moving", "channels": 5, "width": 4, "batch_size": 2, "crop": 32, "stride": 2, "device": "cpu"}
PRETRAIN = {"data": "data/moving", "batch_size": 2, "future": [1, 2], "device": "cpu", "save_every": 2}
FINETUNE = {"data": "data/moving", "batch_size": 2, "future": [3], "horizon": 3, "device": "cpu", "steps": 2}


def tensors(run):
    return checkpoint.load(Path(run) / "checkpoint")[0]


def test_a_codec_run_continues_to_the_bit_and_reports(workplace, capsys):
    runs = [train_codec(TrainCodecConfig(name=name, steps=4, save_every=2, **CODEC)) for name in ("whole", "part")]
    for path in runs[1].glob("checkpoint/step_00000004*"):
        path.unlink()
    train_codec(TrainCodecConfig(name="part", steps=4, save_every=2, **CODEC))
    whole, part = tensors("runs/whole"), tensors("runs/part")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    assert all(
        torch.equal(v, whole[n.replace("ema", "packer.codec.network", 1)]) for n, v in whole.items() if n[:3] == "ema"
    )
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert ["validation/psnr" in line for line in lines] == [False, True, False, True]
    assert (runs[0] / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "5 channels per 16x16 pixels" in printed and "dct, 216 channels: PSNR" in printed
    with pytest.raises(CheckpointError, match="channels: 5 there, 6 now"):
        train_codec(TrainCodecConfig(name="whole", steps=4, save_every=2, **CODEC | {"channels": 6}))


def test_an_interrupted_codec_is_the_one_of_its_step(workplace, monkeypatch):
    """Saved where nothing was to be measured: the codec for use is made there all the same."""
    loss = autoencoder.loss
    calls = []

    def interrupted(*arguments):
        calls.append(len(calls))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(autoencoder, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_codec(TrainCodecConfig(name="c", steps=9, save_every=8, **CODEC))
    saved = tensors("runs/c")
    assert checkpoint.load(Path("runs/c/checkpoint"))[1]["step"] == 3
    made = {n: v for n, v in saved.items() if n[:3] == "ema"}
    assert made and all(torch.equal(v, saved[n.replace("ema", "packer.codec.network", 1)]) for n, v in made.items())
    assert not torch.equal(saved["packer.codec.mean"], torch.zeros_like(saved["packer.codec.mean"]))  # fitted


def test_own_codec_from_frames_to_a_policy(workplace):
    run = train_codec(TrainCodecConfig(name="codec", steps=2, save_every=2, **CODEC))
    pretrain(PretrainConfig(name="p", codec="runs/codec", steps=2, **PRETRAIN))
    assert list(Path("data/moving/.cache").glob("latents-*-0_1_2.npy"))
    found = finetune(FinetuneConfig(name="f", pretrained="p", **FINETUNE))
    codec = latents.load_codec(run)
    # other weights under the same name
    train_codec(TrainCodecConfig(name="codec", steps=4, save_every=2, **CODEC))
    with pytest.raises(CheckpointError, match=rf"codec_weights: '{codec.weights_hash()}' there, '[0-9a-f]+' now"):
        pretrain(PretrainConfig(name="p", codec="codec", steps=4, **PRETRAIN))
    # what is trained carries its codec
    shutil.rmtree(run)
    policy = FlowPolicy.load(found)
    assert policy.packer.codec.hash() == codec.hash() == checkpoint.load(found / "checkpoint")[1]["codec_hash"]
    finetune(FinetuneConfig(name="f", pretrained=None, **FINETUNE | {"steps": 3}))
    windows = data.windows(data.open_dataset("data/moving"), (0,), (3,), 3)
    assert policy.predict_video(windows.gather([0, 1]), torch.Generator().manual_seed(0)).shape == (2, 1, 32, 48, 3)


def test_a_checkpoint_refuses_other_weights_of_its_codec(workplace):
    weights = Path("weights").absolute()
    tiny("sd")[0].save_pretrained(weights)
    run = pretrain(PretrainConfig(name="p", codec=str(weights), steps=2, **PRETRAIN))
    size = sum(t.numel() for name, t in tensors(run).items() if name.startswith("packer.codec"))
    assert size == 2 * 16  # the statistics alone
    _, packer, manifest = checkpoint.load_model(run)
    assert packer.codec.hash() == manifest["codec_hash"]
    tiny("sd", seed=1)[0].save_pretrained(weights)
    with pytest.raises(CheckpointError, match=rf"trained with codec {manifest['codec_hash'][:16]}, but .* is [0-9a-f]"):
        checkpoint.load_model(run)
    shutil.rmtree(weights)
    with pytest.raises(ValueError, match="no such folder of diffusers weights"):
        checkpoint.load_model(run)


def test_a_run_of_another_kind_is_no_codec(workplace):
    pretrain(PretrainConfig(name="p", steps=2, **PRETRAIN, luma=4, chroma=2))
    with pytest.raises(ValueError, match="p is a pretrain run; a codec is one of"):
        pretrain(PretrainConfig(name="q", codec="p", steps=2, **PRETRAIN))


def test_wrong_settings_of_a_codec_run_are_refused(workplace):
    with pytest.raises(ValueError, match="crop must be a multiple of 16"):
        train_codec(TrainCodecConfig(name="c", steps=1, **CODEC | {"crop": 20}))
    with pytest.raises(ValueError, match="crop 64 is larger than the frames, 32 x 48"):
        train_codec(TrainCodecConfig(name="c", steps=1, **CODEC | {"crop": 64}))


def test_crops_and_interval():
    video = torch.arange(40 * 50).reshape(1, 1, 40, 50, 1).expand(2, 3, -1, -1, 3)
    generator = torch.Generator().manual_seed(0)
    for clip, source in zip(crop(video, 16, generator), video):
        row, col = divmod(int(clip[0, 0, 0, 0]), 50)
        assert torch.equal(clip, source[:, row : row + 16, col : col + 16])
    assert len({int(clip[0, 0, 0, 0]) for clip in crop(video, 16, generator)}) == 2
    assert crop(video, 0, generator).shape == video.shape
    codec, episodes = linear(), [torch.full((2, 1, 32, 32, 3), value, dtype=torch.uint8) for value in (50, 100, 150)]
    noisy = [e + torch.randint(0, 9, e.shape, generator=generator).to(torch.uint8) for e in episodes]
    found = psnr(codec, noisy)
    assert found["validation/psnr_low"] < found["validation/psnr"] < found["validation/psnr_high"]
    assert found["validation/episodes"] == 3
