"""KL between coupled categoricals: exact on one graph, by listing, and the named errors in between."""

import math

import pytest
import torch
from torch.distributions import kl_divergence

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import IntractableError, ShapeError
from codd_ppl.graphs import topologies

GRAPHS = {
    "independent": topologies.independent(3, 3),
    "chain": topologies.chain(3, 3),
    "tree": topologies.tree([None, 0, 0], 3),
    "hidden_markov": topologies.hidden_markov(3, 3, 2),
    "star": topologies.star(3, 3, states=2),
}


def make(graph, seed=0, batch=(), known=None, evidence=None) -> CoupledCategorical:
    sites, vocab = len(graph.tokens), graph.variables["x0"].cardinality
    tables = testing.random_log_potentials(graph, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if evidence is None:
        evidence = torch.randn(*batch, sites, vocab, generator=generator, dtype=torch.float64)
    tokens = None if known is None else torch.ones(sites, dtype=torch.int64)
    return CoupledCategorical(compile(graph), tables, evidence, tokens, known)


def listed(p, q) -> torch.Tensor:
    values = testing.enumerate_sequences(3, 3)
    values = values.reshape(27, *[1] * len(p.batch_shape), 3)
    log_p, log_q = p.log_prob(values), q.log_prob(values)
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(0)


@pytest.mark.parametrize("other", GRAPHS)
@pytest.mark.parametrize("name", GRAPHS)
def test_against_enumeration(name, other):
    known = torch.tensor([True, False, False])
    p, q = make(GRAPHS[name], 1, (2,)), make(GRAPHS[other], 2, (2,))
    torch.testing.assert_close(kl_divergence(p, q), listed(p, q), rtol=1e-9, atol=1e-9)
    p, q = make(GRAPHS[name], 1, (2,), known), make(GRAPHS[other], 2, (2,))
    torch.testing.assert_close(kl_divergence(p, q), listed(p, q), rtol=1e-9, atol=1e-9)
    assert bool((kl_divergence(q, p) == math.inf).all()), "q gives chance to what p forbids"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_law_has_no_divergence_to_itself(name):
    p = make(GRAPHS[name], 1, (2,))
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_batches_broadcast():
    p, q = make(GRAPHS["chain"], 1), make(GRAPHS["chain"], 2, (4,))
    assert kl_divergence(p, q).shape == kl_divergence(q, p).shape == (4,)
    torch.testing.assert_close(kl_divergence(q, p)[2], kl_divergence(make_row(q, 2), p))


def make_row(dist, row) -> CoupledCategorical:
    tables = {key: t for key, t in dist.log_potentials.items() if key != dist.sites}
    return CoupledCategorical(dist.plan, tables, dist.log_evidence[row])


def test_impossible_values_of_both_are_no_divergence():
    evidence = torch.tensor(
        [[0.0, -math.inf, 0.0], [0.0, 1.0, 2.0], [-math.inf, 0.0, 1.0]], dtype=torch.float64
    )
    p, q = (make(GRAPHS["chain"], s, evidence=evidence) for s in (1, 2))
    assert kl_divergence(p, q).isfinite()
    torch.testing.assert_close(kl_divergence(p, q), listed(p, q), rtol=1e-9, atol=1e-9)
    wide = make(GRAPHS["chain"], 2)
    assert kl_divergence(p, wide).isfinite() and kl_divergence(wide, p) == math.inf


def test_gradients():
    plan = compile(GRAPHS["chain"])
    edges = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    evidence = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(a, b, c, d):
        return kl_divergence(
            CoupledCategorical(plan, {"edge": a}, c), CoupledCategorical(plan, {"edge": b}, d)
        )

    assert torch.autograd.gradcheck(function, (*edges, *evidence), fast_mode=True)


def test_a_large_chain_is_exact():
    graph = topologies.chain(40, 5)
    p, q = make(graph, 1), make(graph, 2)
    draws = p.sample((3000,), generator=torch.Generator().manual_seed(0))
    ratio = p.log_prob(draws) - q.log_prob(draws)
    assert (kl_divergence(p, q) - ratio.mean()).abs() < 4 * ratio.std() / math.sqrt(3000)


def test_errors():
    graph = topologies.hidden_markov(20, 3, 2)
    with pytest.raises(IntractableError, match=r"log_prob\(x\) - q\.log_prob\(x\)"):
        kl_divergence(make(graph, 1), make(graph, 2))
    with pytest.raises(IntractableError, match="two graphs"):
        kl_divergence(make(topologies.chain(20, 3)), make(topologies.chain(20, 3, tie=None)))
    with pytest.raises(ShapeError, match=r"\(3,\) x 3 and \(4,\) x 3"):
        kl_divergence(make(GRAPHS["chain"]), make(topologies.chain(4, 3)))
    with pytest.raises(ShapeError, match=r"\(3,\) x 3 and \(3,\) x 4"):
        kl_divergence(make(GRAPHS["chain"]), make(topologies.chain(3, 4)))
