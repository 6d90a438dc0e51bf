import itertools
import json
import math

import pytest
import torch

from selfflow_robot import autoencoder, pretrained
from selfflow_robot.codec import Codec, CodecConfig, dct_matrix, to_float, to_uint8
from selfflow_robot.pretrained import CodecError


def smooth_video(b=2, t=2, h=64, w=80):
    """Slow colour waves, uint8 (B, T, H, W, 3)."""
    rows, cols = torch.linspace(0, 3, h)[:, None], torch.linspace(0, 4, w)
    phase = torch.arange(b * t * 3).reshape(b, t, 1, 1, 3)
    return ((torch.sin(rows + cols)[None, None, :, :, None] * torch.cos(phase + rows[..., None])) * 100 + 128).to(
        torch.uint8
    )


def psnr(a, b):
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().mean())


def test_dct_is_orthonormal():
    basis = dct_matrix(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((16,), 0.25, dtype=torch.float64))  # lowest frequency: the mean


def test_pixels_are_lossless():
    video = torch.randint(0, 256, (1, 2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec = Codec(CodecConfig("pixels"))
    latents = codec.fit([video]).encode(video)
    assert latents.shape == (1, 2, 2, 3, 768)
    assert torch.equal(codec.decode(latents), video)
    # the first patch, row by row, colours last
    torch.testing.assert_close(latents[0, 0, 0, 0, :3], video[0, 0, 0, 0].float() / 127.5 - 1)


def test_all_coefficients_lose_nothing():
    video = torch.randint(0, 256, (1, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec = Codec(CodecConfig("dct", luma=16, chroma=16)).fit([video])
    assert torch.equal(codec.decode(codec.encode(video)), video)


def test_default_keeps_smooth_pictures_and_drops_what_it_says():
    video = smooth_video()
    codec = Codec(CodecConfig()).fit([video])
    latents = codec.encode(video)
    assert latents.shape == (2, 2, 4, 5, 12 * 12 + 2 * 6 * 6)
    assert psnr(codec.decode(latents), video) > 45
    stripes = torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8)
    stripes[..., ::2, :] = 255  # the highest frequency is not kept
    assert psnr(codec.decode(codec.encode(stripes)), stripes) < 12


def test_statistics_give_unit_variance_without_amplifying_noise():
    noise = torch.randint(0, 256, (4, 4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codec = Codec(CodecConfig()).fit([noise[:2], noise[2:]])  # pooled over clips
    latents = codec.encode(noise).flatten(0, 3)
    torch.testing.assert_close(latents.std(0), torch.ones(216), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.mean(0), torch.zeros(216), atol=1e-3, rtol=0)
    still = torch.full((1, 1, 32, 32, 3), 77, dtype=torch.uint8)
    assert Codec(CodecConfig()).fit([still]).encode(still).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 1, 32, 32, 3), "uint8"),
        (torch.zeros(1, 32, 32, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 1, 30, 32, 3, dtype=torch.uint8), "multiples of 16"),
    ],
)
def test_wrong_video_is_refused(video, message):
    with pytest.raises(ValueError, match=message):
        Codec(CodecConfig()).encode(video)


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match="choose dct or pixels"):
        CodecConfig("vae")
    with pytest.raises(ValueError, match="keeps 1 to 16"):
        CodecConfig(luma=17)
    with pytest.raises(ValueError, match="needs patch 16 and its network's config"):
        CodecConfig("autoencoder")
    with pytest.raises(ValueError, match="1 to 768 channels"):
        autoencoder.AutoencoderConfig(channels=0)


# ------------------------------------------------------------------------------------------- our own autoencoder

SMALL_AUTOENCODER = CodecConfig("autoencoder", network={"channels": 6, "width": 4})


def random_autoencoder(seed=0):
    """Every weight random, so that nothing is the identity or without a past."""
    torch.manual_seed(seed)
    codec = Codec(SMALL_AUTOENCODER)
    for parameter in codec.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return codec


def noise_video(b=2, t=4, h=32, w=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, t, h, w, 3), dtype=torch.uint8, generator=generator)


