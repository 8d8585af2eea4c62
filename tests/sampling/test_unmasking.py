"""Policies: which sites they pick, how many, and that they look at the network only when they must."""

import pytest
import torch

from codd_ppl.errors import ConfigError
from codd_ppl.sampling import (
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
    RevealState,
    coupled_marginals,
    network_marginals,
    unmasking_policy,
)
from codd_ppl.testing import chi_square_p_value

MARGINALS = torch.tensor(
    [
        [[0.50, 0.49, 0.01], [0.45, 0.28, 0.27], [0.44, 0.43, 0.13], [0.40, 0.30, 0.30]],
        [[0.34, 0.33, 0.33], [0.90, 0.05, 0.05], [0.60, 0.20, 0.20], [0.98, 0.01, 0.01]],
    ]
)


def refuse():
    raise AssertionError("the policy asked for marginals that it does not need")


def state(masked, number, coupled=lambda: MARGINALS, network=refuse, rate=0.5, generator=None):
    return RevealState(
        masked=torch.as_tensor(masked),
        step=0,
        steps=4,
        rate=rate,
        number=torch.as_tensor(number),
        generator=generator,
        coupled=coupled,
        network=network,
    )


ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (LowConfidence(), [[0, 1, 2, 3], [3, 1, 2, 0]]),
        (Margin(), [[1, 3, 0, 2], [3, 1, 2, 0]]),  # leads .01 .17 .01 .10: the tie goes to the left
        (Entropy(), [[0, 2, 1, 3], [3, 1, 2, 0]]),
    ],
)
def test_confidence_policies_rank_as_their_formula_says(policy, order):
    for number in range(5):
        revealed = policy.reveal(state(ALL, [number, number]))
        expected = torch.zeros_like(ALL)
        for row, sites in enumerate(order):
            expected[row, sites[:number]] = True
        assert torch.equal(revealed, expected)


@pytest.mark.parametrize("policy", [LowConfidence(), Margin(), Entropy()])
def test_rows_have_their_own_number_and_known_sites_are_left_alone(policy):
    masked = torch.tensor([[True, True, True, True], [True, False, True, False]])
    revealed = policy.reveal(state(masked, [3, 1]))
    assert revealed.sum(-1).tolist() == [3, 1]
    assert revealed[1].tolist() == [False, False, True, False]
    assert torch.equal(policy.reveal(state(masked, [9, 9])), masked)


@pytest.mark.parametrize("policy", [LowConfidence(), Margin(), Entropy()])
def test_no_marginals_are_asked_for_when_nothing_is_wanted(policy):
    assert not policy.reveal(state(ALL, [0, 0], coupled=refuse)).any()


@pytest.mark.parametrize("policy", [LowConfidence, Margin, Entropy])
def test_ranking_by_the_network_does_not_touch_the_coupling(policy):
    by_network = policy(network_marginals).reveal(
        state(ALL, [2, 2], coupled=refuse, network=lambda: MARGINALS.flip(1))
    )
    by_coupling = policy(coupled_marginals).reveal(
        state(ALL.flip(1), [2, 2], coupled=lambda: MARGINALS.flip(1))
    )
    assert torch.equal(by_network, by_coupling)


def test_a_vocabulary_of_one_token_is_no_trouble():
    marginals = torch.ones(2, 4, 1)
    for policy in (LowConfidence(), Margin(), Entropy()):
        assert (
            policy.reveal(state(ALL, [1, 1], coupled=lambda: marginals)).tolist()
            == [[True] + 3 * [False]] * 2
        )


def test_random_unmasking_is_a_coin_with_the_rate_of_the_step():
    masked = torch.rand(400, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    revealed = RandomUnmasking().reveal(
        state(masked, [0] * 400, coupled=refuse, rate=0.3, generator=torch.Generator().manual_seed(2))
    )
    assert not (revealed & ~masked).any()
    n = int(masked.sum())
    assert abs(int(revealed.sum()) - 0.3 * n) < 5 * (n * 0.3 * 0.7) ** 0.5
    assert not RandomUnmasking().reveal(state(masked, [0] * 400, coupled=refuse, rate=0.0)).any()
    assert torch.equal(RandomUnmasking().reveal(state(masked, [0] * 400, coupled=refuse, rate=1.0)), masked)


def test_a_random_order_has_its_number_and_prefers_no_site():
    masked = torch.tensor([True, False, True, True, True]).expand(6000, 5)
    revealed = RandomOrder().reveal(
        state(masked, [2] * 6000, coupled=refuse, generator=torch.Generator().manual_seed(2))
    )
    assert not (revealed & ~masked).any() and (revealed.sum(-1) == 2).all()
    pairs = (revealed.long() * 2 ** torch.arange(5)).sum(-1).unique(return_counts=True)[1]
    assert len(pairs) == 6 and chi_square_p_value(pairs, torch.full((6,), 1 / 6)) > 1e-3


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("random", RandomUnmasking),
        ("random_order", RandomOrder),
        ("low_confidence", LowConfidence),
        ("margin", Margin),
        ("entropy", Entropy),
    ],
)
def test_names(name, policy):
    assert unmasking_policy(name) == policy()


def test_own_policies_pass_through_and_nonsense_does_not():
    class LeftToRight:
        def reveal(self, state):
            return state.masked

    mine = LeftToRight()
    assert unmasking_policy(mine) is mine
    with pytest.raises(ConfigError, match=r"low_confidence.*'confident'"):
        unmasking_policy("confident")
    for nonsense in (LeftToRight, 3, None):
        with pytest.raises(ConfigError, match="reveal"):
            unmasking_policy(nonsense)
