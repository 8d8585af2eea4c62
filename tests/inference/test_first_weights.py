"""Projections that start from given weights: the same fixed point, on every route, and sooner."""

import math
from dataclasses import dataclass

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import PotentialsError, ShapeError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import kept, marginals, native, path_tokens, projection
from codd_ppl.inference.first_weights import first_weights
from codd_ppl.inference.projection import project

GRAPHS = {
    "chain": topologies.chain(4, 3, tie=None),
    "forest": topologies.tree([None, 0, 0, None, 3], 3),
    "star": topologies.star(4, 3),
    "star latent": topologies.star(4, 3, states=3),
    "hidden_markov": topologies.hidden_markov(4, 3, 3),
    "latent_tree": topologies.latent_tree(4, 3, 2),
    "grid": topologies.grid(2, 2, 3),
    "skip chain": topologies.skip_chain(4, 3),
}


@dataclass
class Case:
    """A prior with what is known clamped, and the marginals that the masked sites shall have."""

    graph: FactorGraph
    prior: dict
    log_q: torch.Tensor
    known: torch.Tensor

    @property
    def sites(self):
        return self.graph.tokens

    def projected(self, sweeps=1, **settings):
        return project(
            compile(self.graph), self.prior, self.sites, self.log_q, ~self.known, sweeps, **settings
        )

    def error(self, log_w):
        tables = {**self.prior, self.sites: self.prior[self.sites] + log_w}
        found = marginals(compile(self.graph), tables)[self.sites]
        return float(((found - self.log_q.exp()).abs() * ~self.known[..., None]).max())


def case(graph, batch=(3,), seed=0, known=0.0, infinite=0.0, dtype=torch.float64):
    """Random tables and targets; some sites known, some values ruled out."""
    generator = torch.Generator().manual_seed(seed)
    prior = testing.random_log_potentials(graph, dtype=dtype, seed=seed)
    shape = (*batch, len(graph.tokens), graph.variables["x0"].cardinality)
    is_known = torch.rand(shape[:-1], generator=generator) < known
    tokens = torch.randint(shape[-1], shape[:-1], generator=generator)
    clash = is_known[..., None] & (torch.arange(shape[-1]) != tokens[..., None])
    prior[graph.tokens] = torch.zeros(shape, dtype=dtype).masked_fill(clash, -math.inf)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    ruled_out = torch.rand(shape, generator=generator) < infinite
    ruled_out[..., 0] = False
    return Case(graph, prior, logits.masked_fill(ruled_out, -math.inf).log_softmax(-1), is_known)


def large(ruled_out):
    """A hidden Markov model of four sites and eight values without evidence, and its known tokens."""
    this = case(topologies.hidden_markov(4, 8, 3), (4,), 4, known=0.2, infinite=0.2 * (ruled_out is True))
    if ruled_out == "mask":
        this.log_q[..., 5] = -math.inf
        this.log_q = this.log_q.log_softmax(-1)
    return this, this.prior.pop(this.sites).argmax(-1)


def gap(a, b):
    """Largest difference of two log-weights; both must rule out the same."""
    assert torch.equal(a == -math.inf, b == -math.inf)
    return float(torch.where(a == -math.inf, 0.0, a - b).abs().max())


def route(name, monkeypatch):
    """Which of the routes along a hidden Markov model may be taken; what it is called on the way."""
    if name == "python loop":
        monkeypatch.setattr(native, "usable", lambda *a: False)
    if name == "walk":
        monkeypatch.setattr(projection, "hidden_markov", lambda *a: None)


CASES = [(name, "any") for name in GRAPHS]
CASES += [("hidden_markov", "python loop"), ("hidden_markov", "walk")]


@pytest.mark.parametrize("infinite", [0.0, 0.3])
@pytest.mark.parametrize(("name", "by"), CASES)
@pytest.mark.slow
@pytest.mark.ci
def test_every_start_leads_to_the_one_fixed_point_and_that_stays(name, by, infinite, monkeypatch):
    route(by, monkeypatch)
    this = case(GRAPHS[name], batch=(3,), known=0.3, infinite=infinite, seed=3)
    fixed = this.projected(400)
    again = this.projected(1, start=fixed)
    assert gap(again, fixed) < 1e-9
    torch.manual_seed(0)
    anywhere = 2 * torch.randn_like(fixed)
    anywhere[:, :2] = -math.inf
    found = this.projected(400, start=anywhere)
    assert gap(found, fixed) < 1e-6
    assert this.error(found) < 1e-7


@pytest.mark.parametrize(("name", "by"), CASES)
def test_a_near_start_leaves_a_smaller_residual(name, by, monkeypatch):
    route(by, monkeypatch)
    this = case(GRAPHS[name], batch=(3,), known=0.2, seed=5)
    fixed = this.projected(60)
    torch.manual_seed(1)
    near = fixed + 1e-3 * torch.randn_like(fixed)
    warm, cold = gap(this.projected(1, start=near), fixed), gap(this.projected(1), fixed)
    assert warm < 2e-2 * cold or cold < 1e-9, "one sweep is exact on some graphs"


