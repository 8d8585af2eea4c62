"""The published toys: exact laws, what a coupling draws in one step, and a card that follows from its results."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codd_ppl.demo.toy_card import toy_card
from codd_ppl.demo.toy_laws import (
    Toy,
    draw_pairs,
    eight_modes,
    successor_pairs,
    support,
    swiss_roll,
    toys,
)
from codd_ppl.demo.toys import ToySettings, run_toy
from codd_ppl.diffusion.closed_forms import product_of_marginals
from codd_ppl.errors import ConfigError

FAST = ToySettings(samples=20_000, drawn=2_000, hidden=32, train_steps=80, epochs=3, steps=(1, 2), seeds=(0,))


@pytest.mark.parametrize("joint", [eight_modes(), swiss_roll(), successor_pairs()])
def test_laws_and_their_supports(joint: torch.Tensor) -> None:
    assert float(joint.sum()) == pytest.approx(1.0) and bool((joint >= 0).all())
    valid = support(joint)
    held = float(joint[valid].sum())
    assert 0.99 <= held <= 1.0 and held - float(joint[valid].min()) < 0.99
    assert float(joint[~valid].max()) <= float(joint[valid].min())
    assert int(support(joint, 0.5).sum()) <= int(valid.sum()) < joint.numel() / 2
    drawn = draw_pairs(joint, 20_000)
    assert float(valid[drawn[:, 0], drawn[:, 1]].double().mean()) == pytest.approx(held, abs=0.005)
    with pytest.raises(ConfigError, match="mass"):
        support(joint, 0.0)


def test_eight_modes_have_the_symmetry_of_their_circle() -> None:
    joint = eight_modes()
    for same in (joint.T, joint.flip(0), joint.flip(1)):
        torch.testing.assert_close(joint, same, atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="deviation"):
        eight_modes(deviation=0.0)
    with pytest.raises(ConfigError, match="at least 2"):
        successor_pairs(1)


def test_one_step_is_enough_for_the_successor_pairs() -> None:
    """VMD's toy: factorised about 10 % valid in one step, coupled all of it."""
    joint = successor_pairs()
    assert float(product_of_marginals(joint)[support(joint)].sum()) == pytest.approx(0.1)
    found = run_toy(replace(toys()["successor pairs"], train_steps=80), FAST)
    models = found["models"]
    assert models["table"]["validity"] == {1: [1.0], 2: [1.0]}
    assert models["mixture"]["validity"][1] == [1.0]
    assert models["factorised"]["validity"][1][0] == pytest.approx(0.1, abs=0.03)
    assert models["factorised"]["one_step_kl"][0] == pytest.approx(math.log(10), abs=0.05)
    assert models["table"]["one_step_kl"][0] < 0.05


def test_one_step_is_nearly_enough_for_eight_modes() -> None:
    found = run_toy(Toy(eight_modes(25, 0.08), "small", states=16), FAST)
    models, exact = found["models"], found["exact"]
    best = exact["best_factorised"]
    assert best[2] == pytest.approx((best[1] + exact["law"]) / 2)
    assert models["factorised"]["validity"][1][0] == pytest.approx(best[1], abs=0.06)
    assert models["table"]["validity"][1][0] > exact["law"] - 0.02
    assert models["mixture"]["validity"][1][0] > best[1] + 0.3
    for name in ("table", "mixture"):
        assert models[name]["one_step_kl"][0] < 0.5 * models["factorised"]["one_step_kl"][0]


def test_the_card_is_generated() -> None:
    folder = Path(__file__).parents[2] / "models" / "toys"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == toy_card(results)
    for name, toy in results["toys"].items():
        assert toy["law"] == toys()[name].law
