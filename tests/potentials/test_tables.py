"""Free tables and their start from counts: what is counted, and the bigram model that comes out."""

import io
import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import ConfigError, GraphError, ShapeError, TokenError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import log_partition, marginals
from codd_ppl.potentials import (
    LatentPotentials,
    Potentials,
    TablePotentials,
    log_unigram,
    pointwise_mutual_information,
)

BLOCKS = torch.tensor([[0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0]])


def test_unigram_by_hand():
    # 0 occurs 6 times, 1 six times, 2 never; one pseudo-count each
    torch.testing.assert_close(log_unigram(BLOCKS, 3).exp(), torch.tensor([7, 7, 1]).double() / 15)
    torch.testing.assert_close(
        log_unigram(BLOCKS, 2, pseudo_count=0.0).exp(), torch.tensor([0.5, 0.5]).double()
    )


def test_pointwise_mutual_information_by_hand():
    unigram = torch.tensor([0.5, 0.5]).double().log()
    pairs = [BLOCKS[:, [0, 1]], BLOCKS[:, [1, 2]]]  # (0,1) 3+1, (1,0) 1+2, (1,1) 0+1, (0,0) never
    found = pointwise_mutual_information(pairs, 2, unigram, pseudo_count=0.0)
    expected = torch.tensor([[0.0, 4 / 8], [3 / 8, 1 / 8]]).double().log() - math.log(0.25)
    torch.testing.assert_close(found, expected)
    found = pointwise_mutual_information(pairs, 2, unigram, pseudo_count=4.0)  # plus four independent draws
    expected = torch.tensor([[1 / 12, 5 / 12], [4 / 12, 2 / 12]]).double().log() - math.log(0.25)
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        pointwise_mutual_information(pairs, 2, unigram), pointwise_mutual_information(pairs, 2, unigram, 2.0)
    )  # the default: as many as there are tokens


def test_triples_by_hand():
    unigram = torch.tensor([0.5, 0.5]).double().log()
    found = pointwise_mutual_information([BLOCKS], 2, unigram, pseudo_count=8.0)
    counts = torch.ones(2, 2, 2).double()  # eight independent draws: one each
    for row in BLOCKS:
        counts[tuple(row)] += 1
    torch.testing.assert_close(found, (counts / 12).log() - math.log(1 / 8))


def test_a_corpus_of_independent_tokens_gives_no_coupling():
    tokens = testing.enumerate_sequences(3, 2)  # every pair once
    found = pointwise_mutual_information([tokens], 3, log_unigram(tokens, 3))
    torch.testing.assert_close(found, torch.zeros(3, 3).double(), atol=1e-12, rtol=0)


