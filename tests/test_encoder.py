"""REPA's frozen encoder: a tiny random DINOv2 stands in for the real one."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from selfflow_robot.encoder import Encoder
from tests.synthetic import make_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    settings = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
    path = tmp_path_factory.mktemp("dino")
    transformers.Dinov2Model(transformers.Dinov2Config(**settings)).save_pretrained(path)
    return path


def test_one_feature_vector_per_token(folder):
    encoder, video = Encoder(str(folder)), make_batch()["video"]  # (2, 4, 32, 48, 3)
    features = encoder(video, (2, 3))
    assert features.shape == (2, 4 * 2 * 3, 24) and features.dtype == torch.float32
    assert not any(p.requires_grad for p in encoder.parameters())
    swapped = encoder(video.flip(1), (2, 3)).unflatten(1, (4, 6)).flip(1).flatten(1, 2)
    torch.testing.assert_close(swapped, features, atol=1e-5, rtol=1e-5)  # frames are seen one by one


def test_features_belong_to_the_place_they_describe(folder):
    """Changing one token's pixels changes that token's features most."""
    encoder, video = Encoder(str(folder)), make_batch()["video"][:1, :1]
    changed = video.clone()
    changed[:, :, 16:, 32:] = 255 - changed[:, :, 16:, 32:]  # row 1, column 2
    moved = (encoder(changed, (2, 3)) - encoder(video, (2, 3))).norm(dim=-1)[0]
    assert moved.argmax() == 5


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"encoder .* cannot be had .* give its folder as --encoder"):
        Encoder(str(tmp_path / "nothing"))
