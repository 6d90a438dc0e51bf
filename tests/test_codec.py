import pytest
import torch

from selfflow_robot.codec import Codec, CodecConfig, dct_matrix


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
