"""Evidence times an emission table, and draws, in blocks: as in one go."""

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.inference import kept, path_model, path_tokens, products
from codd_ppl.inference.products import absorb_rows, draw_rows, invert, times, transposed_times
from codd_ppl.testing import chi_square_p_value


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 1 << 10)
    monkeypatch.setattr(products, "DRAWS", 1 << 8)


@pytest.mark.parametrize("where", [None, [4, 0, 2]])
def test_absorbed_rows(where: list[int] | None) -> None:
    log = torch.randn(5, 2000, dtype=torch.float64) * 20
    log[2] = -torch.inf
    log[0, ::3] = -torch.inf
    table = torch.rand(2000, 7, dtype=torch.float64)
    index = None if where is None else torch.tensor(where)
    total, top = absorb_rows(log, table, index)
    rows = log if index is None else log[index]
    expected = rows.exp() @ table
    torch.testing.assert_close(total * top.exp(), expected)
    assert (total[(rows == -torch.inf).all(-1)] == 0).all()


@pytest.mark.parametrize("rounded", [False, True])
def test_products_and_their_gradients(rounded: bool) -> None:
    table = torch.rand(500, 7)
    table = table.bfloat16() if rounded else table
    weights, states = torch.rand(4, 500, requires_grad=True), torch.rand(4, 7, requires_grad=True)
    torch.testing.assert_close(times(weights, table), weights @ table.float())
    torch.testing.assert_close(transposed_times(states, table), states @ table.float().T)
    (grad,) = torch.autograd.grad(times(weights, table).sum(), weights)
    torch.testing.assert_close(grad, table.float().sum(1).expand(4, -1))


@pytest.mark.parametrize("size", [1, 5, 1024, 1025, 5000])
def test_inverted_sums(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(64, size, generator=generator) * (torch.rand(64, size, generator=generator) < 0.3)
    weights[:, -1] = 1e-3
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-50
    found = invert(weights, uniform)
    total = weights.double().cumsum(-1)
    target = uniform * total[:, -1]
    above = total.gather(1, found[:, None])[:, 0]
    below = above - weights.double().gather(1, found[:, None])[:, 0]
    slack = 1e-12 * total[:, -1]
    assert (weights.gather(1, found[:, None]) > 0).all()
    assert ((below <= target + slack) & (target <= above + slack)).all()


@pytest.mark.slow
@pytest.mark.ci
def test_draws_follow_the_law() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(2, 1500, 3, generator=generator)
    log = torch.full((2, 1500), -torch.inf)
    log[:, 1000:1010] = torch.randn(2, 10, generator=generator)
    states = torch.tensor([[0, 2]]).expand(20_000, 2)
    values = draw_rows(table, states, log, None, generator)
    for row, state in enumerate((0, 2)):
        weights = (log[row].exp() * table[row, :, state])[1000:1010]
        counts = torch.bincount(values[:, row] - 1000, minlength=10)
        assert chi_square_p_value(counts, weights / weights.sum()) > 1e-3


@pytest.mark.parametrize("sweeps", [1, 3])
def test_the_sweep_over_masked_rows_is_the_sweep(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = CouplingLayer(topologies.hidden_markov(6, 40, 5), 40, sweeps=sweeps).double()
    logits = torch.randn(3, 6, 40, generator=generator, dtype=torch.float64)
    logits[..., 7] = -torch.inf
    known = torch.rand(3, 6, generator=generator) < 0.4
    tokens = torch.randint(40, (3, 6), generator=generator)
    with torch.no_grad():
        expected = layer(logits, tokens=tokens, known=known).log_evidence
        asked, sweep = [], path_tokens.sweep_tokens
        monkeypatch.setattr(kept, "LARGE", 1)
        monkeypatch.setattr(path_model, "_models", {})
        monkeypatch.setattr(path_tokens, "sweep_tokens", lambda *a: asked.append(1) or sweep(*a))
        found = layer(logits, tokens=tokens.masked_fill(~known, 99), known=known).log_evidence
    assert asked
    torch.testing.assert_close(found[~known], expected[~known], rtol=1e-9, atol=1e-9)
