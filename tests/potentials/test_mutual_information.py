"""Mutual information of text: against exact laws and hand counts; planted trees come back from samples."""

import itertools
import math
import random

import networkx as nx
import pytest
import torch

from codd_ppl import compile, topologies
from codd_ppl.diffusion.closed_forms import total_correlation
from codd_ppl.errors import ShapeError, TokenError
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import log_score, sample
from codd_ppl.potentials import TablePotentials, mutual_information, pairwise_mutual_information
from codd_ppl.potentials.statistics import DENSE, pair_counts


def edges(graph: FactorGraph) -> set[tuple[int, int]]:
    return {tuple(int(name[1:]) for name in factor.scope) for factor in graph.factors.values()}


def test_pair_counts_dense_and_sparse_agree() -> None:
    pairs = torch.randint(0, 50, (300, 2))
    cells, counts = pair_counts(pairs, 50)
    large = math.isqrt(DENSE) + 1
    again, recounted = pair_counts(pairs, large)
    assert torch.equal(cells, again) and torch.equal(counts, recounted) and counts.sum() == 300
    dense = torch.zeros(50, 50).index_put_(tuple(pairs.T), torch.ones(300), accumulate=True)
    assert torch.equal(dense[tuple(cells.T)].double(), counts)


def test_by_hand() -> None:
    blocks = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    plain = pairwise_mutual_information(blocks, 2, correct=False)
    assert plain[0, 1] == pytest.approx(math.log(2)) and plain[0, 2] == pytest.approx(0.0, abs=1e-12)
    assert plain[2, 2] == pytest.approx(math.log(2)) and torch.equal(plain, plain.T)
    corrected = pairwise_mutual_information(blocks, 2)
    assert corrected[0, 1] == pytest.approx(math.log(2) + 1 / 8)  # 2 pairs, 2 left, 2 right, n = 4
    assert corrected[0, 2] == pytest.approx(-1 / 8)  # 4 pairs
    pooled = mutual_information(blocks, 2, correct=False)
    joint = torch.tensor([[3, 1], [1, 3]]).double() / 8
    assert pooled[1] == pytest.approx(float(total_correlation(joint)))
    assert pooled[2] == pytest.approx(float(plain[0, 2]), abs=1e-12) and set(pooled) == {1, 2}