def markov_text(blocks: int, sites: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stationary Markov text over four tokens: the blocks, p(x), p(y | x)."""
    generator = torch.Generator().manual_seed(seed)
    step = (1.5 * torch.randn(4, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    start = torch.linalg.matrix_power(step, 200)[0]
    columns = [torch.multinomial(start, blocks, replacement=True, generator=generator)]
    for _ in range(sites - 1):
        columns.append(torch.multinomial(step[columns[-1]], 1, generator=generator)[:, 0])
    return torch.stack(columns, -1), start, step


@pytest.mark.parametrize("tie", ["edge", None])
def test_a_chain_from_counts_is_the_bigram_model(tie):
    """Tables and unigram evidence of Markov text: every conditional p(x_{i+1} | x_i) is the text's own."""
    blocks, start, step = markov_text(20_000, 4)
    graph = topologies.chain(4, 4, tie=tie)
    potentials = TablePotentials(graph)
    assert torch.equal(potentials.evidence(), torch.zeros(4))
    found = potentials.init_from_corpus(blocks)
    evidence = potentials.evidence().expand(4, 4)
    tables = {**potentials(), graph.tokens: evidence}
    assert log_partition(compile(graph), tables).abs() < 0.02, "a stationary chain is normalised already"
    law = marginals(compile(graph), tables)
    torch.testing.assert_close(law["x0"].double(), start, atol=0.01, rtol=0)
    for i in range(3):
        pair = testing.brute_marginals(graph, tables)[f"x{i},x{i + 1}"]
        conditional = pair / pair.sum(-1, keepdim=True)
        torch.testing.assert_close(
            conditional, step, atol=0.02 if tie else 0.04, rtol=0
        )  # untied: a third of the counts
    information = float((start[:, None] * step * (step / start).log()).sum())
    assert found == pytest.approx(dict.fromkeys(found, information), abs=0.02)
    assert set(found) == ({"edge"} if tie else {"x0,x1", "x1,x2", "x2,x3"})


def test_a_tree_from_counts_is_the_chow_liu_model():
    """Untied tables of a tree reproduce the pair frequencies along its edges (positions alike)."""
    blocks = testing.enumerate_sequences(2, 3)
    odd = blocks[blocks[:, 0] == blocks[:, 2]].repeat(500, 1)  # x0 = x2, x1 free
    graph = topologies.tree([None, 0, 0], 2)
    potentials = TablePotentials(graph)
    potentials.init_from_corpus(odd)
    tables = {**potentials(), graph.tokens: potentials.evidence().expand(3, 2)}
    law = testing.brute_marginals(graph, tables)
    torch.testing.assert_close(law["x0,x1"], torch.full((2, 2), 0.25).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(law["x0,x2"], torch.eye(2).double() / 2, atol=1e-3, rtol=0)


def test_nothing_in_the_tables_is_impossible():
    potentials = TablePotentials(topologies.chain(3, 50))
    potentials.init_from_corpus(BLOCKS)
    assert all(bool(t.isfinite().all()) for t in potentials().values())
    assert bool(potentials.evidence().isfinite().all())


def test_token_factors_start_without_coupling_and_latent_ones_at_random():
    graph = topologies.chain(3, 4)
    graph.add_variable("z0", 2, latent=True)
    graph.add_factor(("z0", "x1"))
    first, again, other = (TablePotentials(graph, seed=s) for s in (0, 0, 1))
    assert torch.equal(first()["edge"], torch.zeros(4, 4))
    assert bool((first()["z0,x1"] != 0).all())
    assert torch.equal(first()["z0,x1"], again()["z0,x1"])
    assert not torch.equal(first()["z0,x1"], other()["z0,x1"])
    found = first.init_from_corpus(torch.randint(4, (20, 3)))
    assert set(found) == {"edge"}, "tables over latents keep their start"
    assert torch.equal(first()["z0,x1"], again()["z0,x1"])


def test_unary_factors_keep_their_zeros():
    graph = topologies.independent(3, 2)
    graph.add_factor(("x0",), name="prior")
    potentials = TablePotentials(graph)
    assert potentials.init_from_corpus(BLOCKS) == {}
    assert torch.equal(potentials()["prior"], torch.zeros(2))
    assert not torch.equal(potentials.evidence(), torch.zeros(2))


def test_an_independent_graph_has_nothing_to_learn():
    potentials = TablePotentials(topologies.independent(3, 2))
    assert potentials() == {} and potentials.evidence() is None
    assert sum(p.numel() for p in potentials.parameters()) == 0


def test_columns_are_the_tokens_in_reading_order():
    graph = FactorGraph()
    for token in ("x1", "x0"):
        graph.add_variable(token, 2)
    graph.add_factor(("x0", "x1"))
    blocks = torch.tensor([[0, 1]]).repeat(1000, 1)
    potentials = TablePotentials(graph)
    potentials.init_from_corpus(blocks)
    table = potentials()["x0,x1"]
    assert table.argmax() == 1, "the pair (0, 1), not (1, 0)"


@pytest.mark.parametrize("module", [TablePotentials, LatentPotentials])
def test_state_dict_round_trip(module):
    graph = topologies.latent_tree(3, 2, 2, tie=False)
    here, there = module(graph, seed=0), module(graph, seed=1)
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.add_(torch.randn(parameter.shape))
    if module is TablePotentials:
        here.unigram.copy_(torch.tensor([0.1, -0.2]))
    file = io.BytesIO()
    torch.save(here.state_dict(), file)
    file.seek(0)
    there.load_state_dict(torch.load(file, weights_only=True))
    assert here().keys() == there().keys()
    assert all(torch.equal(here()[key], there()[key]) for key in here())
    if module is TablePotentials:
        assert torch.equal(there.evidence(), here.evidence())


@pytest.mark.parametrize("module", [TablePotentials, LatentPotentials])
def test_the_protocol(module):
    potentials = module(topologies.hidden_markov(3, 4, 2))
    assert isinstance(potentials, Potentials)
    assert {key: tuple(t.shape) for key, t in potentials().items()} == {
        "initial": (2,), "emission": (2, 4), "transition": (2, 2),
    }  # fmt: skip
    assert all(t.requires_grad for t in potentials().values())


@pytest.mark.parametrize(
    ("blocks", "error", "said"),
    [
        (torch.zeros(5, 4, dtype=torch.int64), ShapeError, "blocks of 3 sites.*found 4"),
        (torch.zeros(0, 3, dtype=torch.int64), ShapeError, "at least one block.*empty"),
        (torch.zeros(3, dtype=torch.int64), ShapeError, r"\(n, 3\), found torch.int64 \(3,\)"),
        (torch.zeros(5, 3), ShapeError, "found torch.float32"),
        (torch.zeros(5, 3, dtype=torch.bool), ShapeError, "found torch.bool"),
        (torch.full((5, 3), 2), TokenError, "from 0 to 1 in the blocks, found 2"),
        (torch.full((5, 3), -1), TokenError, "found -1"),
    ],
)
def test_blocks_that_do_not_fit(blocks, error, said):
    for potentials in (
        TablePotentials(topologies.chain(3, 2)),
        LatentPotentials(topologies.hidden_markov(3, 2, 2)),
    ):
        before = {key: t.clone() for key, t in potentials.state_dict().items()}
        with pytest.raises(error, match=said):
            potentials.init_from_corpus(blocks, progress=False)
        assert all(torch.equal(before[key], t) for key, t in potentials.state_dict().items())


def test_counts_cannot_start_latents():
    graph = FactorGraph()
    graph.add_variable("x0", 2)
    graph.add_variable("z0", 2, latent=True)
    graph.add_variable("z1", 2, latent=True)
    graph.add_factor(("z0", "x0"))
    graph.add_factor(("z1", "x0"))  # two parents
    with pytest.raises(GraphError, match=r"z0,x0.*directed forest.*CoDDModule"):
        TablePotentials(graph).init_from_corpus(torch.zeros(4, 1, dtype=torch.int64))


def test_a_table_that_is_too_large():
    with pytest.raises(ConfigError, match=r"50000 x 50000 = 2,500,000,000 entries.*hidden_markov"):
        TablePotentials(topologies.chain(2, 50_000))


def test_without_smoothing_what_never_occurs_is_impossible():
    potentials = TablePotentials(topologies.chain(2, 3))
    blocks = torch.tensor([[0, 1], [1, 2], [2, 0]])
    found = potentials.init_from_corpus(blocks, pseudo_count=0.0)
    table = potentials()["edge"].detach()
    assert torch.equal(table.isfinite(), torch.eye(3, dtype=torch.bool).roll(1, dims=1))
    assert found["edge"] == pytest.approx(math.log(3))
    with pytest.raises(ConfigError, match="pseudo_count >= 0"):
        potentials.init_from_corpus(blocks, pseudo_count=-1.0)


def test_given_tables_are_copied_all_or_none():
    """A running parity of three bits: hand-made tables over latents, which counts can't start."""
    graph = FactorGraph()
    for i in range(3):
        graph.add_variable(f"x{i}", 2)
        graph.add_variable(f"z{i}", 2, latent=True)
    graph.add_factor(("z0", "x0"), name="first")
    for i in (1, 2):
        graph.add_factor((f"z{i - 1}", f"z{i}", f"x{i}"), tie="running")
    graph.add_factor(("z2",), name="even")
    z, y, x = torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij")
    tables = {
        "first": torch.eye(2).log(),
        "running": (y == z ^ x).float().log(),
        "even": torch.tensor([0.0, -math.inf]),
    }
    potentials = TablePotentials(graph)
    before = {name: table.clone() for name, table in potentials().items()}
    for wrong in ({**tables, "even": torch.zeros(3)}, {name: tables[name] for name in ("first", "running")}):
        with pytest.raises(ShapeError, match="expected a table 'even' of shape"):
            potentials.start_from(wrong)
    assert all(torch.equal(table, before[name]) for name, table in potentials().items())
    potentials.start_from(tables)
    assert all(torch.equal(table, tables[name]) for name, table in potentials().items())
    assert potentials.evidence().tolist() == [0.0, 0.0]
    assert log_partition(compile(graph), potentials()).item() == pytest.approx(math.log(4))


def test_a_start_from_its_own_tables_turned_and_swapped():
    potentials = TablePotentials(topologies.skip_chain(5, 3), seed=0)
    for parameter in potentials.parameters():
        torch.nn.init.normal_(parameter)
    tables = potentials()
    expected = {"skip1": tables["skip2"].detach().T.clone(), "skip2": tables["skip1"].detach().T.clone()}
    potentials.start_from({"skip1": tables["skip2"].T, "skip2": tables["skip1"].T})
    for key, table in expected.items():
        assert potentials()[key].equal(table)
