"""A frozen image encoder of the transformers library: what REPA (arXiv 2410.06940) asks the student to predict."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which DINOv2 and its like were trained on


class Encoder(nn.Module):
    """Patch features of single frames. name: on the Hugging Face hub, or a local folder (`from_pretrained`).

    Raises ValueError with the remedy where transformers or the weights are missing.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise ValueError("method repa needs transformers: pip install transformers") from error
        try:
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        except OSError as error:
            remedy = "download it where there is a network, and give its folder as --encoder"
            raise ValueError(f"encoder {name!r} cannot be had ({str(error).splitlines()[0]}): {remedy}") from error
        self.patch = self.model.config.patch_size
        self.width = self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, video: Tensor, grid: tuple[int, int]) -> Tensor:
        """uint8 (B, T, H, W, 3), grid (h, w) of our tokens -> (B, T h w, E): one feature vector per token.

        Frames are resized so that the encoder's patches are our tokens.
        """
        device = next(self.parameters()).device
        frames = video.to(device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        size = [self.patch * side for side in grid]
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        features = self.model(pixel_values=(frames - mean) / std).last_hidden_state  # (B T, special + h w, E)
        return features[:, -grid[0] * grid[1] :].unflatten(0, video.shape[:2]).flatten(1, 2)
