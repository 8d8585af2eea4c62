"""The known facts of the factorization gap (two tokens, parity, binary chain), met by real couplings."""

import math

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.diffusion.closed_forms import (
    best_factorised_nelbo,
    entropy,
    even_parity,
    markov_chain,
    parity_gap,
    two_tokens_gap,
)
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.testing import enumerate_sequences

SCHEDULES = [LinearSchedule(), CosineSchedule()]
BIT = math.log(2)


def coupling_with(graph, tables, combine="projected", sweeps=1):
    """A CouplingLayer in float64 whose free tables, in the order of declaration, are these."""
    vocab = next(v.cardinality for v in graph if not v.latent)
    coupling = CouplingLayer(graph, vocab, combine=combine, sweeps=sweeps).double()
    assert [p.shape for p in coupling.parameters()] == [t.shape for t in tables]
    with torch.no_grad():
        for parameter, table in zip(coupling.parameters(), tables, strict=True):
            parameter.copy_(table)
    return coupling.requires_grad_(False)


def expected_bound(joint, denoiser, coupling, steps, schedule=LinearSchedule()):  # noqa: B008 - frozen
    """E_{x0 ~ joint} NELBO_T(x0) of the network with the coupling, by enumeration."""
    vocab = joint.shape[0]
    x0, chance = enumerate_sequences(vocab, joint.ndim), joint.flatten()
    bound = nelbo_exact(x0[chance > 0], steps, schedule, log_prob_fn(denoiser, coupling, vocab), vocab)
    return float(chance[chance > 0] @ bound)


def binary_chain(sites, stay):
    transition = torch.tensor([[stay, 1 - stay], [1 - stay, stay]], dtype=torch.float64)
    return markov_chain(torch.full((2,), 0.5, dtype=torch.float64), transition, sites), transition


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_independent_coupling_has_the_gap_of_the_best_factorised_model(
    random_joint, exact_marginals, schedule, steps
):
    for joint in (random_joint(3, 3), even_parity(4), binary_chain(5, 0.8)[0]):
        denoiser = exact_marginals(joint)
        coupling = CouplingLayer(topologies.independent(joint.ndim, joint.shape[0]), joint.shape[0])
        bound = expected_bound(joint, denoiser, coupling, steps, schedule)
        assert bound == pytest.approx(float(best_factorised_nelbo(joint, steps, schedule)), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_two_tokens(random_joint, exact_marginals, steps):
    """One edge with the pointwise mutual information: H(x0) at every T; without it, I / T more."""
    joint = random_joint(4, 2)
    information_table = (joint / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))).log()
    information, h = float((joint * information_table).sum()), float(entropy(joint))
    denoiser = exact_marginals(joint)
    chain = topologies.chain(2, 4)
    projected = coupling_with(chain, [information_table], sweeps=100)
    product = coupling_with(chain, [information_table], "product")
    alone = CouplingLayer(topologies.independent(2, 4), 4)
    assert expected_bound(joint, denoiser, projected, steps) == pytest.approx(h, rel=1e-9)
    gap = float(two_tokens_gap(information, steps))
    assert gap == pytest.approx(information / steps)
    assert expected_bound(joint, denoiser, alone, steps) == pytest.approx(h + gap, rel=1e-9)
    # a static product is right as long as nothing is known, and then counts the known token twice
    excess = expected_bound(joint, denoiser, product, steps) - h
    assert excess == pytest.approx(0, abs=1e-9) if steps == 1 else excess > 0.02


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_chain_over_the_tokens_gains_nothing_on_parity(exact_marginals, bits, combine):
    """Every two bits are independent: whatever the table, the bound is that of the factorised model or worse."""
    joint = even_parity(bits)
    denoiser = exact_marginals(joint)
    for steps in (1, 2, 4):
        best = float(best_factorised_nelbo(joint, steps))
        assert best == pytest.approx((bits - 1) * BIT + float(parity_gap(bits, steps)))
        for seed, spread in ((0, 0.3), (1, 1.0), (2, 3.0)):
            graph = topologies.chain(bits, 2, tie=None)
            generator = torch.Generator().manual_seed(seed)
            tables = [spread * torch.randn(2, 2, generator=generator).double() for _ in range(bits - 1)]
            bound = expected_bound(joint, denoiser, coupling_with(graph, tables, combine), steps)
            assert bound > best + 1e-4
        nothing = coupling_with(graph, [torch.zeros(2, 2).double()] * (bits - 1), combine)
        assert expected_bound(joint, denoiser, nothing, steps) == pytest.approx(best, rel=1e-9)


