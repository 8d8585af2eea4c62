import math

import pytest
import torch

from codd_ppl.diffusion.closed_forms import (
    best_factorised_log_prob,
    best_factorised_nelbo,
    entropy,
    even_parity,
    factorization_gap,
    markov_chain,
    parity_gap,
    perfect_log_prob,
    subset_entropies,
    total_correlation,
    two_tokens_gap,
)
from codd_ppl.diffusion.enumeration import nelbo_exact
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.errors import ConfigError
from codd_ppl.testing import enumerate_sequences

SCHEDULES = [LinearSchedule(), CosineSchedule()]
BIT = math.log(2)


def expected_bound(joint, steps, schedule, denoiser):
    """E_{x0 ~ joint} NELBO_T(x0), by enumeration of x0, masks and revealed sets."""
    vocab = joint.shape[0]
    x0 = enumerate_sequences(vocab, joint.ndim)
    possible = joint.flatten() > 0
    bounds = nelbo_exact(x0[possible], steps, schedule, denoiser(joint, vocab), vocab)
    return joint.flatten()[possible] @ bounds


def binary_chain(sites, stay):
    stay = torch.tensor(stay, dtype=torch.float64)
    transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    return markov_chain(torch.tensor([0.5, 0.5], dtype=torch.float64), transition, sites)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["random", "parity", "chain"])
def test_perfect_and_best_factorised_denoisers(random_joint, schedule, steps, name):
    """Perfect: H(x0) for every T. Best factorised: H(x0) + the gap, by two independent enumerations."""
    joint = {"random": random_joint(3, 3), "parity": even_parity(4), "chain": binary_chain(5, 0.8)}[name]
    found = {
        d: expected_bound(joint, steps, schedule, d) for d in (perfect_log_prob, best_factorised_log_prob)
    }
    torch.testing.assert_close(found[perfect_log_prob], entropy(joint))
    torch.testing.assert_close(found[best_factorised_log_prob], best_factorised_nelbo(joint, steps, schedule))
    assert factorization_gap(joint, steps, schedule) > 1e-3