def test_autoencoder_never_looks_ahead():
    codec, video = random_autoencoder(), noise_video()
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 2, 3, 6)
    frames = codec.network.decode(latents)
    for t in range(4):
        changed = video.clone()
        changed[:, t] = 255 - changed[:, t]
        other = codec.encode(changed)
        same = [torch.equal(a, b) for a, b in zip(latents.unbind(1), other.unbind(1))]
        assert same == [t_ < t or t_ > t + 2 for t_ in range(4)]  # earlier ones to the bit; the next two do see it
        decoded = codec.network.decode(torch.cat([latents[:, :t], other[:, t : t + 1], latents[:, t + 1 :]], 1))
        same = [torch.equal(a, b) for a, b in zip(frames.unbind(1), decoded.unbind(1))]
        assert same == [t_ < t or t_ > t + 2 for t_ in range(4)]


def test_an_observation_has_the_latents_of_the_whole_clip():
    codec, video = random_autoencoder(), noise_video()
    for t in range(1, 5):
        torch.testing.assert_close(codec.encode(video[:, :t]), codec.encode(video)[:, :t], atol=1e-5, rtol=1e-5)


def test_autoencoder_begins_as_principal_components():
    g = torch.Generator().manual_seed(0)
    waves = torch.randn(3, 16, 16, 3, generator=g)  # patches in a plane of three dimensions: three channels suffice
    patches = torch.einsum("nhwk,kabc->nhawbc", torch.rand(2, 2, 3, 3, generator=g) - 0.5, waves)
    pixels = patches.reshape(2, 32, 48, 3) + 0.1
    for channels, exact in ((3, True), (2, False)):
        network = autoencoder.Autoencoder(autoencoder.AutoencoderConfig(channels=channels, width=4))
        network.begin_linear(pixels)
        error = (network.decode(network.encode(pixels[:, None]))[:, 0] - pixels).abs().max()
        assert (error < 1e-4) == exact, error


def test_autoencoder_learns_what_is_not_linear():
    video = torch.full((4, 3, 32, 32, 3), 40, dtype=torch.uint8)
    for frame, (row, col) in zip(video.flatten(0, 1), itertools.product((2, 7, 11, 18), (3, 8, 17))):
        frame[row : row + 10, col : col + 10] = 220  # sharp edges, anywhere: many components, two numbers
    torch.manual_seed(0)
    network = autoencoder.Autoencoder(autoencoder.AutoencoderConfig(channels=4, width=8))
    network.begin_linear(to_float(video).flatten(0, 1))
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        total, terms = autoencoder.loss(network, to_float(video), 0.1, 1e-4, generator)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms["loss_pixels"].item())
    assert terms["loss_pixels"] + 1e-4 * terms["latent_square"] == pytest.approx(total.item())
    assert losses[-1] < 0.5 * losses[0]
    codec = Codec(CodecConfig("autoencoder", network={"channels": 4, "width": 8}), network).fit([video])
    assert psnr(codec.decode(codec.encode(video)), video) > 10 * math.log10(4 / (1.5 * losses[-1]))
    latents = codec.encode(video).flatten(0, 3)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    assert latents.std(0, correction=0).max() < 1.001


def test_mixed_precision_leaves_learned_latents_alone():
    codec, video = random_autoencoder(), noise_video()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = codec.encode(video)
    assert torch.equal(mixed, codec.encode(video))


def test_hash_is_of_config_weights_and_statistics():
    codec = random_autoencoder()
    copy = Codec(SMALL_AUTOENCODER)
    assert copy.hash() != codec.hash() and copy.weights_hash() != codec.weights_hash()
    copy.load_state_dict(codec.state_dict())
    assert copy.hash() == codec.hash()
    copy.mean += 1
    assert copy.hash() != codec.hash() and copy.weights_hash() == codec.weights_hash()
    linear = [Codec(CodecConfig()), Codec(CodecConfig(luma=11)), Codec(CodecConfig("pixels"))]
    assert len({c.hash() for c in linear}) == 3


# ------------------------------------------------------------------------------------------- through diffusers

