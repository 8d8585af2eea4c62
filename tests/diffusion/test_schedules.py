import math

import pytest
import torch

from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule
from codd_ppl.errors import ConfigError

SCHEDULES = [LinearSchedule(), CosineSchedule()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_and_rates_are_exact_at_both_ends(schedule, steps, dtype):
    alphas, rates = schedule.grid(steps, dtype=dtype), schedule.reveal_rates(steps, dtype=dtype)
    assert alphas.shape == (steps + 1,) and rates.shape == (steps,)
    assert alphas.dtype == rates.dtype == dtype
    assert alphas[0] == 1 and alphas[-1] == 0
    assert rates[0] == 1
    assert bool((alphas[1:] < alphas[:-1]).all())
    assert bool(((rates > 0) & (rates <= 1)).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 5, 33])
def test_rates_reproduce_the_noise(schedule, steps):
    """What is still masked at step k has escaped the steps T, ..., k+1: 1 - alpha_k = prod_{j>k} (1 - r_j)."""
    alphas = schedule.grid(steps, dtype=torch.float64)
    rates = schedule.reveal_rates(steps, dtype=torch.float64)
    for k in range(steps + 1):
        torch.testing.assert_close(1 - alphas[k], (1 - rates[k:]).prod())


def test_linear_rates_are_one_over_k():
    rates = LinearSchedule().reveal_rates(10, dtype=torch.float64)
    torch.testing.assert_close(rates, 1 / torch.arange(1, 11, dtype=torch.float64))


def test_cosine_reveals_few_tokens_first():
    assert float(CosineSchedule().alpha(0.5)) == pytest.approx(1 - math.cos(math.pi / 4))
    alphas = CosineSchedule().grid(4)
    revealed = alphas[:-1] - alphas[1:]  # entry k - 1: share of the tokens that step k reveals
    assert bool((revealed[:-1] > revealed[1:]).all())  # step T, the first to run, reveals least


def test_alpha_takes_numbers_and_tensors():
    for schedule in SCHEDULES:
        t = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
        assert schedule.alpha(t).shape == t.shape
        torch.testing.assert_close(schedule.alpha(0.25), schedule.alpha(t)[0, 1])


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "4", None])
def test_steps_must_be_a_positive_whole_number(steps):
    for call in (LinearSchedule().grid, LinearSchedule().reveal_rates):
        with pytest.raises(ConfigError, match="steps"):
            call(steps)


class Power(Schedule):
    """alpha = scale (1 - t^power)."""

    def __init__(self, power, scale=1.0):
        self.power, self.scale = power, scale

    def alpha(self, t):
        return self.scale * (1 - torch.as_tensor(t) ** self.power)


def test_a_schedule_of_your_own_is_one_method():
    rates = Power(2).reveal_rates(3, dtype=torch.float64)
    torch.testing.assert_close(rates, torch.tensor([1.0, 3 / 4, 5 / 9], dtype=torch.float64))


def test_schedules_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"alpha\(0\) = 1"):
        Power(1, scale=0.9).grid(3)
    with pytest.raises(ConfigError, match="decrease"):
        Power(40).grid(10)  # flat at the start: alpha_1 is 1 in float64, so its rate would be 0/0

    class Bump(Power):
        def alpha(self, t):
            return super().alpha(t) + torch.sin(2 * math.pi * torch.as_tensor(t))

    with pytest.raises(ConfigError, match="decrease"):
        Bump(1).grid(8)
