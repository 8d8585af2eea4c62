"""The demonstration's choice of threads."""

import time

import pytest
import torch

from codd_ppl.demo.threads import fastest_threads


@pytest.mark.parametrize(("alone", "together", "chosen"), [(0.001, 0.01, 1), (0.01, 0.001, 3)])
def test_the_faster_number_of_threads(alone: float, together: float, chosen: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with fastest_threads(
            lambda: time.sleep(alone if torch.get_num_threads() == 1 else together)
        ) as threads:
            assert threads == torch.get_num_threads() == chosen
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), fastest_threads(lambda: 1 / 0):
            pass
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
