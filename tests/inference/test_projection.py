"""The projected coupling against iterative proportional fitting on the enumerated joint.

``Case`` holds a prior over a few tokens, what is known, and the marginals that the masked sites shall have.
Its law of the tokens is a table of all sequences, so that everything below is a sum over it.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import LoopyBeliefPropagation, compile
from codd_ppl.errors import ConfigError, IntractableError, PotentialsError
from codd_ppl.evaluation.footprint import footprint
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import (
    clique_projection,
    kept,
    log_partition,
    marginals,
    native,
    path_candidates,
    path_projection,
    path_tokens,
    projection,
)
from codd_ppl.inference.projection import project, walk


def mixed() -> FactorGraph:
    """A latent over two tokens, an edge between tokens, a factor over three variables, and a loner."""
    graph = topologies.independent(5, 3)
    graph.add_variable("z0", 2, latent=True)
    graph.add_factor(("z0", "x1"))
    graph.add_factor(("x0", "x1"))
    graph.add_factor(("x2", "z0", "x3"))
    graph.add_factor(("x2",), name="prior")
    return graph


def latent_ring() -> FactorGraph:
    """Three tokens on three latents that form a ring, and a second component."""
    graph = topologies.independent(4, 3)
    for i in range(3):
        graph.add_variable(f"z{i}", 2, latent=True)
    for i in range(3):
        graph.add_factor((f"z{i}", f"z{(i + 1) % 3}"), tie="ring")
        graph.add_factor((f"z{i}", f"x{i}"), tie="emission")
    return graph


GRAPHS = {
    "chain": topologies.chain(4, 3, tie=None),
    "chain tied": topologies.chain(4, 3),
    "forest": topologies.tree([None, 0, 0, None, 3], 3),
    "inner root": topologies.tree([2, 2, None, 2, 3], 3),
    "caterpillar": topologies.caterpillar(2, 1, 3),
    "star": topologies.star(4, 3),
    "star latent": topologies.star(4, 3, states=3),
    "hidden_markov": topologies.hidden_markov(4, 3, 3),
    "latent_tree": topologies.latent_tree(4, 3, 2),
    "mixed": mixed(),
    "grid": topologies.grid(2, 2, 3),
    "skip chain": topologies.skip_chain(4, 3),
    "latent ring": latent_ring(),
}
FORESTS = {name: graph for name, graph in GRAPHS.items() if compile(graph).junction is None}


@dataclass
class Case:
    graph: FactorGraph
    prior: dict
    log_q: torch.Tensor
    known: torch.Tensor

    @property
    def sites(self) -> tuple[str, ...]:
        return self.graph.tokens

    def projected(self, sweeps: int = 1, **settings) -> torch.Tensor:
        plan = compile(self.graph)
        return project(plan, self.prior, self.sites, self.log_q, ~self.known, sweeps=sweeps, **settings)

    def law(self, log_w: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of all sequences, batch first, one axis per token."""
        tables = dict(self.prior)
        if log_w is not None:
            tables[self.sites] = tables[self.sites].double() + log_w.double()
        joint = testing.enumerate_log_joint(self.graph, tables)
        lead = joint.dim() - len(self.graph)
        latent = [lead + i for i, v in enumerate(self.graph) if v.latent]
        joint = joint.logsumexp(latent) if latent else joint
        return joint.flatten(lead).log_softmax(-1).reshape(joint.shape)

    def marginals(self, law: torch.Tensor) -> torch.Tensor:
        """Log-marginals of every site, by summing the table."""
        lead, count = self.log_q.dim() - 2, len(self.sites)
        rest = [[lead + j for j in range(count) if j != i] for i in range(count)]
        return torch.stack([law.logsumexp(r) if r else law for r in rest], -2)

    def error(self, law: torch.Tensor) -> float:
        gap = (self.marginals(law).exp() - self.log_q.exp()).abs() * ~self.known[..., None]
        return float(gap.max())

    def fitted(self, sweeps: int) -> torch.Tensor:
        """The same projection the long way: iterative proportional fitting of the table of all sequences."""
        law, lead, count = self.law(), self.log_q.dim() - 2, len(self.sites)
        for _ in range(sweeps):
            for i in range(count):
                found = law.logsumexp([lead + j for j in range(count) if j != i])
                log_q, masked = self.log_q[..., i, :], ~self.known[..., i, None]
                ratio = torch.where(masked, log_q - found, 0.0)
                shape = [*ratio.shape[:lead], *[1] * count]
                shape[lead + i] = ratio.shape[-1]
                law = law + torch.where(masked & (found == -math.inf), -math.inf, ratio).reshape(shape)
        return law


