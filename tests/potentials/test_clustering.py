"""k-means against its definition and planted groups; contexts and n-grams against counts by hand."""

from itertools import pairwise

import pytest
import torch

from codd_ppl.errors import ConfigError
from codd_ppl.potentials.clustering import contexts, k_means, suffixes


def cost(points: torch.Tensor, own: torch.Tensor, centres: torch.Tensor, weights: torch.Tensor) -> float:
    return float((weights * (points - centres[own]).square().sum(-1)).sum())


def test_planted_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 4
    points = 10 * torch.eye(4)[truth] + torch.randn(60, 4, generator=generator)
    own, centres = k_means(points, 4, generator=generator)
    assert all(len(set(own[truth == k].tolist())) == 1 for k in range(4)) and len(set(own.tolist())) == 4
    for k in range(4):
        torch.testing.assert_close(centres[k], points[own == k].mean(0))


def test_more_iterations_cost_less() -> None:
    points, weights = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)), torch.rand(200)
    costs = []
    for iterations in (1, 2, 4, 8, 50):
        own, centres = k_means(points, 7, weights, iterations, torch.Generator().manual_seed(2))
        nearest = torch.cdist(points, centres).argmin(-1)
        costs.append(cost(points, nearest, centres, weights))
    assert all(b <= a + 1e-4 for a, b in pairwise(costs)) and torch.equal(nearest, own)


def test_copies_and_edges() -> None:
    points = torch.tensor([[0.0], [0.0], [1.0]])
    own, centres = k_means(points, 3, generator=torch.Generator().manual_seed(0))
    assert own[0] == own[1] != own[2] and bool(centres.isfinite().all())
    own, centres = k_means(points, 1, weights=torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(centres, torch.tensor([[0.5]]))
    for clusters in (0, 4):
        with pytest.raises(ConfigError, match="clusters"):
            k_means(points, clusters)


def test_contexts_are_distributions_around_an_item() -> None:
    blocks = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 0, 0, 1]])
    rows = contexts(blocks, blocks, 3, offsets=(-1, 1), neighbours=2)
    assert rows.shape == (3, 2 * 3)
    torch.testing.assert_close(rows.square().sum(-1), torch.ones(3))
    # After token 0: 1, 1, 1, 0, 1; overall behind any token: 0 three times, 1 four, others once.
    after = (torch.tensor([1.0, 4.0, 0.0]) + torch.tensor([3.0, 4.0, 1.0]) / 8) / 6
    torch.testing.assert_close(rows[0, 3:].square() * 2, after)


def test_the_longest_frequent_n_gram() -> None:
    blocks = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    numbers, count = suffixes(blocks, 2, 1, 10)
    assert torch.equal(numbers, blocks) and count == 2
    numbers, count = suffixes(blocks, 2, 2, 1)  # 01 occurs three times
    assert count == 3 and numbers.tolist() == [[0, 2, 0, 2], [1, 0, 2, 1]]
    numbers, count = suffixes(blocks, 2, 3, 10)  # 01 and 10, then 101 twice
    assert count == 5 and numbers[0, 3] == numbers[1, 2] == 4 and numbers[0, 1] != numbers[0, 2]
