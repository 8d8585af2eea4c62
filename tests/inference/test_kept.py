"""Linear forms of large tables that live as long as the caller's tensor: never a stale one."""

import gc
import threading

import pytest
import torch

from codd_ppl import CouplingLayer, compile, topologies
from codd_ppl.inference import kept, log_partition, marginals, sample
from codd_ppl.inference.kept import Memory, keepable
from codd_ppl.inference.step_tables import KeptTable
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Tensor

SITES, VOCAB, STATES = 4, 300, 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of this size count as large."""
    monkeypatch.setattr(kept, "LARGE", 1)
    monkeypatch.setattr("codd_ppl.inference.semirings.WIDE", 1)
    monkeypatch.setattr("codd_ppl.inference.products.BLOCK", 1 << 9)


PLAN = compile(topologies.hidden_markov(SITES, VOCAB, STATES))
TOKENS = tuple(f"x{i}" for i in range(SITES))


def potentials(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str | tuple[str, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"initial": (STATES,), "transition": (STATES, STATES), "emission": (STATES, VOCAB)}
    tables = {k: torch.randn(s, generator=generator, dtype=dtype).log_softmax(-1) for k, s in shapes.items()}
    sites = torch.randn(3, SITES, VOCAB, generator=generator, dtype=dtype)
    return {TOKENS: sites, **tables}


def answers(tables: dict[str | tuple[str, ...], Tensor]) -> list[Tensor]:
    found = marginals(PLAN, tables)
    return [log_partition(PLAN, tables), *(found[key] for key in sorted(found, key=str))]


def fresh(tables: dict[str | tuple[str, ...], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The answers with nothing kept."""
    with monkeypatch.context() as patch:
        patch.setattr(kept, "LARGE", 1 << 60)
        return answers(tables)


def check(tables: dict[str | tuple[str, ...], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(answers(tables), fresh(tables, monkeypatch), rtol=1e-10, atol=1e-10)


def test_a_large_table_is_kept_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = potentials()
    step = next(i for i, s in enumerate(PLAN.steps) if s.tie == "emission")
    first, second = (Tables(PLAN, tables).step(step) for _ in range(2))
    assert isinstance(first, KeptTable)
    assert first.stored.data_ptr() == second.stored.data_ptr()
    check(tables, monkeypatch)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.mul_(2.0),
        lambda t: t[0].sub_(3.0),
        lambda t: t.data.copy_(torch.randn_like(t)),
        lambda t: t.numpy().__imul__(0.5),
        lambda t: torch.nn.init.normal_(t),
        lambda t: t.set_(torch.randn(STATES, VOCAB, dtype=t.dtype)),
        lambda t: setattr(t, "data", torch.randn(STATES, VOCAB, dtype=t.dtype)),
    ],
)
def test_edits_are_seen(edit, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = potentials()
    before = answers(tables)
    edit(tables["emission"])
    check(tables, monkeypatch)
    assert not torch.allclose(before[0], answers(tables)[0])


def test_steps_of_an_optimiser_are_seen() -> None:
    layer = CouplingLayer(topologies.hidden_markov(SITES, VOCAB, STATES), VOCAB, combine="product").double()
    logits = torch.randn(2, SITES, VOCAB, dtype=torch.float64)
    tokens = torch.randint(VOCAB, (2, SITES))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)

    def without_graph() -> Tensor:
        with torch.no_grad():
            return layer(logits).log_prob(tokens)

    for _ in range(3):
        loss = -layer(logits).log_prob(tokens).sum()
        assert torch.allclose(without_graph().sum(), -loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert torch.allclose(without_graph(), layer(logits).log_prob(tokens).detach())


def test_what_is_not_kept() -> None:
    weight = torch.randn(8, 8)
    assert keepable(weight) and keepable(torch.nn.Parameter(weight, requires_grad=False))
    leaf = weight.clone().requires_grad_()
    assert not keepable(leaf)
    with torch.no_grad():
        assert keepable(leaf)
    with torch.inference_mode():
        assert not keepable(torch.randn(8, 8))
    assert not keepable(torch.randn(8, 8, device="meta"))
    assert not keepable(torch.randn(8, 8).to_sparse())


def test_values_go_with_their_tensor_and_the_oldest_first() -> None:
    memory = Memory(entries=2)
    tensors = [torch.full((4,), float(i)) for i in range(3)]
    for tensor in tensors:
        assert torch.equal(memory.get(tensor, "double", lambda t: 2 * t), 2 * tensor)
    assert len(memory) == 2
    made = []
    memory.get(tensors[2], "double", lambda t: made.append(t) or 2 * t)
    assert not made
    memory.get(tensors[0], "double", lambda t: made.append(t) or 2 * t)
    assert len(made) == 1
    made.clear()
    del tensor
    tensors.clear()
    gc.collect()
    assert len(memory) == 0


def test_an_edited_value_is_made_anew() -> None:
    memory, tensor = Memory(), torch.randn(5)
    memory.get(tensor, "double", lambda t: 2 * t).zero_()
    assert torch.equal(memory.get(tensor, "double", lambda t: 2 * t), 2 * tensor)


def test_a_value_made_in_inference_mode_serves_a_graph() -> None:
    tables = potentials()
    with torch.inference_mode():
        expected = log_partition(PLAN, tables)
    sites = tables[TOKENS].requires_grad_()
    total = log_partition(PLAN, tables)
    (grad,) = torch.autograd.grad(total.sum(), sites)
    torch.testing.assert_close(total.detach(), expected.clone())
    torch.testing.assert_close(grad.sum(-1), torch.ones(3, SITES, dtype=torch.float64))


def test_threads() -> None:
    tables, found = potentials(), list[Tensor]()
    expected = log_partition(PLAN, tables)

    def work(seed: int) -> None:
        own = potentials(seed)
        for _ in range(10):
            log_partition(PLAN, own)
            found.append(log_partition(PLAN, tables))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(20, 28)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(value, expected) for value in found)


def test_bfloat16_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = potentials(dtype=torch.float32)
    rounded = {**tables, "emission": tables["emission"].bfloat16()}
    step = next(i for i, s in enumerate(PLAN.steps) if s.tie == "emission")
    assert Tables(PLAN, rounded).step(step).stored.dtype == torch.bfloat16
    torch.testing.assert_close(log_partition(PLAN, rounded), log_partition(PLAN, tables), atol=0.05, rtol=0)
    draws = sample(PLAN, rounded, (7,), torch.Generator().manual_seed(0))
    assert all(
        v.shape == (7, 3) and 0 <= int(v.min()) <= int(v.max()) < VOCAB for v in (draws[t] for t in TOKENS)
    )