def test_on_two_bits_of_parity_a_chain_is_enough(exact_marginals):
    joint = even_parity(2)
    equal = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=torch.float64)
    coupling = coupling_with(topologies.chain(2, 2), [equal])
    for steps in (1, 3):
        assert expected_bound(joint, exact_marginals(joint), coupling, steps) == pytest.approx(BIT)


def parity_and_last_bit(bits):
    """Latent chain of 4 states 2 * parity + bit; emissions show the bit, the last state must be even."""
    graph = topologies.hidden_markov(bits, 2, 4)
    graph.add_factor((f"z{bits - 1}",), name="even")
    initial, emission = torch.full((4,), -torch.inf), torch.full((4, 2), -torch.inf)
    transition, even = torch.full((4, 4), -torch.inf), torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    for parity in (0, 1):
        for bit in (0, 1):
            emission[2 * parity + bit, bit] = 0.0
            for following in (0, 1):
                transition[2 * parity + bit, 2 * (parity ^ following) + following] = 0.0
    initial[[0, 3]] = 0.0  # parity of the first bit = the first bit
    return graph, [table.double() for table in (initial, emission, transition, even)]


def parity_of_the_prefix(bits):
    """Latent chain of 2 states, the parity of x0 .. xi, with a factor over two states and the bit between them."""
    graph = FactorGraph()
    for i in range(bits):
        graph.add_variable(f"x{i}", 2)
    for i in range(bits):
        graph.add_variable(f"z{i}", 2, latent=True)
    graph.add_factor(("z0", "x0"), name="first")
    for i in range(1, bits):
        graph.add_factor((f"z{i - 1}", f"z{i}", f"x{i}"), tie="running")
    graph.add_factor((f"z{bits - 1}",), name="even")
    first, running = torch.full((2, 2), -torch.inf), torch.full((2, 2, 2), -torch.inf)
    for before in (0, 1):
        first[before, before] = 0.0
        for bit in (0, 1):
            running[before, before ^ bit, bit] = 0.0
    return graph, [table.double() for table in (first, running, torch.tensor([0.0, -torch.inf]))]


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("latent_chain", [parity_and_last_bit, parity_of_the_prefix])
@pytest.mark.parametrize("bits", [3, 5])
def test_a_latent_chain_that_carries_the_parity_closes_the_gap(exact_marginals, bits, latent_chain, combine):
    joint = even_parity(bits)
    coupling = coupling_with(*latent_chain(bits), combine)
    for schedule in SCHEDULES:
        for steps in (1, 2, 4):
            bound = expected_bound(joint, exact_marginals(joint), coupling, steps, schedule)
            assert bound == pytest.approx((bits - 1) * BIT, rel=1e-9)
            assert float(parity_gap(bits, steps, schedule)) > 0.1  # which is what the factorised model loses


@pytest.mark.parametrize("stay", [0.8, 0.95])
def test_binary_chain(exact_marginals, stay):
    """The chain's own table, projected: H(x0) at every T, where the factorised model loses 1.39 (3.57) bits at T = 1.

    As a plain product it is right at T = 1 only.
    """
    joint, transition = binary_chain(6, stay)
    denoiser, h = exact_marginals(joint), float(entropy(joint))
    assert h == pytest.approx(BIT - 5 * (stay * math.log(stay) + (1 - stay) * math.log(1 - stay)))
    lost = {0.8: 1.3904, 0.95: 3.568}[stay]
    table = [(2 * transition).log()]  # pointwise mutual information
    projected, product = (coupling_with(topologies.chain(6, 2), table, c) for c in ("projected", "product"))
    for steps in (1, 2, 4):
        assert expected_bound(joint, denoiser, projected, steps) == pytest.approx(h, rel=1e-9)
        excess = expected_bound(joint, denoiser, product, steps) - h
        assert excess == pytest.approx(0, abs=1e-9) if steps == 1 else excess > 0.05
    alone = CouplingLayer(topologies.independent(6, 2), 2)
    assert (expected_bound(joint, denoiser, alone, 1) - h) / BIT == pytest.approx(lost, rel=1e-3)


def test_gap_closed_by_a_weaker_chain(exact_marginals):
    """Stay .95 coupled as if it were .8: between the two, and the more steps the nearer to H(x0)."""
    joint, _ = binary_chain(5, 0.95)
    _, weaker = binary_chain(5, 0.8)
    denoiser, h = exact_marginals(joint), float(entropy(joint))
    coupling = coupling_with(topologies.chain(5, 2), [weaker.log()])
    alone = CouplingLayer(topologies.independent(5, 2), 2)
    excess = []
    for steps in (1, 2, 4):
        factorised, coupled = (expected_bound(joint, denoiser, c, steps) - h for c in (alone, coupling))
        assert 0 < coupled < factorised
        excess.append(coupled)
    assert excess == sorted(excess, reverse=True)
