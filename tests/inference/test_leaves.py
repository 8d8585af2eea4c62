"""Tokens taken out of the graph: every answer is that of the whole graph."""

import pytest
import torch

from codd_ppl import CoupledCategorical, compile, topologies
from codd_ppl.distributions import coupled_categorical
from codd_ppl.errors import InfeasibleError
from codd_ppl.graphs import FactorGraph
from codd_ppl.testing import chi_square_p_value, enumerate_sequences
from codd_ppl.typing import Tensor


def comb() -> FactorGraph:
    """Two latents of different sizes; one has three tokens, of which two share a table."""
    graph = topologies.independent(4, 3)
    graph.add_variable("z0", 2, latent=True)
    graph.add_variable("z1", 4, latent=True)
    graph.add_factor(("z0", "z1"))
    graph.add_factor(("z0", "x0"), tie="first")
    graph.add_factor(("z1", "x1"), tie="second")
    graph.add_factor(("x3", "z1"))
    graph.add_factor(("z1", "x2"), tie="second")
    return graph


GRAPHS = {
    "hidden_markov": topologies.hidden_markov(5, 3, 4),
    "latent_tree": topologies.latent_tree(5, 3, 2),
    "latent_tree untied": topologies.latent_tree(4, 3, 2, tie=False),
    "star": topologies.star(4, 3, states=3),
    "star tied": topologies.star(4, 3, states=3, tie="emission"),
    "comb": comb(),
}


def law(
    graph: FactorGraph, known: float = 0.4, seed: int = 0, infinite: float = 0.0, own: bool = False
) -> CoupledCategorical:
    """``own``: every batch element and token has an emission table of its own, stacked by tie."""
    generator = torch.Generator().manual_seed(seed)
    tables: dict[str | tuple[str, ...], Tensor] = {}
    for factor in graph.factors.values():
        key = factor.tie or factor.name
        if key not in tables:
            tables[key] = torch.randn(graph.shape(factor.name), generator=generator, dtype=torch.float64)
            tables[key].requires_grad_()
    if own:
        for key in [k for k in tables if isinstance(k, str)]:
            users = tuple(f.name for f in graph.factors.values() if (f.tie or f.name) == key)
            if any(v in graph.tokens for v in graph.factors[users[0]].scope):
                shape = (2, 3, len(users), *tables.pop(key).shape)
                tables[users] = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    sites = len(graph.tokens)
    evidence = torch.randn(2, 3, sites, 3, generator=generator, dtype=torch.float64)
    ruled_out = torch.rand(evidence.shape, generator=generator) < infinite
    ruled_out[..., 0] = False
    evidence = evidence.masked_fill(ruled_out, -torch.inf).requires_grad_()
    tokens = torch.zeros(2, 3, sites, dtype=torch.int64)
    some = torch.rand(tokens.shape, generator=generator) < known
    return CoupledCategorical(compile(graph), tables, evidence, tokens, some)


