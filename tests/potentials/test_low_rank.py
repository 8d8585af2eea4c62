"""Low-rank edges: equal to tables where they can be, EM that never worsens, starts from text, folders, large V."""

import math
from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, FactorGraph, compile, topologies
from codd_ppl.errors import ConfigError, GraphError, ShapeError, TokenError
from codd_ppl.graphs import properties
from codd_ppl.graphs.rank import low_rank_edges
from codd_ppl.inference import log_partition
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.potentials import (
    LowRankPotentials,
    TablePotentials,
    aspect_model,
    log_unigram,
    pointwise_mutual_information,
)
from codd_ppl.potentials.statistics import pair_counts
from codd_ppl.testing import TopologyTestCase


class TestLowRankTree(TopologyTestCase):
    graph = topologies.low_rank(topologies.tree([None, 0, 0, 1], 3, tie="edge"), 2)


def text(n: int = 400, sites: int = 5, vocab: int = 9) -> torch.Tensor:
    """Tokens in three classes that follow each other: pairs of rank 3."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (n, 1), generator=generator)
    moves = (torch.rand(n, sites - 1, generator=generator) < 0.9).long()
    classes = torch.cat((classes, classes + moves.cumsum(-1)), -1) % 3
    return 3 * classes + torch.randint(0, vocab // 3, (n, sites), generator=generator)


def test_the_graph() -> None:
    graph = topologies.low_rank(topologies.chain(3, 5), 2)
    assert graph.tokens == ("x0", "x1", "x2") and graph.latents == ("z0", "z1")
    assert [f.scope for f in graph.factors.values()] == [
        ("x0", "z0"),
        ("z0", "x1"),
        ("x1", "z1"),
        ("z1", "x2"),
    ]
    assert graph.ties == {"edge.left": ("x0,z0", "x1,z1"), "edge.right": ("z0,x1", "z1,x2")}
    assert properties.is_directed_forest(graph) and graph.shape("x0,z0") == (5, 2)
    edges = low_rank_edges(graph)
    assert edges is not None and [(e.left, e.latent, e.right) for e in edges] == [
        ("x0", "z0", "x1"),
        ("x1", "z1", "x2"),
    ]
    assert topologies.low_rank(topologies.chain(3, 5, tie=None), 2).ties == {}
    for other in (topologies.chain(3, 5), topologies.hidden_markov(3, 5, 2), topologies.independent(2, 5)):
        assert low_rank_edges(other) is None


def test_other_factors_and_latents_stay() -> None:
    graph = topologies.hidden_markov(3, 4, 2)
    graph.add_factor(("x0", "x2"))
    ranked = topologies.low_rank(graph, 3)
    assert ranked.latents == ("z0", "z1", "z2", "z3") and ranked.variables["z3"].cardinality == 3
    assert set(graph.factors) - {"x0,x2"} | {"x0,z3", "z3,x2"} == set(ranked.factors)
    for bad in (0, 1.5, True):
        with pytest.raises(GraphError, match="rank must be an integer"):
            topologies.low_rank(graph, bad)
    with pytest.raises(GraphError, match="found none"):
        topologies.low_rank(topologies.hidden_markov(3, 4, 2), 2)


def pair_of_couplings(rank: int, combine: str, seed: int = 0) -> tuple[CouplingLayer, CouplingLayer]:
    """A table coupling and a low-rank one that holds the same tables (of full rank, or exactly of ``rank``)."""
    vocab, tree = 4, topologies.tree([None, 0, 0, 1], 4, tie="edge")
    graph = topologies.low_rank(tree, rank)
    tables, ranked = TablePotentials(tree), LowRankPotentials(graph)
    generator = torch.Generator().manual_seed(seed)
    unigram = torch.randn(vocab, generator=generator).log_softmax(-1)
    if rank == vocab:
        a = torch.eye(vocab).log()
        b = torch.randn(vocab, vocab, generator=generator)
    else:
        a = torch.randn(vocab, rank, generator=generator)
        b = torch.randn(rank, vocab, generator=generator)
    with torch.no_grad():
        ranked.tables[ranked._keys["edge.left"]].copy_(a)
        ranked.tables[ranked._keys["edge.right"]].copy_(b)
        tables.tables["table0"].copy_((a[:, :, None] + b).logsumexp(1))
        for potentials in (tables, ranked):
            potentials.unigram.copy_(unigram)
    return (
        CouplingLayer(tree, vocab, combine=combine, potentials=tables, sweeps=8),
        CouplingLayer(graph, vocab, combine=combine, potentials=ranked, sweeps=8),
    )


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_equals_the_table(rank: int, combine: str) -> None:
    table, ranked = (coupling.double() for coupling in pair_of_couplings(rank, combine))
    logits = torch.randn(3, 4, 4, dtype=torch.float64)
    tokens = torch.randint(0, 4, (3, 4))
    known = torch.tensor([[False] * 4, [True, False, False, True], [False, True, False, False]])
    first, second = (coupling(logits, tokens=tokens, known=known) for coupling in (table, ranked))
    x0 = torch.where(known, tokens, torch.randint(0, 4, (3, 4)))
    torch.testing.assert_close(first.log_prob(x0), second.log_prob(x0), rtol=1e-6, atol=1e-6)
    some = torch.tensor([[True, False, True, False]]).expand(3, 4)
    torch.testing.assert_close(first.log_prob(x0, some), second.log_prob(x0, some), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.marginals, second.marginals, rtol=1e-6, atol=1e-6)
    if combine == "projected":
        marginals = second.marginals[~known]
        torch.testing.assert_close(marginals, logits.softmax(-1)[~known], rtol=1e-3, atol=1e-3)
    drawn = second.sample((50,))
    assert drawn.shape == (50, 3, 4) and torch.equal(drawn[:, known], tokens[known].expand(50, -1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_em_never_worsens(rank: int, seed: int) -> None:
    blocks = text()
    cells, counts = pair_counts(blocks[:, :2], 9)
    unigram = log_unigram(blocks, 9)
    model = aspect_model(cells, counts, unigram, rank, seed=seed, tolerance=0.0)
    falls = torch.tensor(model.divergence).diff()
    assert bool((falls < 1e-12).all()) and model.divergence[-1] < model.divergence[0]
    for part in (model.weight, model.left, model.right):
        assert torch.allclose(part.sum(-1), torch.ones((), dtype=torch.float64)) and bool((part >= 0).all())
    assert model.weight[0] >= 9 / (400 + 9) - 1e-12
    joint = torch.einsum("r,rx,ry->xy", model.weight, model.left, model.right)
    share = counts / counts.sum()
    kl = (share * (share / joint[tuple(cells.T)]).log()).sum()
    assert model.divergence[-1] == pytest.approx(float(kl), abs=1e-12)


def test_more_rank_fits_better_and_rank_one_is_independence() -> None:
    blocks = text(4000)
    cells, counts = pair_counts(blocks[:, :2], 9)
    unigram = log_unigram(blocks, 9)
    finals = [aspect_model(cells, counts, unigram, rank).divergence[-1] for rank in (1, 2, 3, 4)]
    assert finals == sorted(finals, reverse=True) and finals[3] < 0.02 < 0.5 < finals[0]
    alone = aspect_model(cells, counts, unigram, 1)
    assert torch.equal(alone.left, unigram.softmax(-1)[None]) and alone.weight.tolist() == [1.0]
    with pytest.raises(ConfigError, match="rank >= 1"):
        aspect_model(cells, counts, unigram, 0)


@pytest.mark.parametrize("tie", ["edge", None])
def test_started_from_text(tie: str | None) -> None:
    """A rank that suffices comes close to the table of counts, in the prior it makes."""
    blocks = text(4000)
    tree = topologies.chain(5, 9, tie=tie)
    potentials = LowRankPotentials(topologies.low_rank(tree, 5))
    found = potentials.init_from_corpus(blocks)
    assert set(found) == ({"edge.left"} if tie else {f"x{i},z{i}" for i in range(4)})
    tables = {name: table.detach() for name, table in potentials().items()}
    left, right = ("edge.left", "edge.right") if tie else ("x0,z0", "z0,x1")
    psi = (tables[left][:, :, None] + tables[right]).logsumexp(1)
    groups = [blocks[:, i : i + 2] for i in range(4 if tie else 1)]
    unigram = log_unigram(blocks, 9)
    expected = pointwise_mutual_information(groups, 9, unigram)
    joint = (expected + unigram[:, None] + unigram).exp()
    difference = (joint * (expected - psi.double())).sum()
    assert abs(float(difference)) < 0.02 and all(bool(t.isfinite().all()) for t in tables.values())
    evidence = {("x0", "x1", "x2", "x3", "x4"): potentials.evidence().expand(5, -1)}
    total = log_partition(compile(potentials.graph), {**tables, **evidence})
    assert float(total) == pytest.approx(0, abs=0.05)


def test_a_coupling_started_from_text_beats_independent_tokens() -> None:
    blocks, held = text(2000), text(2300)[2000:]
    graph = topologies.low_rank(topologies.chain(5, 9), 4)
    logits = log_unigram(blocks, 9).float().expand(len(held), 5, 9)
    alone = logits.gather(-1, held[..., None]).sum((1, 2)).mean()
    for combine in ("projected", "product"):
        potentials = LowRankPotentials(graph)
        coupling = CouplingLayer(graph, 9, combine=combine, potentials=potentials)
        coupling.init_from_corpus(blocks, progress=False)
        tokens, known = torch.zeros_like(held), torch.zeros_like(held, dtype=torch.bool)
        dist = coupling(logits, tokens=tokens, known=known)
        assert dist.log_prob(held).mean() > alone + 1.0
    dist.log_prob(held).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in potentials.parameters())


def test_a_model_folder_keeps_it(tmp_path: Path) -> None:
    graph = topologies.low_rank(topologies.chow_liu(4, 7, {1: 0.1, 2: 0.3}), 3)
    coupling = CouplingLayer(graph, 7, potentials=LowRankPotentials(graph))
    coupling.init_from_corpus(torch.randint(0, 7, (50, 4)))
    denoiser = BidirectionalTransformer(7, 16, 1, 2).eval()
    saved = load_model(save_model(tmp_path / "model", denoiser, coupling))
    assert saved.coupling.graph == graph and isinstance(saved.coupling.potentials, LowRankPotentials)
    for key, value in coupling.state_dict().items():
        assert torch.equal(value, saved.coupling.state_dict()[key])


def test_a_vocabulary_of_a_sub_word_tokenizer() -> None:
    """No table of vocabulary squared is made: 32,000 tokens, counts, projection, draws."""
    vocab = 32_000
    ranks = (torch.arange(vocab) + 10.0).reciprocal()
    blocks = torch.multinomial(ranks, 4000, replacement=True).reshape(-1, 4)
    blocks[:, 1::2] = (blocks[:, ::2] + 1) % vocab
    graph = topologies.low_rank(topologies.chain(4, vocab), 8)
    coupling = CouplingLayer(graph, vocab, potentials=LowRankPotentials(graph))
    (model,) = coupling.init_from_corpus(blocks, iterations=3).values()
    assert model.divergence[-1] < model.divergence[0] < math.inf
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        dist = coupling(
            torch.randn(1, 4, vocab), tokens=tokens, known=torch.tensor([[True, False, False, False]])
        )
        assert dist.sample().shape == (1, 4) and bool(dist.log_prob(tokens).isfinite().all())


def test_errors() -> None:
    graph = topologies.low_rank(topologies.chain(4, 5), 2)
    with pytest.raises(GraphError, match=r"topologies\.low_rank"):
        LowRankPotentials(topologies.chain(4, 5))
    both: FactorGraph = topologies.low_rank(topologies.chain(4, 5), 2)
    both.add_factor(("x0",))
    with pytest.raises(GraphError, match=r"topologies\.low_rank"):
        LowRankPotentials(both)
    potentials = LowRankPotentials(graph)
    for bad, error in (
        (torch.zeros(3, 3, dtype=torch.int64), ShapeError),
        (torch.full((3, 4), 5), TokenError),
    ):
        with pytest.raises(error):
            potentials.init_from_corpus(bad)
    with pytest.raises(ConfigError, match="pseudo_count"):
        potentials.init_from_corpus(torch.zeros(3, 4, dtype=torch.int64), pseudo_count=-1.0)
