"""Muon in float32: the closed form, torch's own to bf16's rounding, and the same state."""

from copy import deepcopy

import pytest
import torch

from selfflow_robot import muon
from selfflow_robot.muon import Float32Muon, make_muon, orthogonal

SETTINGS = dict(lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
SHAPES = [(24, 8), (8, 24), (16, 16)]


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def take(optimizer, seeds):
    for seed in seeds:
        for matrix, gradient in zip(optimizer.param_groups[0]["params"], matrices(seed)):
            matrix.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_follow_the_polynomial_and_vectors_stay(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7), u @ s.diag() @ v)


def test_it_takes_the_steps_of_torchs_own_and_either_continues_the_other():
    start = [matrix.requires_grad_() for matrix in matrices(0)]
    ours, theirs = Float32Muon(deepcopy(start), **SETTINGS), torch.optim.Muon(deepcopy(start), **SETTINGS)
    take(ours, (1, 2, 3)), take(theirs, (1, 2, 3))
    changed = Float32Muon(deepcopy(theirs.param_groups[0]["params"]), **SETTINGS)
    changed.load_state_dict(deepcopy(theirs.state_dict()))
    for optimizer in (ours, theirs, changed):
        take(optimizer, (4, 5))
    results = zip(start, *(o.param_groups[0]["params"] for o in (theirs, ours, changed)))
    for before, *(wanted, *others) in results:
        for got in others:
            assert (got - wanted).norm() < 0.02 * (wanted - before).norm()  # bf16 has 8 bits
    theirs.load_state_dict(ours.state_dict())
    take(theirs, (6,))


def test_a_matrix_without_a_gradient_stays():
    optimizer = Float32Muon([torch.ones(2, 2, requires_grad=True)], **SETTINGS)
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2, 2)) and not optimizer.state


@pytest.mark.parametrize("fast, kind", [(True, torch.optim.Muon), (False, Float32Muon)])
def test_torchs_own_where_bf16_is_fast(monkeypatch, fast, kind):
    monkeypatch.setattr(muon, "computes_bf16", lambda device: fast)
    assert type(make_muon([torch.ones(2, 2, requires_grad=True)], 1e-3, 0.01)) is kind