def test_the_bias_is_taken_off() -> None:
    """Independent tokens: the plain estimate has (V - 1)^2 / 2n nats, the corrected one nearly none."""
    blocks = torch.randint(0, 12, (2000, 8))
    upper = torch.triu_indices(8, 8, 1).unbind()
    plain, corrected = (
        pairwise_mutual_information(blocks, 12, correct=c)[upper].mean() for c in (False, True)
    )
    assert plain == pytest.approx(11**2 / 4000, rel=0.1)
    assert abs(corrected) < 0.1 * plain
    by_offset = mutual_information(blocks, 12)
    assert max(abs(v) for v in by_offset.values()) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_the_closed_form(seed: int) -> None:
    """KL(P || tree) = TC - sum of the edges' information, and no other tree is closer; by the engine's own score."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand(2, 3, 3, 2, 3, generator=generator, dtype=torch.float64) ** 6
    joint = torch.nn.functional.pad(
        joint / joint.sum(), (0, 0, 0, 1, 0, 0, 0, 0, 0, 1)
    )  # five tokens of three values
    sites = range(5)

    def marginal(*kept: int) -> torch.Tensor:
        return joint.sum([i for i in sites if i not in kept])

    information = {
        (i, j): float(total_correlation(marginal(i, j))) for i, j in itertools.combinations(sites, 2)
    }
    matrix = torch.zeros(5, 5)
    for (i, j), value in information.items():
        matrix[i, j] = matrix[j, i] = value

    def divergence(graph: FactorGraph) -> float:
        tables: dict[str, torch.Tensor] = {f"x{i}": marginal(i).log() for i in sites}
        for i, j in edges(graph):
            ratio = marginal(i, j).log() - marginal(i).log()[:, None] - marginal(j).log()
            tables[f"x{i},x{j}"] = ratio.nan_to_num(nan=0.0, neginf=-torch.inf)
        values = torch.cartesian_prod(*[torch.arange(3)] * 5)
        values = values[joint.flatten() > 0]
        p = joint.flatten()[joint.flatten() > 0]
        return float(
            (
                p
                * (
                    p.log()
                    - log_score(compile(graph), tables, dict(zip(graph.tokens, values.T, strict=True)))
                )
            ).sum()
        )

    best = topologies.chow_liu(5, 3, matrix)
    total = float(total_correlation(joint))
    assert divergence(best) == pytest.approx(total - sum(information[e] for e in edges(best)), abs=1e-6)
    for parents in ([None, 0, 0, 0, 0], [None, 0, 1, 2, 3], [None, 0, 0, 1, 1]):
        other = topologies.tree(parents, 3)
        assert divergence(other) == pytest.approx(total - sum(information[e] for e in edges(other)), abs=1e-6)
        assert divergence(best) <= divergence(other) + 1e-9


def planted(parents: list[int | None], vocab: int, seed: int, n: int) -> torch.Tensor:
    """Samples of a tree whose edges each permute the tokens and keep them with chance 0.75."""
    generator = torch.Generator().manual_seed(seed)
    graph = topologies.tree(parents, vocab)
    tables = {}
    for name in graph.factors:
        noisy = 0.75 * torch.eye(vocab)[torch.randperm(vocab, generator=generator)] + 0.25 / vocab
        tables[name] = noisy.log()
    drawn = sample(compile(graph), tables, (n,), generator=generator)
    return torch.stack([drawn[name] for name in graph.tokens], -1)


@pytest.mark.parametrize("seed", range(6))
def test_a_planted_tree_is_recovered(seed: int) -> None:
    draw, sites = random.Random(seed), 12
    tree = nx.from_prufer_sequence([draw.randrange(sites) for _ in range(sites - 2)])
    parents: list[int | None] = [None] * sites
    for parent, child in nx.bfs_edges(tree, 0):
        parents[child] = parent
    blocks = planted(parents, 5, seed, 1500)
    graph = topologies.chow_liu(sites, 5, pairwise_mutual_information(blocks, 5))
    assert edges(graph) == {tuple(sorted(edge)) for edge in tree.edges}
    assert all(v > 0.4 for v in TablePotentials(graph).init_from_corpus(blocks).values())


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_planted_offset_is_recovered(period: int) -> None:
    """Interleaved chains, independent of each other: the forest of one skip, and nothing else."""
    sites = 4 * period + 3
    parents = [None if i < period else i - period for i in range(sites)]
    blocks = planted(parents, 4, period, 1500)
    found = pairwise_mutual_information(blocks, 4)
    assert edges(topologies.chow_liu(sites, 4, found, above=0.02)) == {
        (i, i + period) for i in range(sites - period)
    }
    # the same law along the text: tied by offset
    start = torch.randint(0, 4, (1500, sites))
    for i in range(period, sites):
        stay = torch.rand(1500) < 0.75
        start[:, i] = torch.where(stay, (start[:, i - period] + 1) % 4, start[:, i])
    graph = topologies.chow_liu(sites, 4, mutual_information(start, 4), above=0.02)
    assert edges(graph) == {(i, i + period) for i in range(sites - period)} and set(graph.ties) == {
        f"skip{period}"
    }


def test_tied_edges_of_two_offsets_are_recovered() -> None:
    """Columns of three: each token depends on the one above, the first row is a chain."""
    sites, n = 18, 4000
    x = torch.randint(0, 4, (n, sites))
    for i in range(1, sites):
        source = i - 3 if i >= 3 else i - 1
        x[:, i] = torch.where(torch.rand(n) < 0.85, x[:, source], x[:, i])
    graph = topologies.chow_liu(sites, 4, mutual_information(x, 4))
    assert edges(graph) == {(i - 3 if i >= 3 else i - 1, i) for i in range(1, sites)}
    assert set(graph.ties) == {"skip1", "skip3"}


def test_chunks_don_t_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.randint(0, 7, (200, 9))
    whole = pairwise_mutual_information(blocks, 7)
    monkeypatch.setattr("codd_ppl.potentials.statistics.DENSE", 500)
    torch.testing.assert_close(pairwise_mutual_information(blocks, 7), whole)


def test_errors() -> None:
    blocks = torch.randint(0, 7, (20, 4))
    for offsets in ([0], [4]):
        with pytest.raises(ShapeError, match="expected offsets from 1 to 3"):
            mutual_information(blocks, 7, offsets)
    for function in (mutual_information, pairwise_mutual_information):
        with pytest.raises(TokenError):
            function(blocks, 5)
        with pytest.raises(ShapeError):
            function(blocks.float(), 7)
    with pytest.raises(ShapeError, match="mutual_information by offset"):
        pairwise_mutual_information(blocks, 5000)