def case(
    graph, batch=(3,), seed=0, known=0.0, infinite=0.0, dtype=torch.float64, scale=1.0, spread=1.0
) -> Case:
    """Random tables of deviation ``scale``, targets of deviation ``spread``; a share of sites known."""
    generator = torch.Generator().manual_seed(seed)
    prior = testing.random_log_potentials(graph, dtype=dtype, scale=scale, seed=seed)
    sites, vocab = len(graph.tokens), graph.variables["x0"].cardinality
    is_known = torch.rand(*batch, sites, generator=generator) < known
    tokens = torch.randint(vocab, (*batch, sites), generator=generator)
    clash = is_known[..., None] & (torch.arange(vocab) != tokens[..., None])
    prior[graph.tokens] = torch.zeros(*batch, sites, vocab, dtype=dtype).masked_fill(clash, -math.inf)
    logits = spread * torch.randn(*batch, sites, vocab, generator=generator, dtype=torch.float64).to(dtype)
    ruled_out = torch.rand(*batch, sites, vocab, generator=generator) < infinite
    ruled_out[..., 0] = False
    return Case(graph, prior, logits.masked_fill(ruled_out, -math.inf).log_softmax(-1), is_known)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.flatten(1), q.flatten(1)
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


@pytest.mark.parametrize("known", [0.0, 0.4], ids=["masked", "known"])
@pytest.mark.parametrize("infinite", [0.0, 0.3], ids=["soft", "hard"])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.slow
@pytest.mark.ci
def test_twenty_sweeps_reach_the_marginals_and_the_fitted_joint(name, known, infinite):
    this = case(GRAPHS[name], known=known, infinite=infinite, seed=1)
    law = this.law(this.projected(20))
    assert this.error(law) < 1e-6
    exact = this.fitted(100)
    assert this.error(exact) < 1e-9
    torch.testing.assert_close(this.law(this.projected(40)).exp(), exact.exp(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", ["star latent", "hidden_markov", "latent_tree"])
def test_a_sweep_over_leaves_is_a_sweep_of_the_table_in_reading_order(name, scale):
    """Every token is visited once, in order; so one sweep must do to the joint what fitting its table does."""
    this = case(GRAPHS[name], known=0.2, infinite=0.2, seed=5, scale=scale)
    for sweeps in (1, 2):
        found, expected = this.law(this.projected(sweeps)), this.fitted(sweeps)
        torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_engine_sees_the_same_marginals(name):
    """Not only by enumeration: the marginals query of the projected graph gives q at masked sites."""
    this = case(GRAPHS[name], known=0.3, seed=2)
    tables = dict(this.prior)
    tables[this.sites] = tables[this.sites] + this.projected(20)
    found = marginals(compile(this.graph), tables)[this.sites]
    gap = (found - this.log_q.exp()).abs() * ~this.known[..., None]
    assert float(gap.max()) < 1e-6


@pytest.mark.parametrize("name", GRAPHS)
def test_each_sweep_lowers_the_divergence_to_the_solution(name):
    """Generalised Pythagoras: KL(p* || p_k) falls with every sweep, and so does the marginal error in the end."""
    this = case(GRAPHS[name], seed=3, spread=2.0)
    exact = this.fitted(100)
    laws = [this.law(), *(this.law(this.projected(k)) for k in (1, 2, 3, 4))]
    gaps = torch.stack([divergence(exact, law) for law in laws])
    assert bool((gaps[1:] <= gaps[:-1] + 1e-10).all()), gaps
    assert bool((gaps[1] < gaps[0]).all())
    assert this.error(laws[4]) < this.error(laws[1]) + 1e-12


@pytest.mark.parametrize("name", GRAPHS)
def test_no_other_joint_with_these_marginals_is_closer_to_the_prior(name):
    """Pythagoras with equality: any r with the same marginals has KL(r || prior) = KL(r || p*) + KL(p* || prior)."""
    this = case(GRAPHS[name], batch=(2,), seed=4)
    best, prior = this.law(this.projected(40)), this.law()
    nearest = divergence(best, prior)
    other = case(GRAPHS[name], batch=(2,), seed=5)
    other.log_q = this.log_q
    rivals = [other.law(other.projected(40)), other.fitted(100)]
    independent = Case(
        topologies.independent(len(this.sites), 3), {this.sites: this.log_q}, this.log_q, this.known
    )
    for rival in [*rivals, independent.law()]:
        assert this.error(rival) < 1e-7
        distance = divergence(rival, prior)
        assert bool((distance >= nearest - 1e-9).all())
        torch.testing.assert_close(distance, nearest + divergence(rival, best), rtol=1e-6, atol=1e-6)


def test_one_sweep_is_near_on_a_hidden_markov_model():
    this = case(GRAPHS["hidden_markov"], batch=(20,), seed=6)
    exact = this.fitted(60)
    start, once = (divergence(exact, law).mean() for law in (this.law(), this.law(this.projected(1))))
    assert once < 0.02 * start
    assert this.error(this.law(this.projected(1))) < 0.1


def test_the_last_visited_site_of_a_sweep_is_exact():
    this = case(GRAPHS["chain"], seed=7)
    found = this.marginals(this.law(this.projected(1))).exp()
    exact = [i for i in range(4) if torch.allclose(found[:, i], this.log_q.exp()[:, i], atol=1e-12)]
    assert exact, "no site has its target marginal after a sweep"


def test_independent_topology_is_the_identity():
    this = case(topologies.independent(4, 5), known=0.3, seed=0)
    log_w = this.projected(1)
    expected = torch.where(
        this.known[..., None], 0.0, this.log_q + math.log(5)
    )  # prior uniform over five values
    torch.testing.assert_close(log_w, expected, rtol=0, atol=1e-12)
    assert this.error(this.law(log_w)) < 1e-14


def test_factors_of_zeros_are_the_identity():
    graph = GRAPHS["mixed"]
    this = case(graph, seed=0, scale=0.0)
    assert this.error(this.law(this.projected(1))) < 1e-12


def test_a_prior_that_has_the_marginals_already_is_left_alone():
    this = case(GRAPHS["latent_tree"], seed=1)
    this.log_q = this.marginals(this.law())
    torch.testing.assert_close(this.law(this.projected(1)), this.law(), rtol=1e-10, atol=1e-12)


def test_all_known_and_length_one():
    this = case(GRAPHS["hidden_markov"], known=1.1)
    assert torch.equal(this.projected(2), torch.zeros(3, 4, 3, dtype=torch.float64))
    this = case(topologies.hidden_markov(1, 4, 3), seed=2)
    assert this.error(this.law(this.projected(1))) < 1e-12


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 0), (2, 1, 2)])
@pytest.mark.parametrize("name", ["chain", "hidden_markov", "mixed", "skip chain"])
def test_batch_shapes(name, batch):
    this = case(GRAPHS[name], batch=batch, known=0.3, seed=3)
    found = this.projected(3)
    assert found.shape == this.log_q.shape
    assert not found.isnan().any()
    if 0 not in batch:
        flat = Case(this.graph, dict(this.prior), this.log_q.reshape(-1, *found.shape[-2:]), this.known)
        flat.prior[this.sites] = this.prior[this.sites].reshape(-1, *found.shape[-2:])
        flat.known = this.known.reshape(-1, found.shape[-2])
        torch.testing.assert_close(flat.projected(3).reshape(found.shape), found, rtol=1e-12, atol=1e-12)


