"""Spanning trees against their enumeration (Cayley: 125 trees over 5 sites), networkx and frequencies."""

import itertools
import math

import networkx as nx
import pytest
import torch
from scipy import stats

from codd_ppl.errors import InfeasibleError, PotentialsError, ShapeError
from codd_ppl.inference import star_mesh
from codd_ppl.inference.spanning_trees import edge_marginals, log_partition, maximum_spanning_forest, sample

Edges = tuple[tuple[int, int], ...]


def all_trees(sites: list[int]) -> list[Edges]:
    """Every spanning tree, by looking at every set of n - 1 edges."""
    pairs = list(itertools.combinations(sites, 2))
    found = []
    for edges in itertools.combinations(pairs, max(0, len(sites) - 1)):
        graph = nx.Graph(list(edges))
        graph.add_nodes_from(sites)
        if nx.is_connected(graph):
            found.append(edges)
    return found


def tree_weights(log_beta: torch.Tensor, trees: list[Edges]) -> torch.Tensor:
    zero = log_beta.new_zeros(log_beta.shape[:-2])
    return torch.stack([sum((log_beta[..., i, j] for i, j in tree), zero) for tree in trees], -1)


def random_weights(*shape: int, scale: float = 2.0) -> torch.Tensor:
    weights = scale * torch.randn(*shape, shape[-1], dtype=torch.float64)
    return (weights + weights.mT) / 2


def enumerated_marginals(log_beta: torch.Tensor, trees: list[Edges]) -> torch.Tensor:
    chance = tree_weights(log_beta, trees).softmax(-1)
    result = torch.zeros_like(log_beta)
    for index, tree in enumerate(trees):
        for i, j in tree:
            result[..., i, j] += chance[..., index]
            result[..., j, i] += chance[..., index]
    return result


