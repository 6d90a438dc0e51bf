import math

import pytest
import torch

from selfflow_robot import flow


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_interpolate_ends_and_velocity():
    x, noise = torch.randn(2, 3, 4, generator=generator()), torch.randn(2, 3, 4, generator=generator(1))
    assert torch.equal(flow.interpolate(x, noise, torch.zeros(2, 3))[0], x)
    assert torch.equal(flow.interpolate(x, noise, torch.ones(2, 3))[0], noise)
    t = torch.rand(2, 3, generator=generator(2))
    z, v = flow.interpolate(x, noise, t)
    torch.testing.assert_close(z - t[..., None] * v, x)  # going back t along the velocity is the data


def test_shifted_logit_normal_is_a_moved_mean():
    """shift(sigmoid(n), alpha) = sigmoid(n + ln alpha): the median of logit t is ln alpha."""
    t = flow.TimestepDistribution("logit_normal", shift=2.95).draw((200_000,), generator())
    logit = torch.logit(t.double())
    assert abs(logit.mean() - math.log(2.95)) < 0.01
    assert abs(logit.std() - 1) < 0.01


def test_uniform_is_uniform_and_low_snr_moves_its_share():
    t = flow.TimestepDistribution("uniform").draw((100_000,), generator()).sort().values
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 0.01  # Kolmogorov-Smirnov distance
    t = flow.TimestepDistribution("uniform", low_snr=0.2).draw((100_000,), generator())
    assert abs((t > 0.95).float().mean() - (0.2 + 0.8 * 0.05)) < 0.005


@pytest.mark.parametrize("bad", [{"kind": "beta"}, {"shift": 0.0}, {"low_snr": 1.5}])
def test_bad_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="timestep distribution"):
        flow.TimestepDistribution(**bad)


# Three points, one per row: two tokens "frame" and "action", 1 channel each. The exact velocity is known.
POINTS = torch.tensor([[-1.0, 2.0], [0.5, -1.0], [1.5, 1.0]])


def exact_velocity(z, t):
    """E[noise - x | z_t] for x uniform on POINTS, any noise level per token. z (B, 2, 1), t (B, 2)."""
    z, t = z[..., 0].double()[:, None], t.double().clamp_min(1e-9)[:, None]  # (B, 1, 2)
    x = POINTS.double()  # (3, 2)
    log_weight = -((z - (1 - t) * x) ** 2 / (2 * t**2)).sum(-1)  # (B, 3)
    posterior_mean = log_weight.softmax(-1) @ x  # (B, 2)
    return ((z[:, 0] - posterior_mean) / t[:, 0]).float()[..., None]


@pytest.mark.parametrize("roles", ["gg", "Gg", "gG", "hg", "gh"])  # g generated, G given, h hidden
def test_one_loop_serves_every_mode(roles):
    """The sampler lands on the points; what is given selects its point, what is hidden tells nothing."""
    n = 1500
    which = torch.randint(3, (n,), generator=generator(3))
    data, noise = POINTS[which][..., None], torch.randn(n, 2, 1, generator=generator(4))
    generated = torch.tensor([[r == "g" for r in roles]])
    hidden = torch.tensor([[r == "h" for r in roles]])
    given = ~generated & ~hidden
    start = torch.where(given[..., None], data, noise)
    z = flow.sample(exact_velocity, start, generated, hidden, steps=200)
    assert torch.equal(z[:, ~generated[0]], start[:, ~generated[0]])
    if given.any():
        assert (z - data).abs().max() < 1e-3
    else:
        distance = (z - POINTS[:, None, :, None]).abs()[:, :, generated[0]]  # (3, n, tokens, 1)
        assert distance.amax((2, 3)).amin(0).max() < 0.02  # near one of the points
        share = distance.amax((2, 3)).argmin(0).bincount(minlength=3) / n
        assert (share - 1 / 3).abs().max() < 0.06


def test_zero_steps_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        flow.sample(exact_velocity, torch.zeros(1, 2, 1), torch.ones(1, 2).bool(), torch.zeros(1, 2).bool(), 0)