@pytest.mark.parametrize("name", ["star latent", "hidden_markov", "latent_tree"])
def test_a_sweep_goes_on_where_the_last_one_ended(name):
    this = case(GRAPHS[name], known=0.3, seed=6)
    later = this.projected(2, start=this.projected(1))
    torch.testing.assert_close(later, this.projected(3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GRAPHS)
def test_with_a_start_the_first_sweep_may_be_the_last(name):
    this = case(GRAPHS[name], seed=9)
    fixed = this.projected(60)
    assert torch.equal(this.projected(30, tolerance=1e-6, start=fixed), this.projected(1, start=fixed))
    far = this.projected(30, tolerance=1e-6, start=torch.randn_like(fixed))
    assert this.error(far) < 1e-5


@pytest.mark.parametrize("candidates", [None, 3, 8])
@pytest.mark.parametrize("ruled_out", [False, True, "mask"])
def test_known_tokens_as_rows(candidates, ruled_out, monkeypatch):
    """The route for large vocabularies, with its candidates."""
    monkeypatch.setattr(kept, "LARGE", 1)
    used, sweep = list[bool](), path_tokens.sweep_tokens
    monkeypatch.setattr(path_tokens, "sweep_tokens", lambda *a: used.append(True) or sweep(*a))
    this, tokens = large(ruled_out=ruled_out)
    given = (compile(this.graph), this.prior, this.sites, this.log_q, ~this.known)
    settings = {"tokens": tokens, "candidates": candidates}
    fixed = project(*given, 80, **settings)
    again = project(*given, 1, **settings, start=fixed)
    assert gap(again, fixed) < 1e-9
    cold = gap(project(*given, 1, **settings), fixed)
    noise = 1e-3 * torch.randn(fixed.shape, generator=torch.Generator().manual_seed(0), dtype=fixed.dtype)
    assert gap(project(*given, 1, **settings, start=fixed + noise), fixed) < 2e-2 * cold
    assert torch.equal(project(*given, 9, 1e-6, **settings, start=fixed), again)
    assert len(used) == 5


def test_the_routes_along_a_hidden_markov_model_agree(monkeypatch):
    this = case(topologies.hidden_markov(6, 4, 3), batch=(3,), known=0.3, infinite=0.2, seed=7)
    start = torch.randn(this.log_q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start[0, 1] = -math.inf
    found = []
    for by in ("any", "python loop", "walk"):
        with monkeypatch.context() as patch:
            route(by, patch)
            if by != "walk":
                patch.setattr(projection, "_sweeps", lambda *a, **k: pytest.fail("the walk was taken"))
            found.append(this.projected(1, start=start))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_a_start_is_read_at_masked_sites_only_and_left_alone():
    this = case(GRAPHS["hidden_markov"], known=0.4, seed=8)
    start = torch.randn_like(this.log_q)
    spoilt = torch.where(this.known[..., None], math.nan, start)
    before = spoilt.clone()
    assert torch.equal(this.projected(1, start=spoilt), this.projected(1, start=start))
    torch.testing.assert_close(spoilt, before, equal_nan=True, rtol=0, atol=0)
    zero = torch.zeros_like(start)
    torch.testing.assert_close(this.projected(1, start=zero), this.projected(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hidden_markov", "forest", "grid"])
def test_gradients_through_the_start(name):
    this = case(GRAPHS[name], batch=(1,), known=0.3, seed=0)
    plan = compile(this.graph)
    start = torch.randn_like(this.log_q).requires_grad_()

    def function(start):
        return project(plan, this.prior, this.sites, this.log_q, ~this.known, start=start)

    assert torch.autograd.gradcheck(function, (start,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hidden_markov", "chain", "grid"])
def test_a_start_far_outside_linear_space(name, dtype):
    """Log-weights of deviation 200: the route that is fast must notice, and log space take over."""
    this = case(GRAPHS[name], known=0.2, seed=2, dtype=dtype)
    start = 200 * torch.randn(this.log_q.shape, generator=torch.Generator().manual_seed(3))
    found = this.projected(40, start=start.to(dtype))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, this.projected(40), rtol=1e-3, atol=1e-3)


def test_batches_of_any_shape_and_none():
    for batch in ((), (0,), (2, 3)):
        this = case(GRAPHS["hidden_markov"], batch=batch, known=0.3, seed=3)
        fixed = this.projected(60)
        found = this.projected(1, start=fixed)
        assert found.shape == this.log_q.shape and gap(found, fixed) < 1e-9 if fixed.numel() else True


def test_errors():
    this = case(GRAPHS["chain"])
    with pytest.raises(ShapeError, match="as the targets"):
        this.projected(start=this.log_q[0])
    for bad in (math.nan, math.inf):
        with pytest.raises(PotentialsError, match="leave start out"):
            this.projected(start=torch.full_like(this.log_q, bad))


def test_what_is_ruled_out_now_and_what_was_before():
    target = torch.tensor([[-math.inf, 0.0], [-0.7, -0.7]])
    start = torch.tensor([[1.0, 2.0], [-math.inf, 3.0]])
    found = first_weights(start, target, torch.tensor([True, True]))
    assert found.tolist() == [[-math.inf, 2.0], [0.0, 3.0]]
    assert first_weights(start, target, torch.tensor([False, True])).tolist() == [[0.0, 0.0], [0.0, 3.0]]