def test_no_other_factorised_denoiser_is_better(random_joint):
    joint = random_joint(2, 3)
    best = best_factorised_log_prob(joint, 2)

    def worse(x0, xt, revealed):  # mixes the exact marginals with the uniform ones
        singles = torch.eye(3, dtype=torch.bool)
        parts = [(0.9 * best(x0, xt, revealed & site).exp() + 0.05).log() for site in singles]
        return torch.where(revealed, torch.stack(parts, -1), 0).sum(-1)

    x0 = enumerate_sequences(2, 3)
    bound = joint.flatten() @ nelbo_exact(x0, 2, LinearSchedule(), worse, 2)
    assert bound > best_factorised_nelbo(joint, 2) + 1e-4


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
def test_two_tokens(random_joint, steps):
    joint = random_joint(4, 2)
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = (joint * (joint / (rows * columns)).log()).sum()
    torch.testing.assert_close(total_correlation(joint), information)
    torch.testing.assert_close(two_tokens_gap(information, steps), information / steps)
    for schedule in SCHEDULES:
        torch.testing.assert_close(
            factorization_gap(joint, steps, schedule), two_tokens_gap(information, steps, schedule)
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_even_parity(bits, steps):
    formula = 1 - bits * sum((1 / steps) * ((k - 1) / steps) ** (bits - 1) for k in range(1, steps + 1))
    assert float(parity_gap(bits, steps)) / BIT == pytest.approx(formula)
    for schedule in SCHEDULES:
        gap = factorization_gap(even_parity(bits), steps, schedule)
        torch.testing.assert_close(gap, parity_gap(bits, steps, schedule))


def test_parity_in_one_step_costs_the_whole_bit():
    """Every n - 1 bits are independent, so one step loses exactly the constraint."""
    assert float(parity_gap(5, 1)) == pytest.approx(BIT)
    assert float(total_correlation(even_parity(5))) == pytest.approx(BIT)
    assert float(parity_gap(1, 3)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("stay", [0.8, 0.95])
def test_stationary_binary_chain(stay):
    """Six bits. T = 1: five times the information of neighbours. T = 1, 2, 3, 4, 6 in bits:

    stay .8: 1.3904, .6483, .4214, .3120, .2053; stay .95: 3.568, 1.540, .9617, .6961, .4470.
    """
    joint = binary_chain(6, stay)
    neighbours = BIT + stay * math.log(stay) + (1 - stay) * math.log(1 - stay)
    assert float(factorization_gap(joint, 1)) == pytest.approx(5 * neighbours)
    assert float(total_correlation(joint)) == pytest.approx(5 * neighbours)
    slow = {T: chain_gap(6, stay, T) for T in (1, 2, 3, 4, 6)}
    for T, gap in slow.items():
        assert float(factorization_gap(joint, T)) == pytest.approx(gap, rel=1e-9)
    assert sorted(slow.values(), reverse=True) == list(slow.values())  # more steps, smaller gap
    assert slow[1] / BIT == pytest.approx({0.8: 1.3904, 0.95: 3.568}[stay], rel=1e-3)


def chain_gap(sites, stay, steps):
    """The gap from the chain rule along the chain: I(x_j ; nearest revealed or known on the left | right side).

    E sum_k TC(X_S | K) = sum_k sum_j P(j in S) ( H(x_j | K) - H(x_j | K, earlier sites of S) ), and the Markov
    property leaves only distances: d to the nearest known on the left (or none) and e to the right, and f to
    the nearest earlier revealed site. Site states are drawn independently: known, revealed, still masked.
    """
    total = 0.0
    for k in range(1, steps + 1):
        known, shown = 1 - k / steps, 1 / steps  # linear schedule, per site
        hidden = 1 - known - shown
        for j in range(sites):
            for right in range(1, sites - j + 1):  # nearest known on the right; sites - j: none
                p_right = (1 - known) ** (right - 1) * (known if right < sites - j else 1)
                right_distance = right if right < sites - j else None
                for left in range(1, j + 1):  # nearest on the left that isn't hidden: a revealed one, else 0
                    p_skip = hidden ** (left - 1) * shown
                    for deeper in range(1, j - left + 2):  # from there to the nearest known
                        none = deeper == j - left + 1
                        p_deep = (1 - known) ** (deeper - 1) * (1 if none else known)
                        far = None if none else left + deeper
                        difference = bridge(stay, far, right_distance) - bridge(stay, left, right_distance)
                        total += shown * p_right * p_skip * p_deep * difference
    return total


def bridge(stay, left, right):
    """H(x | neighbours at these distances, None: no neighbour), nats, averaged over the neighbours."""

    def agree(distance):  # chance of equality after that many transitions
        return 0.5 * (1 + (2 * stay - 1) ** distance)

    def h(p):
        return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)

    if left is None or right is None:
        distance = left or right
        return BIT if distance is None else h(agree(distance))
    a, b = agree(left), agree(right)
    same = a * b + (1 - a) * (1 - b)
    differ = a * (1 - b) + (1 - a) * b
    return same * h(a * b / same) + differ * h(a * (1 - b) / differ)


def test_gap_of_independent_sites_and_of_infinitely_many_steps_is_zero(random_joint):
    singles = torch.tensor([0.2, 0.8], dtype=torch.float64)
    independent = singles[:, None, None] * singles[:, None] * singles
    for steps in (1, 2, 5):
        assert float(factorization_gap(independent, steps)) == pytest.approx(0, abs=1e-12)
    assert float(factorization_gap(random_joint(2, 4), math.inf)) == pytest.approx(0, abs=1e-12)


def test_subset_entropies_by_hand():
    joint = torch.tensor([[0.5, 0.0], [0.25, 0.25]], dtype=torch.float64)
    h_row, h_column = BIT, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(
        subset_entropies(joint), torch.tensor([0, h_row, h_column, 1.5 * BIT], dtype=torch.float64)
    )


def test_tables():
    parity = even_parity(3)
    assert parity.shape == (2, 2, 2) and float(parity.sum()) == 1
    assert parity[1, 1, 0] == 0.25 and parity[1, 0, 0] == 0
    chain = binary_chain(3, 0.8)
    assert float(chain[0, 0, 1]) == pytest.approx(0.5 * 0.8 * 0.2)


def test_errors():
    with pytest.raises(ConfigError, match="sum 2"):
        entropy(torch.ones(2))
    with pytest.raises(ConfigError, match="probabilities"):
        factorization_gap(torch.tensor([[1.5, -0.5]]), 1)
    with pytest.raises(ConfigError, match="bit"):
        parity_gap(0, 1)
    for call in (
        lambda: two_tokens_gap(1.0, 0),
        lambda: parity_gap(3, 0),
        lambda: factorization_gap(even_parity(2), 0),
    ):
        with pytest.raises(ConfigError, match="steps"):
            call()
