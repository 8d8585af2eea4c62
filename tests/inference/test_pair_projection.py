"""Pairs with given marginals: exact marginals after any number of iterations, the I-projection after many."""

import pytest
import torch

from codd_ppl.errors import ConfigError, PotentialsError, ShapeError
from codd_ppl.inference import pair_projection
from codd_ppl.inference.pair_projection import project_pairs


def case(vocab: int = 4, pairs: int = 6) -> tuple[torch.Tensor, ...]:
    tables = 2 * torch.randn(3, vocab, vocab, dtype=torch.float64)
    kind = torch.tensor([2, 0, 2, 1, 0, 2])[:pairs]
    left, right = (torch.randn(pairs, vocab, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return tables, kind, left, right


def joint(laws: pair_projection.PairLaws, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return laws.dense(torch.arange(len(left))).exp() * left.exp()[:, :, None] * right.exp()[:, None]


@pytest.mark.parametrize("iterations", [1, 3, 200])
@pytest.mark.parametrize("spread", [250.0, -1.0])
def test_marginals_are_exact(iterations: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_projection, "SPREAD", spread)
    tables, kind, left, right = case()
    left[0, 1] = -torch.inf  # a token that the network rules out
    left[0] = left[0].log_softmax(-1)
    tables[1, 2] = -torch.inf  # a token that the table lets stand beside nothing
    tables[0, 0, 0] = -torch.inf
    laws = project_pairs(tables, kind, left, right, iterations)
    found = joint(laws, left, right)
    torch.testing.assert_close(found.sum(2), left.exp())
    torch.testing.assert_close(found.sum(1), right.exp())
    assert bool((laws.residual[kind != 1] < (1e-9 if iterations == 200 else 1.0)).all())
    if iterations == 200:  # the form of an I-projection: log r - table is a sum of two functions
        free = laws.dense(torch.arange(6))[kind == 2] - tables[2]
        mixed = free - free[:, :, :1] - free[:, :1] + free[:, :1, :1]
        torch.testing.assert_close(mixed[1:], torch.zeros_like(mixed[1:]), atol=1e-8, rtol=0)


def test_views_agree() -> None:
    tables, kind, left, right = case()
    laws = project_pairs(tables, kind, left, right, 2)
    dense = laws.dense(torch.arange(6))
    x, y = torch.randint(4, (5, 6)), torch.randint(4, (5, 6))
    torch.testing.assert_close(laws.at(x, y), dense[torch.arange(6), x, y])
    pairs, side = torch.tensor([3, 3, 0]), torch.tensor([True, False, True])
    value = torch.tensor([1, 2, 3])
    expected = torch.stack([dense[3, 1], dense[3, :, 2], dense[0, 3]])
    torch.testing.assert_close(laws.given(pairs, value, side), expected)


def test_gradients() -> None:
    tables, kind, left, right = case(3, 4)

    def query(tables: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        return project_pairs(tables, kind, left.log_softmax(-1), right, 3).dense(torch.arange(4))

    assert torch.autograd.gradcheck(query, (tables.requires_grad_(), left.requires_grad_()))


def test_wrong_input_is_named() -> None:
    tables, kind, left, right = case()
    with pytest.raises(ConfigError, match="iterations"):
        project_pairs(tables, kind, left, right, 0)
    with pytest.raises(ShapeError, match="marginals"):
        project_pairs(tables, kind, left[:, :2], right)
    with pytest.raises(ShapeError, match="kinds from 0 to 2"):
        project_pairs(tables, kind + 1, left, right)
    with pytest.raises(PotentialsError, match="NaN"):
        project_pairs(tables * torch.nan, kind, left, right)
