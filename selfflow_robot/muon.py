"""Muon (Jordan et al. 2024), torch's own, where bf16 is fast, and the same in float32 elsewhere.

torch's orthogonalises in bf16 whatever the machine. A processor without bf16 units emulates it, and its steps take 10
(preset tiny) to 18 times (small) as long as those in float32 (`benchmark.py train`: muon_speedup).
"""

import torch
from torch import Tensor

from selfflow_robot.model import computes_bf16


def make_muon(matrices: list[Tensor], lr: float, weight_decay: float) -> torch.optim.Muon:
    """An optimizer of matrices whose steps have AdamW's size, so that its learning rate is AdamW's."""
    kind = torch.optim.Muon if computes_bf16(matrices[0].device) else Float32Muon
    return kind(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class Float32Muon(torch.optim.Muon):
    """Same state as torch's, so that a run may continue on a machine of the other kind."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(average, momentum)  # Nesterov
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(update, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)  # "match_rms_adamw"


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """U S V^T -> about U V^T, its singular values pushed towards 1 by steps of s <- a s + b s^3 + c s^5 (in all of
    them, by products of matrices alone)."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # (m, n), m <= n
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T  # (m, m)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