def test_tables_of_part_of_the_batch_broadcast():
    graph = GRAPHS["chain tied"]
    this = case(graph, batch=(2, 3), seed=4)
    this.prior["edge"] = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    alone = case(graph, batch=(3,), seed=4)
    alone.log_q, alone.known = this.log_q[1], this.known[1]
    alone.prior = {"edge": this.prior["edge"][1], this.sites: this.prior[this.sites][1]}
    torch.testing.assert_close(this.projected(2)[1], alone.projected(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["chain tied", "star", "hidden_markov", "mixed", "grid", "latent ring"])
def test_gradients(name):
    """Weights and the log-partition under them, through targets and tables, by finite differences."""
    this = case(GRAPHS[name], batch=(1,), known=0.3, seed=0)
    keys = [k for k in this.prior if k != this.sites]
    plan = compile(this.graph)

    def function(logits, *tables):
        prior = {**dict(zip(keys, tables, strict=True)), this.sites: this.prior[this.sites]}
        log_w = project(plan, prior, this.sites, logits.log_softmax(-1), ~this.known)
        return log_w, log_partition(plan, {**prior, this.sites: prior[this.sites] + log_w})

    leaves = [t.clone().requires_grad_() for t in (this.log_q, *(this.prior[k] for k in keys))]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    grads = torch.autograd.grad(function(*leaves)[0][:, 1:].square().sum(), leaves)
    assert all(bool((g != 0).any()) for g in grads), "a gradient doesn't arrive"


def test_gradients_are_finite_where_tokens_are_ruled_out():
    this = case(GRAPHS["hidden_markov"], known=0.3, infinite=0.4, seed=3)
    log_q = this.log_q.clone().requires_grad_()
    log_w = project(compile(this.graph), this.prior, this.sites, log_q, ~this.known, sweeps=2)
    torch.where(log_w == -math.inf, 0.0, log_w).sum().backward()
    assert log_q.grad is not None and bool(log_q.grad.isfinite().all())


@pytest.mark.parametrize("name", GRAPHS)
def test_float32(name):
    this, exact = (case(GRAPHS[name], known=0.3, seed=8, dtype=d) for d in (torch.float32, torch.float64))
    found = this.projected(3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.projected(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["chain", "hidden_markov", "latent_tree", "mixed"])
def test_peaked_tables(name, dtype, monkeypatch):
    """Log-potentials of deviation 100: far outside what linear space holds, so log space must take over.

    The law of the last visited site is still exactly its target, and float32 agrees with float64.
    """
    routes = []
    sweeps = projection._sweeps
    monkeypatch.setattr(projection, "_sweeps", lambda *a, fast: routes.append(fast) or sweeps(*a, fast=fast))
    this = case(GRAPHS[name], seed=2, scale=100.0, dtype=dtype)
    this.prior = {k: t.float().to(dtype) for k, t in this.prior.items()}
    this.log_q = this.log_q.float().to(dtype).log_softmax(-1)
    log_w = this.projected(1)
    assert bool(log_w.isfinite().all())
    if dtype == torch.float32:
        assert routes == ([False] if name == "hidden_markov" else [True, False])
    wide = Case(this.graph, {k: t.double() for k, t in this.prior.items()}, this.log_q.double(), this.known)
    torch.testing.assert_close(log_w.double(), wide.projected(1), rtol=1e-4, atol=2e-3)
    tables = {**wide.prior, wide.sites: wide.prior[wide.sites] + log_w.double()}
    found = marginals(compile(this.graph), tables)[wide.sites]
    close = (found - this.log_q.double().exp()).abs().amax(-1).amin(-1)
    assert bool((close < (1e-2 if dtype == torch.float32 else 1e-9)).all())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_tolerance_ends_the_sweeps_early_and_not_too_early(name):
    this = case(GRAPHS[name], seed=9)
    assert torch.equal(this.projected(30, tolerance=1e9), this.projected(2)), (
        "one sweep has nothing to compare"
    )
    early = this.projected(30, tolerance=1e-4)
    assert this.error(this.law(early)) < 1e-4
    assert not torch.equal(early, this.projected(30))


def test_the_walk_visits_every_token_and_ends_where_it_began():
    for graph in FORESTS.values():
        plan = compile(graph)
        moves = walk(plan)
        visited = [plan.variables[m[1]].name for m in moves if m[0] == "visit"]
        assert sorted(visited) == sorted(graph.variables)
        assert sum(m[0] == "down" for m in moves) == sum(m[0] == "up" for m in moves)


def test_the_walk_over_cliques_fits_every_token_and_ends_where_it_began():
    for name in GRAPHS.keys() - FORESTS.keys():
        plan = compile(GRAPHS[name])
        moves = clique_projection.walk(plan)
        visited = [v for kind, i in moves if kind == "visit" for v in plan.junction.cliques[i].residual]
        assert sorted(visited) == sorted(plan.variable)
        depth = 0
        for kind, _ in moves:
            depth += (kind == "down") - (kind == "up")
            assert depth >= 0
        assert depth == 0


@pytest.mark.parametrize("name", ["grid", "latent ring"])
def test_peaked_tables_on_a_loop_in_float32(name):
    """Deviation 100: the last visited site still has its target, and float32 agrees with float64."""
    this = case(GRAPHS[name], seed=2, scale=100.0, dtype=torch.float32)
    log_w = this.projected(1)
    assert bool(log_w.isfinite().all())
    wide = Case(this.graph, {k: t.double() for k, t in this.prior.items()}, this.log_q.double(), this.known)
    torch.testing.assert_close(log_w.double(), wide.projected(1), rtol=1e-4, atol=2e-3)
    tables = {**wide.prior, wide.sites: wide.prior[wide.sites] + wide.projected(1)}
    found = marginals(compile(this.graph), tables)[wide.sites]
    close = (found - this.log_q.double().exp()).abs().amax(-1).amin(-1)
    assert bool((close < 1e-6).all())


def test_an_approximate_plan_is_refused():
    this = case(GRAPHS["chain"])
    plan = compile(this.graph, approximate=LoopyBeliefPropagation())
    with pytest.raises(IntractableError, match="project is not defined"):
        project(plan, this.prior, this.sites, this.log_q, ~this.known)


def test_inputs_are_left_alone():
    this = case(GRAPHS["mixed"], known=0.3, infinite=0.2)
    before = {k: t.clone() for k, t in this.prior.items()}, this.log_q.clone()
    this.projected(3)
    assert all(torch.equal(before[0][k], t) for k, t in this.prior.items())
    assert torch.equal(before[1], this.log_q)


def test_errors():
    this = case(GRAPHS["chain tied"])
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        this.projected(0)
    for wide in ((2,), (4, 3)):
        this.prior["edge"] = torch.zeros(*wide, 3, 3, dtype=torch.float64)
        with pytest.raises(PotentialsError, match="batch shape"):
            this.projected()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backwards", [False, True])
def test_the_sweep_along_a_hidden_markov_model_is_the_walk(seed, backwards, monkeypatch):
    """Same weights and gradients, whichever way the sites are listed; the walk must not be needed."""
    graph = topologies.hidden_markov(7, 4, 3)
    this = case(graph, batch=(3,), known=(0.0, 0.3, 0.9)[seed % 3], seed=seed)
    plan, sites = compile(graph), this.sites[::-1] if backwards else this.sites
    prior = {k: v for k, v in this.prior.items() if k != this.sites}
    evidence, log_q, masked = this.prior[this.sites], this.log_q.clone().requires_grad_(), ~this.known
    if backwards:
        evidence, masked = evidence.flip(-2), masked.flip(-1)
    leaf = prior["emission"].clone().requires_grad_()
    tables = {**prior, "emission": leaf, sites: evidence}
    target = log_q.flip(-2) if backwards else log_q

    def run():
        log_w = project(plan, tables, sites, target, masked, sweeps=1 + seed % 3)
        grads = torch.autograd.grad(log_w.square().sum(), (leaf, log_q), allow_unused=True)
        return log_w, *(g for g in grads if g is not None)

    with monkeypatch.context() as patch:
        patch.setattr(projection, "_sweeps", lambda *a, **k: pytest.fail("the walk was taken"))
        found = run()
    with monkeypatch.context() as patch:
        patch.setattr(projection, "hidden_markov", lambda *a: None)
        expected = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def contextual(seed: int, own: tuple[int, ...], batch: tuple[int, ...] = (3,)) -> Case:
    """A hidden Markov model with evidence of its latents for each batch element and some transitions of their own."""
    this = case(topologies.hidden_markov(4, 3, 2), batch=batch, known=0.3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    latents = tuple(f"z{i}" for i in range(4))
    this.prior[latents] = torch.randn(*batch, 4, 2, generator=generator, dtype=torch.float64)
    for i in own:
        table = torch.randn(*(batch if i % 2 else ()), 2, 2, generator=generator, dtype=torch.float64)
        this.prior[f"z{i},z{i + 1}"] = table
    return this


@pytest.mark.parametrize("own", [(), (0,), (2,), (0, 1, 2)])
def test_a_hidden_markov_model_that_depends_on_the_context(own):
    """Also where only some transitions have tables of their own; a sweep is one of the joint's table."""
    this = contextual(1, own)
    for sweeps in (1, 2):
        found = this.law(this.projected(sweeps))
        torch.testing.assert_close(found.exp(), this.fitted(sweeps).exp(), rtol=1e-7, atol=1e-10)
    leaves = [this.prior[k].clone().requires_grad_() for k in this.prior if k != this.sites]
    keys = [k for k in this.prior if k != this.sites]

    def weights(*tables):
        prior = {**dict(zip(keys, tables, strict=True)), this.sites: this.prior[this.sites]}
        return project(compile(this.graph), prior, this.sites, this.log_q, ~this.known)

    assert torch.autograd.gradcheck(weights, leaves, fast_mode=True)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_emissions_of_their_own_for_every_site(order, batch, monkeypatch):
    """Stacked in any order, for each batch element or not: a sweep along the path is one of the joint's table."""
    this, generator = contextual(3, ()), torch.Generator().manual_seed(4)
    key = tuple(f"z{i},x{i}" for i in order)
    this.prior[key] = torch.randn(*batch, 4, 2, 3, generator=generator, dtype=torch.float64)
    del this.prior["emission"]
    monkeypatch.setattr(projection, "_sweeps", lambda *a, **k: pytest.fail("the walk was taken"))
    for sweeps in (1, 2):
        found = this.law(this.projected(sweeps))
        torch.testing.assert_close(found.exp(), this.fitted(sweeps).exp(), rtol=1e-7, atol=1e-10)

    def weights(table):
        return project(compile(this.graph), {**this.prior, key: table}, this.sites, this.log_q, ~this.known)

    assert torch.autograd.gradcheck(weights, this.prior[key].clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_in_the_transitions(size, monkeypatch):
    """Blocks of a mixture of models: the sweep of the joint's table, and its gradients."""
    this = case(topologies.hidden_markov(4, 3, 6), known=0.3)
    block = torch.arange(6) // size
    own = block[:, None] == block
    this.prior["transition"] = this.prior["transition"].masked_fill(~own, -math.inf)
    multiply, used = path_projection.blockwise, list[int]()
    monkeypatch.setattr(path_projection, "BLOCKS", 2)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(path_projection, "blockwise", lambda v, b: used.append(len(b)) or multiply(v, b))
    for sweeps in (1, 2):
        found = this.law(this.projected(sweeps))
        torch.testing.assert_close(found.exp(), this.fitted(sweeps).exp(), rtol=1e-7, atol=1e-10)
    assert set(used) == {6 // size}

    def weights(table):
        prior = {**this.prior, "transition": table.masked_fill(~own, -math.inf)}
        return project(compile(this.graph), prior, this.sites, this.log_q, ~this.known)

    leaf = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weights, leaf, fast_mode=True)


def test_tables_without_such_blocks():
    whole, zero = torch.ones(4, 4), torch.zeros(4, 4)
    uneven = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3))
    odd = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1))
    corner = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert path_projection.diagonal_blocks(corner) is not None
    corner[3, 0] = 1e-30
    for table in (whole, zero, uneven, odd, corner):
        assert path_projection.diagonal_blocks(table) is None