def whole(dist: CoupledCategorical, monkeypatch: pytest.MonkeyPatch) -> CoupledCategorical:
    """The same law, asked of the whole graph."""
    monkeypatch.setattr(coupled_categorical, "absorb", lambda *a: None)
    other = CoupledCategorical(dist.plan, dist._potentials, dist.log_evidence, dist.tokens, dist.known)
    assert other._leaves is None
    return other


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("known", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("infinite", [0.0, 0.3])
@pytest.mark.parametrize("own", [False, True])
def test_answers_and_gradients(
    name: str, known: float, infinite: float, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = law(GRAPHS[name], known, infinite=infinite, own=own)
    assert dist._leaves is not None
    other = whole(dist, monkeypatch)
    values = torch.zeros(4, 2, 3, len(dist.sites), dtype=torch.int64)
    chosen = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    leaves = [*dist._potentials.values()]
    for ask in (
        lambda d: d.log_partition,
        lambda d: d.log_prob(values, sites=chosen),
        lambda d: d.log_prob(values),
        lambda d: d.marginals.square(),
        lambda d: d.condition(values[0], chosen[0]).log_partition,
    ):
        a, b = ask(dist), ask(other)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        found, expected = (
            torch.autograd.grad(v.sum(), leaves, retain_graph=True, allow_unused=True) for v in (a, b)
        )
        for x, y, like in zip(found, expected, leaves, strict=True):
            x, y = (torch.zeros_like(like) if g is None else g for g in (x, y))
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("own", [False, True])
def test_draws_follow_the_law_and_keep_what_is_known(name: str, own: bool) -> None:
    dist = law(GRAPHS[name], known=0.3, seed=3, infinite=0.2, own=own)
    draws = dist.sample((6000,), generator=torch.Generator().manual_seed(5))
    assert bool((torch.where(dist.known, draws == dist.tokens, True)).all())
    support = enumerate_sequences(3, len(dist.sites))
    place = 3 ** torch.arange(len(dist.sites) - 1, -1, -1)
    probabilities = dist.log_prob(support[:, None, None].expand(-1, 2, 3, -1)).exp()
    index = (draws * place).sum(-1)
    for i in range(2):
        for j in range(3):
            counts = torch.bincount(index[:, i, j], minlength=len(support))
            assert chi_square_p_value(counts, probabilities[:, i, j].detach()) > 1e-4


def test_bounded_memory_gives_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = law(GRAPHS["hidden_markov"])
    expected = dist.sample((50,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("codd_ppl.inference.products.DRAWS", 7)
    assert torch.equal(dist.sample((50,), generator=torch.Generator().manual_seed(0)), expected)


def test_the_whole_graph_is_asked_where_linear_space_is_not_safe() -> None:
    """float32 evidence that needs exp(-150) against exp(-200)."""
    graph = topologies.hidden_markov(4, 2, 2)
    far = torch.tensor([[0.0, -150.0], [-200.0, 0.0]])
    tables = {"initial": torch.zeros(2), "emission": far, "transition": far}
    evidence = torch.zeros(1, 4, 2)
    evidence[:, :, 0] = torch.tensor([-200.0, 0.0, -150.0, 0.0])
    dist = CoupledCategorical(compile(graph), tables, evidence)
    assert dist._leaves is None
    wide = CoupledCategorical(compile(graph), {k: v.double() for k, v in tables.items()}, evidence.double())
    torch.testing.assert_close(dist.log_partition.double(), wide.log_partition, rtol=1e-5, atol=1e-3)


def test_graphs_without_such_leaves() -> None:
    assert law(topologies.chain(4, 3))._leaves is None
    graph = topologies.hidden_markov(3, 2, 2)
    tables = {f.tie or f.name: torch.zeros(graph.shape(f.name)) for f in graph.factors.values()}
    for key in (("x0",), ("z0,x0", "z0,z1")):  # evidence of tokens, and tables of both kinds in one stack
        more = {**tables, key: torch.zeros(1, 2) if len(key) == 1 else torch.zeros(2, 2, 2)}
        assert CoupledCategorical(compile(graph), more, torch.zeros(1, 3, 2))._leaves is None


def test_tables_of_part_of_the_batch_are_those_of_the_whole() -> None:
    dist = law(GRAPHS["star tied"])
    values = torch.ones(5, 2, 3, 4, dtype=torch.int64)
    for lead in ((2, 3), (2, 1), (3,)):
        tables = {k: v.expand(*lead, *v.shape) for k, v in dist._potentials.items()}
        same = CoupledCategorical(dist.plan, tables, dist.log_evidence, dist.tokens, dist.known)
        assert (same._leaves is not None) == (lead == (2, 3))
        torch.testing.assert_close(same.log_partition, dist.log_partition)
        torch.testing.assert_close(same.log_prob(values), dist.log_prob(values))
        torch.testing.assert_close(same.marginals, dist.marginals)


def test_known_tokens_that_are_impossible_together() -> None:
    graph = topologies.hidden_markov(4, 2, 2)
    exact = torch.where(torch.eye(2, dtype=torch.bool), 0.0, -torch.inf)
    tables = {"initial": torch.zeros(2), "emission": exact, "transition": exact}
    tokens, known = torch.tensor([[0, 0, 1, 0]]), torch.tensor([[True, False, True, False]])
    dist = CoupledCategorical(compile(graph), tables, torch.zeros(1, 4, 2), tokens, known)
    assert dist._leaves is not None and bool((dist.log_partition == -torch.inf).all())
    for ask in (dist.sample, lambda: dist.marginals):
        with pytest.raises(InfeasibleError, match=r"probability zero.*'?x\d"):
            ask()
