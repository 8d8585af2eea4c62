"""The compiled passes along a hidden Markov model: by enumeration, against the general queries, where they decline."""

import math
from dataclasses import replace

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import InfeasibleError, PotentialsError
from codd_ppl.inference import native
from codd_ppl.inference.first_weights import first_weights
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.hidden_projection import project_path, project_path_pooled
from codd_ppl.inference.projection import project
from codd_ppl.potentials import ContextualLatentPotentials, LogarithmicPool
from codd_ppl.testing import (
    brute_marginals,
    chi_square_p_value,
    enumerate_log_joint,
    random_log_potentials,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled loops here")

SITES, VOCAB, STATES = 4, 3, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Case:
    """A prior, evidence and known tokens of some sequences."""

    def __init__(self, kind: str, batch: int = 3, states: int = STATES, vocab: int = VOCAB, seed: int = 0):
        self.graph = topologies.hidden_markov(SITES, vocab, states)
        self.plan, self.names = compile(self.graph), self.graph.tokens
        self.prior = random_log_potentials(self.graph, seed=seed)
        generator = seeded(seed)
        self.tokens = torch.randint(vocab, (batch, SITES), generator=generator)
        self.known = torch.rand(batch, SITES, generator=generator) < 0.4
        self.known[0] = False
        self.evidence = None
        if kind == "latents":
            latents = tuple(v.name for v in self.graph if v.latent)
            self.prior[latents] = torch.randn(batch, SITES, states, generator=generator, dtype=torch.float64)
        if kind == "tokens":
            self.evidence = torch.randn(batch, SITES, vocab, generator=generator, dtype=torch.float64)
            self.evidence[:, 1, -1] = -math.inf
            self.known[:, 1] = False
        self.target = torch.randn(batch, SITES, vocab, generator=generator, dtype=torch.float64)
        self.target[:, 3, 0] = -math.inf
        self.target = self.target.log_softmax(-1).masked_fill(self.known[..., None], 0.0)

    @property
    def path(self) -> HiddenPath:
        found = HiddenPath.of(self.plan, self.prior, self.names, self.evidence, self.tokens, self.known)
        assert found is not None
        return found

    def clamped(self, weights: torch.Tensor | None = None) -> dict:
        evidence = torch.zeros(*self.known.shape, self.target.shape[-1], dtype=torch.float64)
        evidence = evidence if self.evidence is None else evidence + self.evidence
        evidence = evidence if weights is None else evidence + weights
        clash = self.known[..., None] & (torch.arange(evidence.shape[-1]) != self.tokens[..., None])
        return {**self.prior, self.names: evidence.masked_fill(clash, -math.inf)}

    def sequences(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Law of the tokens, (batch, vocab ** sites), by enumeration."""
        joint = enumerate_log_joint(self.graph, self.clamped(weights)).flatten(1).softmax(-1)
        joint = joint.reshape(-1, *[v.cardinality for v in self.graph])
        latents = [1 + i for i, v in enumerate(self.graph) if v.latent]
        return joint.sum(latents).flatten(1)


def counts(tokens: torch.Tensor, vocab: int = VOCAB) -> torch.Tensor:
    place = vocab ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[-1])


@pytest.mark.parametrize("kind", ["plain", "latents", "tokens"])
def test_marginals_by_enumeration(kind):
    case = Case(kind)
    expected = torch.stack([brute_marginals(case.graph, case.clamped())[name] for name in case.names], 1)
    torch.testing.assert_close(case.path.marginals, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["plain", "latents", "tokens"])
def test_log_marginals_are_of_the_free_tokens(kind):
    case = Case(kind)
    expected = case.path.marginals.log().masked_fill(case.known[..., None], 0.0)
    torch.testing.assert_close(case.path.log_marginals, expected)


def test_inputs_in_any_layout():
    """Evidence and tokens that lie transposed in memory, as C would not read them."""
    case = Case("tokens", batch=5, vocab=7)
    expected = (case.path.marginals, case.path.mode, case.path.sample((3,), seeded(0)))
    turned = [
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (case.evidence, case.tokens, case.known)
    ]
    case.evidence = turned[0].mT.contiguous().mT
    case.tokens, case.known = turned[1:]
    assert not any(t.is_contiguous() for t in (case.evidence, case.tokens, case.known))
    path = case.path
    for found, one in zip((path.marginals, path.mode, path.sample((3,), seeded(0))), expected, strict=True):
        assert found.equal(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "states,vocab,batch", [(1, 2, 1), (3, 5, 2), (17, 19, 9), (40, 33, 17), (130, 65, 5)]
)
def test_any_size_is_what_the_general_queries_say(states, vocab, batch, dtype, monkeypatch):
    case = Case("tokens", batch, states, vocab, seed=states)
    prior = {key: table.to(dtype) for key, table in case.prior.items()}
    law = CoupledCategorical(case.plan, prior, case.evidence.to(dtype), case.tokens, case.known)
    assert law._path is not None
    found, close = law.marginals, 2e-5 if dtype == torch.float32 else 1e-11
    monkeypatch.setattr(native, "library", lambda: None)
    law = CoupledCategorical(case.plan, prior, case.evidence.to(dtype), case.tokens, case.known)
    assert law._path is None
    torch.testing.assert_close(found, law.marginals, rtol=close, atol=close)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("sweeps,tolerance", [(1, 0.0), (3, 0.0), (30, 1e-3)])
@pytest.mark.parametrize("kind", ["plain", "latents", "tokens"])
def test_the_projection_is_the_sweep(kind, sweeps, tolerance, started, monkeypatch):
    case = Case(kind, batch=9, states=5, vocab=6)
    target = case.target
    if kind == "tokens":  # what the prior rules out is not to be met
        target = target.masked_fill(case.evidence == -math.inf, -math.inf).log_softmax(-1)
        target = target.masked_fill(case.known[..., None], 0.0)
    start = 0.3 * torch.randn(target.shape, generator=seeded(4), dtype=torch.float64) if started else None
    fitted = project_path(
        case.path,
        target,
        sweeps,
        tolerance,
        None if start is None else first_weights(start, target, ~case.known),
    )
    monkeypatch.setattr(native, "library", lambda: None)
    prior = case.prior if case.evidence is None else {**case.prior, case.names: case.evidence}
    expected = project(
        case.plan, prior, case.names, target, ~case.known, sweeps, tolerance, case.tokens, start=start
    )
    torch.testing.assert_close(fitted.log_weights, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "latents", "tokens"])
def test_draws_have_the_enumerated_law(kind):
    case, draws = Case(kind), 20_000
    for number, (drawn, expected) in enumerate(
        zip(case.path.sample((draws,), seeded(1)).unbind(1), case.sequences(), strict=True)
    ):
        assert bool((drawn == case.tokens[number])[:, case.known[number]].all())
        assert chi_square_p_value(counts(drawn), expected) > 1e-3


def test_a_draw_stays_what_it_was_after_the_next():
    case = Case("tokens")
    path, law = case.path, CoupledCategorical(case.plan, case.prior, case.evidence, case.tokens, case.known)
    for sample in (lambda n: path.sample((), seeded(n)), lambda n: law.sample(generator=seeded(n))):
        draws = [sample(n) for n in range(8)]
        for n, drawn in enumerate(draws):
            assert drawn.equal(sample(n))
        assert any(not drawn.equal(draws[0]) for drawn in draws)
    assert not path.tokens[path.free].any()


def test_a_projection_hands_its_messages_to_the_draw():
    case = Case("latents")
    fitted = project_path(case.path, case.target, 2, 0.0, None)
    expected = case.sequences(fitted.log_weights)
    for drawn, law in zip(fitted.sample((20_000,), seeded(2)).unbind(1), expected, strict=True):
        assert chi_square_p_value(counts(drawn), law) > 1e-3
    # The marginals need messages from the right anew.
    joint = expected.reshape(-1, *[VOCAB] * SITES)
    for site in range(SITES):
        others = [1 + i for i in range(SITES) if i != site]
        torch.testing.assert_close(fitted.marginals[:, site], joint.sum(others), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "latents", "tokens"])
def test_the_mode_by_enumeration(kind):
    case = Case(kind, batch=12)
    if kind == "tokens":  # zeros are left to log space
        case.evidence[:, 1, -1] = -3.0
    joint = enumerate_log_joint(case.graph, case.clamped())
    best = torch.unravel_index(joint.flatten(1).argmax(1), joint.shape[1:])
    expected = torch.stack([best[[*case.graph.variables].index(name)] for name in case.names], -1)
    assert case.path.mode.equal(expected)
    evidence = torch.zeros(12, SITES, VOCAB, dtype=torch.float64) if case.evidence is None else case.evidence
    assert CoupledCategorical(case.plan, case.prior, evidence, case.tokens, case.known).mode.equal(expected)


@pytest.mark.parametrize("states,vocab,batch", [(1, 2, 1), (17, 19, 9), (40, 33, 17)])
def test_a_larger_mode_scores_as_the_general_one(states, vocab, batch, monkeypatch):
    case = Case("plain", batch, states, vocab, seed=states)
    evidence = torch.randn(batch, SITES, vocab, generator=seeded(2), dtype=torch.float64)
    law = CoupledCategorical(case.plan, case.prior, evidence, case.tokens, case.known)
    found = law.mode
    monkeypatch.setattr(native, "library", lambda: None)
    assert found.equal(CoupledCategorical(case.plan, case.prior, evidence, case.tokens, case.known).mode)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sharpened_draws_have_the_enumerated_law(temperature):
    case = Case("tokens", batch=1)
    clamped = case.clamped()
    joint = enumerate_log_joint(case.graph, clamped)[0].flatten().softmax(-1)
    joint = joint.reshape([v.cardinality for v in case.graph])
    order = [i for i, v in enumerate(case.graph) if v.latent] + [
        i for i, v in enumerate(case.graph) if not v.latent
    ]
    joint = joint.permute(order).reshape(STATES**SITES, VOCAB**SITES)
    given = (joint / joint.sum(1, keepdim=True)) ** (1 / temperature)
    expected = joint.sum(1) @ (given / given.sum(1, keepdim=True))
    law = CoupledCategorical(
        case.plan,
        case.prior,
        *(t.expand(20_000, *t.shape[1:]) for t in (case.evidence, case.tokens, case.known)),
    )
    drawn = law.sample_sharpened(temperature, seeded(3))
    assert chi_square_p_value(counts(drawn), expected) > 1e-3


def test_a_batch_in_parts():
    case = Case("latents", batch=7, states=300)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert len(native.slices(7, SITES * 300 * 300)) == threads
            fitted = project_path(case.path, case.target, 2, 0.0, None)
            found.append((case.path.marginals, fitted.log_weights, fitted.sample((2,), seeded(0))))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "latents"])
def test_nothing_known(kind):
    """One law for all, or one for each where the latents have evidence of their own."""
    case = Case(kind)
    bare = {
        **case.prior,
        case.names: torch.zeros(1 if kind == "plain" else 3, SITES, VOCAB, dtype=torch.float64),
    }
    expected = torch.stack([brute_marginals(case.graph, bare)[name] for name in case.names], 1)
    assert len(expected) == (1 if kind == "plain" else 3)
    torch.testing.assert_close(case.path.unconditional().marginals, expected)


@pytest.mark.parametrize("contextual", [False, True])
def test_a_pooled_layer_is_the_same_with_and_without(contextual, monkeypatch):
    graph = topologies.hidden_markov(SITES, VOCAB, 5)
    potentials = ContextualLatentPotentials(graph, 8, width=4, mask_ratio=True) if contextual else None
    layer = CouplingLayer(graph, VOCAB, 8, potentials=potentials, pool=LogarithmicPool((0.5, 1.0)))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=seeded(7))
    logits, hidden = (
        torch.randn(3, SITES, VOCAB, generator=seeded(0)),
        torch.randn(3, SITES, 8, generator=seeded(1)),
    )
    case = Case("plain")
    with torch.no_grad():
        law = layer(logits, hidden=hidden, tokens=case.tokens, known=case.known)
        assert law._path is not None and law._path.ahead is not None
        alone = [
            layer(logits[i], hidden=hidden[i], tokens=case.tokens[i], known=case.known[i]).log_weights
            for i in range(3)
        ]
        monkeypatch.setattr(native, "library", lambda: None)
        other = layer(logits, hidden=hidden, tokens=case.tokens, known=case.known)
    torch.testing.assert_close(law.log_weights, other.log_weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(law.log_weights, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind,states,vocab,batch", [
    ("plain", 1, 2, 1), ("latents", 3, 5, 2), ("plain", 17, 19, 9), ("latents", 40, 33, 17), ("plain", 130, 65, 5),
])  # fmt: skip
def test_one_pass_pools_and_projects_as_two(kind, states, vocab, batch, dtype, monkeypatch):
    case, pool = Case(kind, batch, states, vocab, seed=states), LogarithmicPool((0.5, 1.0)).to(dtype)
    torch.nn.init.normal_(pool.weights, generator=seeded(1))
    case.prior = {key: table.to(dtype) for key, table in case.prior.items()}
    path, network = case.path, case.target.to(dtype)
    network[0] = torch.randn(SITES, vocab, generator=seeded(2), dtype=dtype).log_softmax(-1)
    close = 1e-4 if dtype == torch.float32 else 1e-11
    before = torch.get_num_threads()
    with torch.no_grad():
        target = pool(network, path.log_marginals, path.unconditional().log_marginals, ~case.known)
        two = project_path(path, target, 1, 0.0, None)
        monkeypatch.setattr(native, "WORK", 1)
        try:
            for threads in (1, 2):  # 2: the batch in parts
                torch.set_num_threads(threads)
                one = project_path_pooled(case.path, network, pool.knots, pool.weights)
                for name in ("log_weights", "said", "ahead"):
                    torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=close, atol=close)
                torch.testing.assert_close(
                    one.weight[~case.known], two.weight[~case.known], rtol=close, atol=0
                )
        finally:
            torch.set_num_threads(before)
        assert one.log_weights[case.known].abs().sum() == 0
        assert bool((one.log_weights[0, 3, 0] == -math.inf) == (network[0, 3, 0] == -math.inf))


def test_a_pooled_step_draws_the_enumerated_law():
    graph, case, draws = topologies.hidden_markov(SITES, VOCAB, STATES), Case("plain"), 20_000
    layer = CouplingLayer(graph, VOCAB, pool=LogarithmicPool((0.5, 1.0)))
    torch.nn.init.normal_(layer.pool.weights, std=0.5, generator=seeded(3))
    logits = torch.randn(3, SITES, VOCAB, generator=seeded(0))
    with torch.no_grad():
        law = layer(logits, tokens=case.tokens, known=case.known)
        assert law._path is not None and law._path.ahead is not None
        case.prior = {key: table.double() for key, table in layer.potentials().items()}
    drawn = law.sample((draws,), generator=seeded(1)).unbind(1)
    for one, expected in zip(drawn, case.sequences(law.log_weights.double()), strict=True):
        assert chi_square_p_value(counts(one), expected) > 1e-3


@pytest.mark.parametrize("pooled", [False, True])
def test_what_a_step_calls(pooled, monkeypatch):
    """Back, forth and back again; a pool costs no pass of its own, once its prior's marginals are known."""
    case, called, call = Case("plain"), [], native.call
    layer = CouplingLayer(case.graph, VOCAB, pool=LogarithmicPool() if pooled else None)
    logits = torch.randn(3, SITES, VOCAB, generator=seeded(0))
    with torch.no_grad():
        layer(logits, tokens=case.tokens, known=case.known)
        monkeypatch.setattr(native, "call", lambda name, *args: (called.append(name), call(name, *args))[1])
        layer(logits, tokens=case.tokens, known=case.known).sample()
    assert called == ["path_right", "path_pool" if pooled else "path_left", "path_draw"]


@pytest.mark.parametrize("given", ["known", "evidence"])
@pytest.mark.parametrize("site", range(SITES))
def test_a_token_at_either_end_that_the_prior_all_but_rules_out(site, given):
    """Its message vanishes in linear space, and no later message tells of it."""
    case = Case("plain")
    evidence = torch.randn(3, SITES, VOCAB, generator=seeded(1), dtype=torch.float64)
    known = torch.zeros_like(case.known)
    if given == "known":
        known[:, site], case.tokens[:, site] = True, VOCAB - 1
    else:
        evidence[:, site, :-1] = -math.inf
    asked = {
        "sample": lambda law: law.sample((2,), seeded(0)),
        "sharpened": lambda law: law.sample_sharpened(0.5, seeded(0)),
        "mode": lambda law: law.mode,
    }
    for least in (-720.0, -800.0, -math.inf):  # a denormal number, and two zeros, one of which is none
        case.prior["emission"][:, -1] = least
        for name, ask in asked.items():
            law = CoupledCategorical(case.plan, case.prior, evidence, case.tokens, known)
            if least > -math.inf:
                assert bool((ask(law)[..., site] == VOCAB - 1).all()), name
                continue
            with pytest.raises(InfeasibleError):
                ask(law)


def test_a_step_that_is_declined_is_not_tried_again(monkeypatch):
    case, tried = Case("plain"), []
    layer, logits = CouplingLayer(case.graph, VOCAB), torch.randn(3, SITES, VOCAB, generator=seeded(0))
    with torch.no_grad():
        expected = layer(logits, tokens=case.tokens, known=case.known).log_weights
        for module in ("coupling", "inference.projection"):
            monkeypatch.setattr(f"codd_ppl.{module}.project_path", lambda *args: tried.append(1))
        found = layer(logits, tokens=case.tokens, known=case.known)
    assert len(tried) == 1 and found._given_path is None
    torch.testing.assert_close(found.log_weights, expected, rtol=1e-5, atol=1e-5)


def test_another_type_than_the_tables_is_declined():
    case = Case("plain")
    with torch.no_grad():
        assert project_path(case.path, case.target.float(), 1, 0.0, None) is None
        assert (
            project_path_pooled(case.path, case.target.float(), torch.tensor([0.0, 1.0]), torch.ones(1, 3))
            is None
        )
    weights = torch.ones(1, 3, requires_grad=True)
    assert project_path_pooled(case.path, case.target, torch.tensor([0.0, 1.0]), weights) is None


def test_a_pool_is_trained_after_a_step_in_inference_mode():
    """What is kept from step to step may come from there."""
    case = Case("plain")
    layer = CouplingLayer(case.graph, VOCAB, pool=LogarithmicPool((1.0,)))
    for parameter in layer.potentials.parameters():
        parameter.requires_grad_(False)
    logits = torch.randn(3, SITES, VOCAB, generator=seeded(0))
    with torch.no_grad():
        expected = layer(logits, tokens=case.tokens, known=case.known).log_weights
    layer.potentials.start_from({key: table.clone() for key, table in layer.potentials().items()})
    with torch.inference_mode():
        layer(logits, tokens=case.tokens, known=case.known)
    found = layer(logits, tokens=case.tokens, known=case.known).log_weights
    torch.testing.assert_close(found.detach(), expected)
    found[:, :, 0].sum().backward()
    assert bool(layer.pool.weights.grad.abs().sum() > 0)


@pytest.mark.parametrize("graph", [topologies.independent(SITES, VOCAB), topologies.chain(SITES, VOCAB)])
def test_a_pool_beside_other_graphs(graph):
    """Known sites count for nothing there, either."""
    case, layer = Case("plain"), CouplingLayer(graph, VOCAB, pool=LogarithmicPool())
    logits = torch.randn(3, SITES, VOCAB, generator=seeded(0)).masked_fill(case.known[..., None], -math.inf)
    with torch.no_grad():
        law = layer(logits, tokens=case.tokens, known=case.known)
        assert bool(law.log_partition.isfinite().all())
        if not layer.warm_starts:
            torch.testing.assert_close(law.log_partition, torch.zeros(3))


@pytest.mark.parametrize("pooled", [False, True])
def test_the_logits_of_a_known_site_do_not_matter(pooled):
    """Not even where they rule out every token, and the log-weights there are 0."""
    graph, case = topologies.hidden_markov(SITES, VOCAB, 5), Case("plain")
    layer = CouplingLayer(graph, VOCAB, pool=LogarithmicPool((1.0,)) if pooled else None)
    logits = torch.randn(3, SITES, VOCAB, generator=seeded(0))
    other = logits.masked_fill(case.known[..., None], -math.inf)
    with torch.no_grad():
        one, two = (layer(logit, tokens=case.tokens, known=case.known) for logit in (logits, other))
    assert one._path is not None and one.log_weights.equal(two.log_weights)
    assert bool((one.log_weights[case.known] == 0).all())
    assert one.sample((9,), generator=seeded(1)).equal(two.sample((9,), generator=seeded(1)))


def test_where_it_declines():
    case = Case("plain")
    args = (case.names, None, case.tokens, case.known)
    assert HiddenPath.of(case.plan, case.prior, *args) is not None
    learned = {key: table.clone().requires_grad_() for key, table in case.prior.items()}
    assert HiddenPath.of(case.plan, learned, *args) is None
    with torch.no_grad():
        assert HiddenPath.of(case.plan, learned, *args) is not None
    own = {**case.prior, "emission": case.prior["emission"].expand(3, -1, -1)}
    assert HiddenPath.of(case.plan, own, *args) is None
    unary = {**case.prior, "x0": torch.zeros(VOCAB, dtype=torch.float64)}
    assert HiddenPath.of(case.plan, unary, *args) is None
    tree = topologies.latent_tree(SITES, VOCAB, STATES)
    assert HiddenPath.of(compile(tree), random_log_potentials(tree), tree.tokens, *args[1:]) is None
    assert project_path(case.path, case.target.requires_grad_(), 1, 0.0, None) is None


def test_underflow_is_left_to_log_space():
    """Evidence against all states but one at each site, more than float32 holds: the answers stay exact."""
    graph = topologies.hidden_markov(6, 3, 3)
    prior = {key: table.float() for key, table in random_log_potentials(graph, scale=30.0).items()}
    evidence = 60 * torch.randn(4, 6, 3, generator=seeded(0))
    law = CoupledCategorical(compile(graph), prior, evidence)
    expected = brute_marginals(
        graph, {**{k: v.double() for k, v in prior.items()}, graph.tokens: evidence.double()}
    )
    torch.testing.assert_close(
        law.marginals.double(), torch.stack([expected[n] for n in graph.tokens], 1), rtol=1e-3, atol=1e-4
    )
    assert law.sample(generator=seeded(0)).shape == (4, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["initial", "emission", "transition", "evidence"])
def test_nan_and_infinity_are_named(where, bad):
    case = Case("tokens")
    prior, evidence = dict(case.prior), case.evidence.clone()
    broken = evidence if where == "evidence" else prior[where].clone()
    broken.view(-1)[-1] = bad
    if where != "evidence":
        prior[where] = broken
    free = torch.zeros_like(case.known)
    law = CoupledCategorical(case.plan, prior, evidence, case.tokens, free)
    for ask in (lambda: law.marginals, lambda: law.sample(), lambda: law.sample_sharpened(0.5)):
        with pytest.raises(PotentialsError, match="must be finite or -inf"):
            ask()


def test_impossible_tokens_are_named():
    case = Case("plain", batch=1)
    prior = {**case.prior, "emission": case.prior["emission"].clone()}
    prior["emission"][:, 2] = -math.inf
    evidence = torch.zeros(1, SITES, VOCAB, dtype=torch.float64)
    law = CoupledCategorical(
        case.plan, prior, evidence, torch.full((1, SITES), 2), torch.tensor([[True, False, False, False]])
    )
    for ask in (lambda: law.marginals, lambda: law.sample(), lambda: law.sample_sharpened(0.5)):
        with pytest.raises(InfeasibleError):
            ask()


def test_a_step_of_a_frozen_coupling_takes_it(monkeypatch):
    """The whole layer: the same law with and without, and the draw starts from what the projection left."""
    layer = CouplingLayer(topologies.hidden_markov(SITES, VOCAB, 5), VOCAB)
    logits, case = torch.randn(3, SITES, VOCAB, generator=seeded(0)), Case("plain")
    with torch.no_grad():
        law = layer(logits, tokens=case.tokens, known=case.known)
        assert law._path is not None and law._path.ahead is not None
        marginals = law.marginals
        monkeypatch.setattr(native, "library", lambda: None)
        other = layer(logits, tokens=case.tokens, known=case.known)
    assert other._path is None
    torch.testing.assert_close(law.log_weights, other.log_weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(marginals, other.marginals, rtol=1e-5, atol=1e-6)


def test_marginals_of_a_projected_law_are_those_of_its_queries_and_none_where_that_is_not_safe():
    case = Case("plain")
    layer = CouplingLayer(case.graph, VOCAB)
    with torch.no_grad():
        dist = layer(torch.randn(3, SITES, VOCAB, generator=seeded(1)), tokens=case.tokens, known=case.known)
        path = dist._given_path
        assert path.ahead is not None
        torch.testing.assert_close(
            path.marginals.view_as(dist.marginals), dist.marginals, rtol=1e-5, atol=1e-6
        )
        assert replace(path, ahead=torch.full_like(path.ahead, 1e-37)).marginals is None
