"""Tables of small joints against sums written out, and closed forms."""

import itertools
import math

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.diffusion import total_correlation
from codd_ppl.diffusion.closed_forms import entropy, even_parity
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs.properties import is_forest
from codd_ppl.testing import (
    chow_liu_joint,
    joint_table,
    kl_divergence,
    mutual_information_matrix,
    product_of_marginals,
)
from codd_ppl.typing import Tensor


def random_joint(*shape: int, seed: int = 0) -> Tensor:
    joint = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return joint / joint.sum()


def test_joint_table_is_the_product_without_factors_and_log_prob_with_them() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = joint_table(CouplingLayer(topologies.independent(3, 4), 4)(logits))
    p = logits.softmax(-1)
    torch.testing.assert_close(apart, p[0, :, None, None] * p[1, :, None] * p[2])
    coupling = CouplingLayer(topologies.hidden_markov(3, 4, states=2), 4, combine="product").double()
    known = torch.tensor([False, True, False])
    dist = coupling(logits, tokens=torch.tensor([0, 2, 0]), known=known)
    table = joint_table(dist)
    assert table.shape == (4, 4, 4)
    assert table.sum().item() == pytest.approx(1)
    assert table[:, [0, 1, 3]].abs().max() == 0  # what disagrees with a known token
    assert table[1, 2, 3].log().item() == pytest.approx(dist.log_prob(torch.tensor([1, 2, 3])).item())
    row = coupling(logits[None], tokens=torch.tensor([[0, 2, 0]]), known=known[None])
    torch.testing.assert_close(joint_table(row), table)


def test_joint_table_wants_one_sequence() -> None:
    with pytest.raises(ShapeError, match="batch shape \\(2,\\)"):
        joint_table(CouplingLayer(topologies.chain(2, 3), 3)(torch.zeros(2, 2, 3)))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (3, 2, 2)])
def test_product_of_marginals(shape: tuple[int, ...]) -> None:
    joint = random_joint(*shape)
    product = product_of_marginals(joint)
    for index in itertools.product(*map(range, shape)):
        singles = [joint.movedim(axis, 0)[value].sum().item() for axis, value in enumerate(index)]
        assert product[index].item() == pytest.approx(math.prod(singles))
    assert kl_divergence(joint, product).item() == pytest.approx(total_correlation(joint).item(), abs=1e-12)


def test_kl_divergence() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2))
    assert kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p).item() == 0
    with pytest.raises(ShapeError, match="one shape"):
        kl_divergence(p, q[:2])


def test_mutual_information_matrix_is_the_total_correlation_of_each_pair() -> None:
    joint = random_joint(2, 3, 4, 2)
    matrix = mutual_information_matrix(joint)
    for i, j in itertools.product(range(4), repeat=2):
        rest = [axis for axis in range(4) if axis not in (i, j)]
        pair = joint.sum(rest)
        expected = entropy(pair) if i == j else total_correlation(pair)
        assert matrix[i, j].item() == pytest.approx(expected.item(), abs=1e-12)


def test_chow_liu_joint_is_the_best_tree() -> None:
    joint = random_joint(3, 3, 3, 3, seed=2)
    graph, law = chow_liu_joint(joint)
    information = mutual_information_matrix(joint)
    assert is_forest(graph) and len(graph.factors) == 3
    assert law.sum().item() == pytest.approx(1)
    kept = sum(information[tuple(graph.tokens.index(v) for v in f.scope)] for f in graph.factors.values())
    assert kl_divergence(joint, law).item() == pytest.approx((total_correlation(joint) - kept).item())
    trees = [
        edges for edges in itertools.combinations(itertools.combinations(range(4), 2), 3) if spans(edges)
    ]
    assert len(trees) == 16  # Cayley: 4^2 labelled trees
    best = max(sum(information[edge].item() for edge in edges) for edges in trees)
    assert kept.item() == pytest.approx(best)


def spans(edges: tuple[tuple[int, int], ...]) -> bool:
    """Whether three edges connect four nodes."""
    reached = {0}
    for _ in range(3):
        reached |= {b for edge in edges for a, b in (edge, edge[::-1]) if a in reached}
    return len(reached) == 4


def test_chow_liu_joint_of_a_tree_is_that_tree_and_of_parity_is_a_product() -> None:
    chain = torch.einsum("a,ab,bc->abc", *(random_joint(*s, seed=3) for s in ((3,), (3, 3), (3, 3))))
    chain = chain / chain.sum()
    torch.testing.assert_close(chow_liu_joint(chain)[1], chain)
    parity = even_parity(4)
    torch.testing.assert_close(chow_liu_joint(parity)[1], product_of_marginals(parity))


@pytest.mark.parametrize("joint", [torch.ones(2) / 2, torch.ones(2, 3) / 6, torch.ones(2, 2)])
def test_chow_liu_joint_says_what_it_wants(joint: Tensor) -> None:
    with pytest.raises(ConfigError, match="expected"):
        chow_liu_joint(joint)