@pytest.mark.parametrize("own", [(), (1,)])
def test_known_tokens_as_rows_of_a_contextual_model(own, monkeypatch):
    """The route for large vocabularies: evidence of latents may differ within the batch, transitions may not."""
    monkeypatch.setattr(kept, "LARGE", 1)
    this, used = contextual(2, own), list[bool]()
    sweep = path_tokens.sweep_tokens
    monkeypatch.setattr(path_tokens, "sweep_tokens", lambda *a: used.append(True) or sweep(*a))
    tokens = this.prior.pop(this.sites).argmax(-1)
    tables = {key: value.clone() for key, value in this.prior.items()}
    found = project(compile(this.graph), tables, this.sites, this.log_q, ~this.known, tokens=tokens)
    clash = this.known[..., None] & (torch.arange(3) != tokens[..., None])
    this.prior[this.sites] = torch.zeros_like(this.log_q).masked_fill(clash, -math.inf)
    torch.testing.assert_close(found, this.projected(1), rtol=1e-8, atol=1e-8)
    assert used == ([] if own else [True])


def large(vocab: int = 8, ruled_out: bool = False, mask: int | None = None) -> tuple[Case, torch.Tensor]:
    """A hidden Markov model of four sites, and its known tokens; one token, the mask, is ruled out everywhere."""
    graph = topologies.hidden_markov(4, vocab, 3)
    this = case(graph, batch=(4,), seed=4, known=0.2, spread=2.0, infinite=0.1 if ruled_out else 0.0)
    if mask is not None:
        this.log_q[..., mask] = -math.inf
        this.log_q = this.log_q.log_softmax(-1)
    return this, this.prior.pop(this.sites).argmax(-1)


