"""Couplings over graphs with loops: the law of the tokens against enumeration, projected and as a product."""

import pytest
import torch

from codd_ppl import CoupledCategorical, CouplingLayer, testing, topologies
from codd_ppl.graphs import FactorGraph

V, L = 3, 4


def latent_loop() -> FactorGraph:
    """Four tokens on latents in a ring, which factors join in pairs."""
    graph = topologies.independent(L, V)
    for i in range(L):
        graph.add_variable(f"z{i}", 2, latent=True)
    for i in range(L):
        graph.add_factor((f"z{i}", f"z{(i + 1) % L}"), tie="ring")
        graph.add_factor((f"z{i}", f"x{i}"), tie="emission")
    return graph


GRAPHS = {
    "skip_chain": topologies.skip_chain(L, V),
    "grid": topologies.grid(2, 2, V, tie=False),
    "latent": latent_loop(),
}


@pytest.fixture(params=GRAPHS)
def coupled(request):
    """graph -> (coupling, its law of a half-known batch, tokens, known), with random tables in float64."""

    def make(combine: str, sweeps: int = 1):
        coupling = CouplingLayer(GRAPHS[request.param], V, combine=combine, sweeps=sweeps).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in coupling.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        logits = torch.randn(3, L, V, generator=generator, dtype=torch.float64)
        tokens = torch.randint(V, (3, L), generator=generator)
        known = torch.tensor([[False] * L, [True, False, False, True], [False, False, True, False]])
        return coupling, logits, tokens, known

    return make


def joint(dist: CoupledCategorical, graph: FactorGraph) -> torch.Tensor:
    """Probabilities of all sequences, (batch, sequences), from the enumerated table of tokens and latents."""
    table = testing.enumerate_log_joint(graph, dist.log_potentials)
    latent = [1 + i for i, v in enumerate(graph) if v.latent]
    table = table.logsumexp(latent) if latent else table
    return table.flatten(1).softmax(-1)


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_every_query_of_the_distribution(coupled, combine):
    coupling, logits, tokens, known = coupled(combine)
    dist = coupling(logits, tokens=tokens, known=known)
    truth = joint(dist, coupling.graph).detach()
    every = testing.enumerate_sequences(V, L)
    found = dist.log_prob(every[:, None].expand(-1, 3, -1)).exp()
    torch.testing.assert_close(found.mT, truth, rtol=1e-9, atol=1e-12)

    onehot = torch.nn.functional.one_hot(every, V).double()
    torch.testing.assert_close(
        dist.marginals, torch.einsum("bs,slv->blv", truth, onehot), rtol=1e-9, atol=1e-12
    )

    draws = dist.sample((3000,), generator=torch.Generator().manual_seed(0))
    index = (draws * V ** torch.arange(L - 1, -1, -1)).sum(-1)
    for b in range(3):
        counts = torch.bincount(index[:, b], minlength=V**L)
        assert testing.chi_square_p_value(counts, truth[b]) > 1e-4
        assert bool((draws[:, b] == tokens[b])[:, known[b]].all())
    if not coupling.graph.latents:
        torch.testing.assert_close(every[truth.argmax(-1)], dist.mode)
        entropy = torch.special.entr(truth).sum(-1)
        torch.testing.assert_close(dist.entropy(), entropy, rtol=1e-9, atol=1e-9)
    assert bool((dist.mode == tokens)[known].all())

    sites = torch.tensor([[False, True, False, False]] * 3)
    x = torch.ones(3, L, dtype=torch.int64)
    part = dist.log_prob(x, sites=sites).exp()
    torch.testing.assert_close(part, dist.marginals[:, 1, 1], rtol=1e-9, atol=1e-12)
    conditioned = dist.condition(x, sites)
    given = truth * (every[:, 1] == 1)
    given = given / given.sum(-1, keepdim=True)
    assert torch.allclose(joint(conditioned, coupling.graph), given)
    torch.testing.assert_close(conditioned.log_partition - dist.log_partition, part.log())


def test_projection_keeps_the_marginals_of_the_network(coupled):
    coupling, logits, tokens, known = coupled("projected", sweeps=20)
    dist = coupling(logits, tokens=tokens, known=known)
    gap = (dist.marginals.detach() - logits.softmax(-1)).abs() * ~known[..., None]
    assert float(gap.max()) < 1e-6


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_the_loss_trains_tables_and_network(coupled, combine):
    coupling, logits, tokens, known = coupled(combine)
    logits.requires_grad_()
    (-coupling(logits, tokens=tokens, known=known).log_prob(tokens)).sum().backward()
    for tensor in (logits, *coupling.parameters()):
        assert bool(tensor.grad.isfinite().all()) and bool((tensor.grad != 0).any())


def test_tables_start_from_text():
    """Counts start a skip chain near the text: here x2 repeats x0, which a plain chain can't say."""
    coupling = CouplingLayer(topologies.skip_chain(3, V), V, combine="product")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(V, (500, 3), generator=generator)
    blocks[:, 2] = blocks[:, 0]
    coupling.init_from_corpus(blocks)
    dist = coupling(torch.zeros(1, 3, V))
    draws = dist.sample((500,), generator=generator)[:, 0]
    assert float((draws[:, 0] == draws[:, 2]).double().mean()) > 0.9
