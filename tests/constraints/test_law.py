"""The constrained law against enumeration: every query, every kind of graph, peaked numbers and impossible ones."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codd_ppl import constraints
from codd_ppl.constraints.backbone import path_of
from codd_ppl.constraints.law import ConstrainedCategorical
from codd_ppl.coupling import CouplingLayer
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import InfeasibleError, ShapeError
from codd_ppl.graphs import topologies
from codd_ppl.testing import chi_square_p_value

GRAPHS = ["independent", "chain", "free chain", "hidden Markov", "mixture", "pairs", "latent tree", "grid"]
PATHS = GRAPHS[:6]
CONSTRAINTS = {
    "regex": (constraints.regex("[ab]+c*b*"), lambda row, spell: _fits(spell(row), "[ab]+c*b*")),
    "words": (
        constraints.contains("ba") & constraints.forbids("cc"),
        lambda row, spell: (t := spell(row)) is not None and "ba" in t and "cc" not in t,
    ),
    "span": (
        constraints.regex("ab|b+c", span=(1, 3)) & constraints.length(4, 5),
        lambda row, spell: (t := spell(row)) is not None
        and 4 <= len(t) <= 5
        and _fits(spell(row[1:3]), "ab|b+c"),
    ),
    "free rest": (constraints.one_of(["bc", "bb"], span=(-3, -1)), lambda row, spell: spell(row[1:3]) in ("bc", "bb")),
}  # fmt: skip


def _fits(text, pattern):
    import re

    return text is not None and re.fullmatch(pattern, text) is not None


def codes(tokens, vocab=5):
    return (tokens * vocab ** torch.arange(tokens.shape[-1] - 1, -1, -1)).sum(-1)


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_query_is_that_of_the_enumerated_conditional(graph, name, case, spell, vocabulary) -> None:
    constraint, accepted = CONSTRAINTS[name]
    for combine in ("projected", "product"):
        toy = case(graph, combine, seed=len(name))
        coupled = constraints.constrain(toy.coupling, constraint, vocabulary)
        assert (coupled.path is not None) == (graph in PATHS)
        law, (truth, chance) = toy.law(coupled), toy.truth(lambda row: accepted(row, spell))
        assert bool((chance > -torch.inf).all())
        everything = toy.sequences[:, None].expand(-1, 2, -1)
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(law.log_partition - toy.law().log_partition, chance, **close)
        torch.testing.assert_close(law.log_prob(everything).exp(), truth.exp(), **close)
        onehot = torch.nn.functional.one_hot(toy.sequences, 5).double()
        marginals = torch.einsum("sb,siv->biv", truth.exp(), onehot)
        torch.testing.assert_close(law.marginals, marginals, **close)
        some = torch.tensor([[True, False, True, False], [False, True, True, False]])
        agrees = ((toy.sequences[:, None] == toy.sequences) | ~some[:, None, None]).all(-1).double()
        expected = torch.einsum("bst,tb->sb", agrees, truth.exp())
        torch.testing.assert_close(law.log_prob(everything, sites=some).exp(), expected, **close)


@pytest.mark.parametrize("graph", ["independent", "chain", "hidden Markov", "mixture", "grid"])
def test_draws_follow_the_conditional(graph, case, spell, vocabulary) -> None:
    constraint, accepted = CONSTRAINTS["words"]
    toy = case(graph, seed=3)
    truth, _ = toy.truth(lambda row: accepted(row, spell))
    law = toy.law(constraints.constrain(toy.coupling, constraint, vocabulary))
    drawn = law.sample((4000,), generator=torch.Generator().manual_seed(1))
    for row in range(2):
        counts = codes(drawn[:, row]).bincount(minlength=625)
        assert counts[truth[:, row] == -torch.inf].sum() == 0
        assert chi_square_p_value(counts, truth[:, row].exp()) > 1e-3


@pytest.mark.parametrize("graph", ["independent", "chain"])
def test_the_mode_is_the_most_probable_text(graph, case, spell, vocabulary) -> None:
    for name, (constraint, accepted) in CONSTRAINTS.items():
        toy = case(graph, seed=len(name) + 5)
        truth, _ = toy.truth(lambda row, accepted=accepted: accepted(row, spell))
        law = toy.law(constraints.constrain(toy.coupling, constraint, vocabulary))
        assert codes(law.mode).tolist() == truth.argmax(0).tolist()


def test_the_mode_with_latents_is_that_of_the_clique_engine(case, vocabulary) -> None:
    from codd_ppl.constraints.cliques import ExtendedGraph

    for seed in range(5):
        toy = case("hidden Markov", seed=seed)
        coupled = constraints.constrain(toy.coupling, constraints.contains("ba"), vocabulary)
        engine = ExtendedGraph(toy.coupling.graph, coupled.layers).law(toy.law())
        assert torch.equal(toy.law(coupled).mode, engine.mode)


def test_conditioning_and_entropy(case, spell, vocabulary) -> None:
    constraint, accepted = CONSTRAINTS["regex"]
    toy = case("hidden Markov", seed=2)
    law = toy.law(constraints.constrain(toy.coupling, constraint, vocabulary))
    truth, _ = toy.truth(lambda row: accepted(row, spell))
    expected = -torch.where(truth > -torch.inf, truth.exp() * truth, 0.0).sum(0)
    found = law.entropy(3000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    x = law.sample(generator=torch.Generator().manual_seed(0))
    some = torch.tensor([True, False, True, False])
    given = law.condition(x, some)
    torch.testing.assert_close(
        law.log_prob(x, sites=some) + given.log_prob(x), law.log_prob(x), rtol=1e-9, atol=1e-9
    )


def test_shapes_that_do_not_fit_are_named(case, vocabulary) -> None:
    law = case("chain").law(
        constraints.constrain(case("chain").coupling, constraints.regex("(?s).*"), vocabulary)
    )
    with pytest.raises(ShapeError, match=r"sample, 2, 4.*found \(3, 4\)"):
        law.log_prob(torch.zeros(3, 4, dtype=torch.int64))


def test_float32_with_everything_against_the_constraint(vocabulary) -> None:
    """The only valid text is 400 nats a site below the likeliest one: a scaled product loses it, the law may not."""
    coupling = CouplingLayer(topologies.hidden_markov(6, 5, 2), 5, combine="product")
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(60 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    logits = torch.zeros(1, 6, 5)
    logits[..., 1] = -400.0
    logits[..., 0] = -350.0
    logits[..., 2] = -torch.inf  # or "b", "ab", .., "a" would spell it as well
    law = constraints.constrain(coupling, constraints.regex("(ba)*"), vocabulary)(logits)
    wide = coupling.double()(logits.double())
    only = torch.tensor([[1, 0, 1, 0, 1, 0]])
    assert torch.equal(law.sample(), only) and torch.equal(law.mode, only)
    torch.testing.assert_close(law.log_prob(only).exp(), torch.ones(1, dtype=torch.float64))
    expected = wide.log_prob(only) + wide.log_partition
    torch.testing.assert_close(law.log_partition, expected, rtol=1e-5, atol=1e-3)
    assert float(law.log_partition) < -1500


def test_hard_zeros_in_the_prior(vocabulary) -> None:
    """Blocks of states that never meet: draws stay within one, and what none can spell is infeasible."""
    graph = topologies.hidden_markov(4, 5, 2)
    plan = CouplingLayer(graph, 5).plan
    potentials = {
        "initial": torch.zeros(2),
        "transition": torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]),
        "emission": torch.where(torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 1, 0]]) > 0, 0.0, -torch.inf),
    }
    prior = CoupledCategorical(plan, potentials, torch.zeros(1, 4, 5))
    path = path_of(plan, prior.sites)
    assert path is not None

    def law(constraint):
        layers = constraints.constrain(CouplingLayer(graph, 5), constraint, vocabulary).layers
        return ConstrainedCategorical(prior, layers, path, str(constraint))

    texts = {tuple(t) for t in law(constraints.regex("c.*[ab]")).sample((300,))[:, 0].tolist()}
    assert texts == {(3, x, y, z) for z in (0, 1) for x in (z, 3) for y in (z, 3)}
    with pytest.raises(InfeasibleError, match=r"contains.*probability zero"):
        law(constraints.contains(["a", "b"])).sample()


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            new = [t.untyped_storage().size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.found = max([self.found, *new])
        return out


def test_a_large_vocabulary_needs_no_table_of_vocabulary_times_states() -> None:
    vocab, states = 8192, 4
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (vocab, 6), generator=generator).tolist()
    lengths = torch.randint(1, 7, (vocab,), generator=generator).tolist()
    tokens = [bytes(row[:n]) for row, n in zip(letters, lengths, strict=True)]
    coupling = CouplingLayer(topologies.hidden_markov(12, vocab, states), vocab, combine="product")
    coupled = constraints.constrain(
        coupling, constraints.length(30, 45) & constraints.contains("ing"), tokens
    )
    automaton = max(layer.states for layer in coupled.layers.sites)
    assert automaton > 60
    logits = torch.randn(1, 12, vocab, generator=generator)
    with torch.no_grad(), Largest() as memory:
        law = coupled(logits)
        drawn = law.sample((2,), generator=generator)
        marginals = law.marginals
    for row in drawn[:, 0].tolist():
        text = b"".join(tokens[t] for t in row)
        assert 30 <= len(text) <= 45 and b"ing" in text
    torch.testing.assert_close(marginals.sum(-1), torch.ones(1, 12), rtol=1e-4, atol=1e-4)
    assert memory.found < 8 * vocab * automaton, "a (vocab x automaton states) table was built"