@pytest.mark.parametrize("mask", [None, 2, 7])
def test_candidates_have_their_probabilities_and_the_others_theirs_together(mask, monkeypatch):
    monkeypatch.setattr(kept, "LARGE", 1)
    this, tokens = large(mask=mask)
    settings = {"sweeps": 60, "tokens": tokens, "candidates": 4}
    log_w = project(compile(this.graph), this.prior, this.sites, this.log_q, ~this.known, **settings)
    clash = this.known[..., None] & (torch.arange(8) != tokens[..., None])
    this.prior[this.sites] = torch.zeros_like(this.log_q).masked_fill(clash, -math.inf)
    found, exact = this.marginals(this.law(log_w)).exp(), this.log_q.exp()
    top = exact.topk(4).indices
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(-1, top, True)
    masked = ~this.known[..., None]
    assert float(((found - exact).abs() * (chosen & masked)).max()) < 1e-6
    rest = ((found - exact) * ~chosen).sum(-1).abs() * ~this.known
    assert float(rest.max()) < 1e-6
    if mask is not None:
        assert bool((log_w[~this.known][:, mask] == -math.inf).all())
        chosen[..., mask] = True
    spread = torch.where(chosen, math.nan, log_w)
    high, low = spread.nan_to_num(-math.inf).amax(-1), spread.nan_to_num(math.inf).amin(-1)
    assert torch.equal(high[~this.known], low[~this.known]), "one weight for all others"


