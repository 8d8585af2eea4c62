"""What does not fit a CoupledCategorical meets a named error that says what was expected and found."""

import math

import pytest
import torch

from codd_ppl.compiler import compile
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import InfeasibleError, PotentialsError, ShapeError, TokenError
from codd_ppl.graphs import FactorGraph, topologies

PLAN = compile(topologies.chain(3, 4))
TABLES = {"edge": torch.zeros(4, 4)}


def make(batch=(2,), **settings) -> CoupledCategorical:
    return CoupledCategorical(PLAN, TABLES, torch.zeros(*batch, 3, 4), **settings)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (2, 4, 3), (4,)])
def test_evidence_of_another_shape(shape):
    with pytest.raises(ShapeError, match=r"\(\*batch, 3, 4\).*found \("):
        CoupledCategorical(PLAN, TABLES, torch.zeros(shape))


def test_tokens_and_known_come_together():
    for lonely in (
        {"tokens": torch.zeros(2, 3, dtype=torch.int64)},
        {"known": torch.zeros(2, 3, dtype=torch.bool)},
    ):
        with pytest.raises(ShapeError, match="tokens and known together"):
            make(**lonely)


def test_known_tokens_out_of_range():
    known = torch.tensor([True, False, False])
    for bad in (-1, 4):
        tokens = torch.full((2, 3), bad)
        with pytest.raises(TokenError, match=f"from 0 to 3, found {bad}"):
            make(tokens=tokens, known=known)
    assert make(tokens=torch.tensor([1, 9, -7]), known=known).tokens.tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2, 3)])
def test_known_and_tokens_of_another_shape(shape):
    right = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"known as bool \(2, 3\).*found torch\.bool"):
        make(tokens=right.long(), known=torch.zeros(shape, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"tokens as int64 \(2, 3\).*found torch\.int64"):
        make(tokens=torch.zeros(shape, dtype=torch.int64), known=right.bool())
    with pytest.raises(ShapeError, match=r"known as bool.*found torch\.int64"):
        make(tokens=right.long(), known=right.long())


def test_tokens_of_different_cardinality():
    graph = FactorGraph()
    graph.add_variable("x0", 2)
    graph.add_variable("x1", 3)
    with pytest.raises(ShapeError, match=r"same cardinality, found \[2, 3\]"):
        CoupledCategorical(compile(graph), {}, torch.zeros(2, 3))


@pytest.mark.parametrize("batch", [(2,), (3, 2), (1, 5)])
def test_potentials_of_a_batch_that_the_evidence_lacks(batch):
    """Else log_partition would have another shape than batch_shape says."""
    with pytest.raises(ShapeError, match=r"log_potentials\['edge'\].*broadcasts to \(5,\).*found"):
        CoupledCategorical(PLAN, {"edge": torch.zeros(*batch, 4, 4)}, torch.zeros(5, 3, 4))


def test_potentials_of_part_of_the_batch_broadcast():
    dist = CoupledCategorical(PLAN, {"edge": torch.randn(5, 1, 4, 4)}, torch.zeros(5, 2, 3, 4))
    assert dist.log_partition.shape == (5, 2)
    wide = CoupledCategorical(PLAN, {"edge": torch.randn(1, 4, 4)}, torch.zeros(1, 3, 4)).expand((6,))
    assert wide.log_prob(torch.zeros(3, dtype=torch.int64)).shape == (6,)


def test_malformed_potentials():
    for tables, said in (
        ({}, "edge"),
        ({"egde": torch.zeros(4, 4)}, "egde"),
        ({"edge": torch.zeros(3, 4)}, "edge"),
    ):
        with pytest.raises(PotentialsError, match=said):
            CoupledCategorical(PLAN, tables, torch.zeros(3, 4)).log_partition  # noqa: B018
    with pytest.raises(PotentialsError, match="NaN"):
        CoupledCategorical(PLAN, TABLES, torch.full((3, 4), math.nan)).log_partition  # noqa: B018


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)])
def test_values_that_are_no_token_ids(bad):
    with pytest.raises(ShapeError, match=r"token ids \(int64\), found torch\.(float32|bool)"):
        make().log_prob(bad)


def test_sites_that_are_no_mask():
    with pytest.raises(ShapeError, match="bool mask"):
        make().log_prob(torch.zeros(2, 3, dtype=torch.int64), sites=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (2, 1), ()])
def test_values_of_another_shape(shape):
    with pytest.raises(ShapeError, match=r"\(\*sample, 2, 3\), found \("):
        make().log_prob(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1, 4])
def test_values_out_of_range(bad):
    value = torch.tensor([[0, 1, 2], [0, bad, 2]])
    with pytest.raises(TokenError, match=f"from 0 to 3, found {bad}"):
        make().log_prob(value)
    with pytest.raises(TokenError, match=f"found {bad}"):
        make().condition(value)
    assert make().log_prob(value, sites=torch.tensor([True, False, True])).isfinite().all()


def test_impossible_evidence_is_an_error_and_no_nan():
    """The two known tokens exclude each other: a ratio of partition functions would be 0 / 0."""
    edge = torch.zeros(4, 4)
    edge[1, 2] = -math.inf
    tokens, known = torch.tensor([[0, 0, 0], [1, 2, 0]]), torch.tensor([True, True, False])
    dist = CoupledCategorical(PLAN, {"edge": edge}, torch.zeros(2, 3, 4), tokens, known.expand(2, 3))
    assert dist.log_partition.tolist() == [pytest.approx(math.log(4)), -math.inf]
    for query in (
        lambda: dist.log_prob(tokens),
        lambda: dist.sample(),
        lambda: dist.mode,
        lambda: dist.marginals,
        lambda: dist.entropy(),
    ):
        with pytest.raises(InfeasibleError, match=r"batch element \(1,\).*x0"):
            query()
    free = CoupledCategorical(PLAN, {"edge": edge}, torch.zeros(2, 3, 4))
    impossible = free.condition(tokens, known.expand(2, 3))
    assert impossible.log_partition[1] == -math.inf  # the chance of the impossible is 0: no error here
    assert free.log_prob(tokens, sites=known)[1] == -math.inf


def test_a_site_without_possible_tokens():
    dist = CoupledCategorical(compile(topologies.independent(2, 2)), {}, torch.full((2, 2), -math.inf))
    with pytest.raises(InfeasibleError, match="x0"):
        dist.log_prob(torch.zeros(2, dtype=torch.int64))


def test_inputs_are_left_alone():
    tokens, known = torch.tensor([[0, 7, 9], [1, 2, -5]]), torch.tensor([[True, False, False]] * 2)
    evidence = torch.randn(2, 3, 4)
    before = evidence.clone(), tokens.clone()
    dist = CoupledCategorical(PLAN, TABLES, evidence, tokens, known)
    dist.condition(dist.sample()).log_prob(dist.mode)
    assert torch.equal(evidence, before[0]) and torch.equal(tokens, before[1])


def test_batch_zero():
    dist = CoupledCategorical(PLAN, TABLES, torch.zeros(0, 3, 4))
    assert dist.log_prob(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
    assert dist.sample((2,)).shape == (2, 0, 3)
    assert dist.mode.shape == (0, 3) and dist.marginals.shape == (0, 3, 4) and dist.entropy().shape == (0,)
    assert repr(dist) == "CoupledCategorical(batch_shape=(0,), sites=3, vocab_size=4, known=0 of 0)"