PICTURE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
WAN = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
FOLDED = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
TINY = {  # name -> class, config, channels of a token
    "sd": ("AutoencoderKL", PICTURE | BLOCKS, 16),
    "flux2": ("AutoencoderKLFlux2", PICTURE, 16),
    "wan2.1": ("AutoencoderKLWan", WAN, 16),
    "wan2.2": ("AutoencoderKLWan", WAN | FOLDED | {"dim_mult": [1, 2, 2, 2]}, 4),
}


def tiny(name, seed=0):
    """A small one with random weights, as diffusers makes it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    kind, config, channels = TINY[name]
    return getattr(diffusers, kind)(**config), channels


@pytest.mark.parametrize("name", TINY)
def test_published_autoencoders(name):
    network, channels = tiny(name)
    wrapped = pretrained.Pretrained(network)
    video = noise_video()
    config = CodecConfig("diffusers", network=json.loads(json.dumps(wrapped.network)), source="here")
    assert config.channels == channels
    codec = Codec(config, wrapped).fit([video])
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 2, 3, channels)
    torch.testing.assert_close(latents.flatten(0, 3).mean(0), torch.zeros(channels), atol=1e-3, rtol=0)

    # every frame alone, the network's own latents, folded
    pixels = to_float(video[1, 2]).permute(2, 0, 1)[None]  # (1, 3, H, W)
    wan = name.startswith("wan")
    own = network.encode(pixels[:, :, None] if wan else pixels).latent_dist.mode()
    raw = codec.raw(video)[1, 2]  # (h, w, C)
    r = 1 if name == "wan2.2" else 2
    block = own.squeeze(2)[0] if wan else own[0]  # (c, r h, r w)
    torch.testing.assert_close(raw[1, 2], block[:, r : 2 * r, 2 * r : 3 * r].flatten(), atol=1e-5, rtol=1e-5)
    # and back
    direct = network.decode(own).sample
    direct = to_uint8((direct[:, :, 0] if wan else direct)[0].permute(1, 2, 0))
    assert (codec.decode(latents)[1, 2].int() - direct.int()).abs().max() <= 1

    assert list(codec.state_dict()) == ["mean", "std"]  # the weights stay where they are
    codec.double()
    assert next(network.parameters()).dtype == torch.float64  # but they move along


def test_wan_codes_a_clips_first_frame_as_a_picture():
    network, _ = tiny("wan2.1")
    clip = to_float(noise_video(1, 5)).permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
    whole, first = (network.encode(x).latent_dist.mode() for x in (clip, clip[:, :, :1]))
    assert whole.shape[2] == 2  # 5 consecutive frames -> 2 latent frames
    torch.testing.assert_close(whole[:, :, :1], first, atol=1e-5, rtol=1e-5)


def test_weights_from_a_folder(tmp_path):
    for name in ("sd", "wan2.2"):
        network, _ = tiny(name)
        network.save_pretrained(tmp_path / name)
        loaded = pretrained.load(str(tmp_path / name))
        assert loaded.digest() == pretrained.Pretrained(network).digest()
        assert loaded.digest() != pretrained.Pretrained(tiny(name, seed=1)[0]).digest()
        codec = Codec(CodecConfig("diffusers", network=loaded.network, source=str(tmp_path / name)))
        moved = Codec(CodecConfig("diffusers", network=loaded.network, source="elsewhere"), loaded)
        assert codec.hash() == moved.hash()


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(CodecError, match=r"nowhere: no such folder"):
        pretrained.load(str(tmp_path / "nowhere"))

    def offline(*_, **__):
        raise OSError("no network\nand so on")

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", offline)
    with pytest.raises(CodecError, match=r"wan2\.2.*no network\).*hf download .*--codec weights/vae.*train_codec\.py"):
        pretrained.load("wan2.2")
    monkeypatch.undo()
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(CodecError, match="choose one of AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLWan"):
        pretrained.load(str(tmp_path))
    with pytest.raises(CodecError, match="a latent per 32 pixels, tokens need 16"):
        pretrained.channels({"_class_name": "AutoencoderKL", "block_out_channels": [8] * 6, "latent_channels": 4}, 16)