def test_more_candidates_are_nearer_to_the_full_sweep_and_all_are_it(monkeypatch):
    monkeypatch.setattr(kept, "LARGE", 1)
    this, tokens = large()
    evidence = torch.zeros_like(this.log_q)
    clash = this.known[..., None] & (torch.arange(8) != tokens[..., None])
    plan = compile(this.graph)
    laws = []
    for count in (1, 3, 5, 7, 8, None):
        log_w = project(
            plan, this.prior, this.sites, this.log_q, ~this.known, 2, tokens=tokens, candidates=count
        )
        prior = {**this.prior, this.sites: evidence.masked_fill(clash, -math.inf)}
        laws.append(Case(this.graph, prior, this.log_q, this.known).law(log_w))
    gaps = [float(divergence(laws[-1], law).sum()) for law in laws]
    assert gaps[0] > gaps[1] > gaps[2] > 1e-4 and abs(gaps[3]) < 1e-6 and gaps[4] == 0.0
    torch.testing.assert_close(laws[3], laws[5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
def test_tables_of_candidates_are_gathered_for_as_many_sites_as_there_is_room(start, monkeypatch):
    monkeypatch.setattr(kept, "LARGE", 1)
    this, tokens = large(mask=2)
    this.known[:, 1] = True
    tokens[1:] = 3  # all known there: nothing is gathered
    first = torch.randn_like(this.log_q) if start else None
    found = []
    for room in (1, 4 * 4 * 3 * 2, 1 << 21):
        monkeypatch.setattr(path_candidates, "ROOM", room)
        given = (compile(this.graph), this.prior, this.sites, this.log_q, ~this.known)
        found.append(project(*given, 3, tokens=tokens, candidates=3, start=first))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    assert bool((found[0][:, 1] == 0.0).all())


def test_a_site_more_is_few_operations_more(monkeypatch):
    """On a GPU each is a kernel to start: what can be done for all sites at once isn't done for each."""
    monkeypatch.setattr(kept, "LARGE", 1)
    count = []
    for sites in (6, 16):
        graph = topologies.hidden_markov(sites, 8, 3)
        this = case(graph, batch=(2,))
        tokens = this.prior.pop(this.sites).argmax(-1)

        def sweep(this=this, tokens=tokens) -> None:
            plan = compile(this.graph)
            project(plan, this.prior, this.sites, this.log_q, ~this.known, tokens=tokens, candidates=3)

        sweep()
        count.append(footprint(sweep, torch.device("cpu")).operations)
    assert count[1] - count[0] <= 10 * 14, count


def test_what_the_network_rules_out_stays_so_with_candidates(monkeypatch):
    monkeypatch.setattr(kept, "LARGE", 1)
    this, tokens = large(ruled_out=True)
    given = (compile(this.graph), this.prior, this.sites, this.log_q, ~this.known)
    assert torch.equal(project(*given, tokens=tokens, candidates=3), project(*given, tokens=tokens))
    this, tokens = large(mask=7)
    given = (compile(this.graph), this.prior, this.sites, this.log_q, ~this.known)
    assert torch.equal(project(*given, tokens=tokens, candidates=7), project(*given, tokens=tokens))
    torch.testing.assert_close(
        project(*given, tokens=tokens, candidates=6), project(*given, tokens=tokens), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ConfigError, match="candidates"):
        project(*given, tokens=tokens, candidates=0)