@pytest.fixture(params=["plain", "logarithms"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "logarithms":
        monkeypatch.setattr(star_mesh, "SPREAD", -1.0)
    return request.param


def test_determinant_equals_enumeration(route: str) -> None:
    log_beta, trees = random_weights(2, 3, 5), all_trees(list(range(5)))
    assert len(trees) == 125
    expected = tree_weights(log_beta, trees).logsumexp(-1)
    torch.testing.assert_close(log_partition(log_beta), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edge_marginals(log_beta), enumerated_marginals(log_beta, trees))
    laplacian = torch.diag_embed(
        torch.where(torch.eye(5, dtype=torch.bool), 0.0, log_beta.exp()).sum(-1)
    ) - torch.where(torch.eye(5, dtype=torch.bool), 0.0, log_beta.exp())
    torch.testing.assert_close(expected, laplacian[..., 1:, 1:].logdet())


def test_equal_weights_count_trees() -> None:
    """Cayley: n ** (n - 2)."""
    found = log_partition(torch.zeros(40, 40, dtype=torch.float64))
    assert math.isclose(float(found), 38 * math.log(40), rel_tol=1e-13)


def test_members_have_their_own_trees(route: str) -> None:
    sets = [[0, 1, 2, 3, 4], [1, 3, 4], [2], [], [0, 4]]
    log_beta = random_weights(len(sets), 5)
    members = torch.zeros(len(sets), 5, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        members[row, chosen] = True
    found, marginal = log_partition(log_beta, members), edge_marginals(log_beta, members)
    for row, chosen in enumerate(sets):
        trees = all_trees(chosen) if chosen else [()]
        torch.testing.assert_close(found[row], tree_weights(log_beta[row], trees).logsumexp(-1))
        torch.testing.assert_close(marginal[row], enumerated_marginals(log_beta[row], trees))
    assert torch.equal((sample(log_beta, members) >= 0).sum(-1), (members.sum(-1) - 1).clamp_min(0))


def test_missing_edges_and_torn_graphs(route: str) -> None:
    log_beta = random_weights(2, 5).masked_fill(torch.eye(5, dtype=torch.bool), torch.nan)  # never read
    log_beta[0, 0, 1] = log_beta[0, 1, 0] = -torch.inf
    log_beta[1, :2, 2:] = log_beta[1, 2:, :2] = -torch.inf
    trees = all_trees(list(range(5)))
    log_beta.requires_grad_()
    found = log_partition(log_beta)
    torch.testing.assert_close(found[0], tree_weights(log_beta[0], trees).logsumexp(-1))
    assert found[1] == -torch.inf
    found.sum().backward()
    assert log_beta.grad is not None and bool((log_beta.grad[1] == 0).all())
    torch.testing.assert_close(2 * log_beta.grad[0], enumerated_marginals(log_beta[0].detach(), trees))
    for query in (edge_marginals, sample):
        with pytest.raises(InfeasibleError, match=r"batch element .*1.*don't hang together"):
            query(log_beta)


@pytest.mark.parametrize("spread", [30.0, 300.0, 5000.0])
def test_no_spread_of_the_weights_costs_digits(spread: float) -> None:
    """Two tight pairs on a thin thread: a factorisation of the Laplacian loses the thread beyond 36 nats."""
    log_beta = torch.full((4, 4), -torch.inf, dtype=torch.float64)
    for i, j, value in ((0, 1, 0.0), (1, 2, -spread), (2, 3, 0.5)):
        log_beta[i, j] = log_beta[j, i] = value
    assert float(log_partition(log_beta)) == pytest.approx(0.5 - spread, rel=1e-14)
    expected = (log_beta > -torch.inf).double()
    torch.testing.assert_close(edge_marginals(log_beta), expected, rtol=1e-12, atol=1e-12)
    assert sample(log_beta).tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("size", [3, 5])
def test_gradients(size: int, route: str) -> None:
    base = 0.5 * torch.randn(2, size, size, dtype=torch.float64)
    members = torch.ones(2, size, dtype=torch.bool)
    members[1, 1] = False

    def query(free: torch.Tensor) -> torch.Tensor:
        return log_partition(free + free.mT, members)

    assert torch.autograd.gradcheck(query, base.requires_grad_())
    assert torch.autograd.gradgradcheck(query, base)


def test_draws_have_the_weights_as_frequencies(generator: torch.Generator, route: str) -> None:
    trees = all_trees(list(range(5)))
    log_beta = random_weights(2, 5, scale=1.0)
    drawn = sample(log_beta, sample_shape=(20_000,), generator=generator)
    number = {frozenset(tree): index for index, tree in enumerate(trees)}
    chance = tree_weights(log_beta, trees).softmax(-1)
    for row in range(2):
        counts = torch.zeros(len(trees), dtype=torch.float64)
        for parents in drawn[:, row].tolist():
            counts[number[frozenset(tuple(sorted((i, p))) for i, p in enumerate(parents) if p >= 0)]] += 1
        expected = chance[row] * len(drawn)
        rare = expected < 5
        seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
        want = torch.cat([expected[~rare], expected[rare].sum()[None]])
        keep = want > 0
        assert stats.chisquare(seen[keep].numpy(), want[keep].numpy()).pvalue > 1e-3


def test_a_generator_fixes_the_draws() -> None:
    log_beta = random_weights(3, 6)
    first, second = (sample(log_beta, None, (4, 2), torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (4, 2, 3, 6) and torch.equal(first, second)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_maximum_spanning_forest_equals_networkx(density: float) -> None:
    scores = random_weights(6, 9)
    absent = torch.rand(6, 9, 9) > density
    scores = scores.masked_fill(absent | absent.mT, -torch.inf)
    members = torch.rand(6, 9) < 0.8
    parents = maximum_spanning_forest(scores, members)
    for row in range(6):
        graph = nx.Graph()
        inside = members[row].nonzero()[:, 0].tolist()
        graph.add_nodes_from(inside)
        for i, j in itertools.combinations(inside, 2):
            if scores[row, i, j] > -torch.inf:
                graph.add_edge(i, j, weight=float(scores[row, i, j]))
        expected = {frozenset(edge) for edge in nx.maximum_spanning_edges(graph, data=False)}
        found = {frozenset((i, p)) for i, p in enumerate(parents[row].tolist()) if p >= 0}
        assert found == expected


def test_wrong_weights_are_named() -> None:
    with pytest.raises(ShapeError, match="sites, sites"):
        log_partition(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="members as bool"):
        log_partition(torch.zeros(3, 3), torch.ones(3))
    with pytest.raises(PotentialsError, match="NaN"):
        log_partition(torch.full((3, 3), torch.nan))
    with pytest.raises(PotentialsError, match="not symmetric"):
        sample(torch.arange(9.0).reshape(3, 3))
