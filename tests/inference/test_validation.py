"""Log-potentials and assignments that don't fit: each error says which key, what was expected and what was found."""

import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import CoddError, GraphError, PotentialsError, ShapeError
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample

QUERIES = {
    "log_partition": log_partition,
    "marginals": marginals,
    "mode": mode,
    "sample": sample,
    "entropy": entropy,
    "log_score": lambda plan, tables: log_score(
        plan, tables, {name: torch.tensor(0) for name in ("x0", "x1", "x2", "z0", "z1", "z2")}
    ),
}


@pytest.fixture(params=QUERIES)
def query(request):
    return QUERIES[request.param]


GRAPH = topologies.hidden_markov(3, 5, 2)


def tables(**changes):
    result = testing.random_log_potentials(GRAPH)
    result.update(changes)
    return {key: value for key, value in result.items() if value is not None}


def test_wrong_shape_names_key_expected_and_found(query):
    with pytest.raises(PotentialsError, match=r"emission.*2, 5.*5, 2"):
        query(compile(GRAPH), tables(emission=torch.zeros(5, 2)))


def test_too_few_dimensions(query):
    with pytest.raises(PotentialsError, match="transition"):
        query(compile(GRAPH), tables(transition=torch.zeros(2)))


def test_wrong_evidence_shape(query):
    with pytest.raises(PotentialsError, match=r"x1.*5.*4"):
        query(compile(GRAPH), tables(x1=torch.zeros(3, 4)))


def test_wrong_stacked_shape(query):
    with pytest.raises(PotentialsError, match=r"x0.*x1.*2, 5"):
        query(compile(GRAPH), {**tables(), ("x0", "x1"): torch.zeros(3, 5)})


def test_stacked_variables_of_different_cardinality(query):
    with pytest.raises(PotentialsError, match=r"x0.*z0"):
        query(compile(GRAPH), {**tables(), ("x0", "z0"): torch.zeros(2, 5)})


def test_nan_names_the_key(query):
    bad = torch.zeros(2, 5)
    bad[0, 0] = math.nan
    with pytest.raises(PotentialsError, match=r"(?i)emission.*nan"):
        query(compile(GRAPH), tables(emission=bad))


def test_plus_infinity_names_the_key(query):
    bad = torch.zeros(2, 2)
    bad[0, 0] = math.inf
    with pytest.raises(PotentialsError, match=r"transition.*inf"):
        query(compile(GRAPH), tables(transition=bad))


def test_nan_in_evidence_and_in_stacked_evidence(query):
    with pytest.raises(PotentialsError, match=r"(?i)x2.*nan"):
        query(compile(GRAPH), tables(x2=torch.full((5,), math.nan)))
    with pytest.raises(PotentialsError, match=r"(?i)x0.*nan"):
        query(compile(GRAPH), {**tables(), ("x0", "x1"): torch.full((2, 5), math.nan)})


def test_unknown_key_is_named(query):
    with pytest.raises(PotentialsError, match="emision"):
        query(compile(GRAPH), tables(emision=torch.zeros(2, 5)))


def test_unknown_variable_in_a_stack_is_named(query):
    with pytest.raises(PotentialsError, match="x9"):
        query(compile(GRAPH), {**tables(), ("x0", "x9"): torch.zeros(2, 5)})


def test_missing_factor_is_named(query):
    with pytest.raises(PotentialsError, match="emission"):
        query(compile(GRAPH), tables(emission=None))
    with pytest.raises(PotentialsError, match="initial"):
        query(compile(GRAPH), tables(initial=None))


def test_missing_factor_without_a_tie():
    graph = topologies.chain(3, 2, tie=None)
    with pytest.raises(PotentialsError, match="x1,x2"):
        log_partition(compile(graph), {"x0,x1": torch.zeros(2, 2)})


def test_batches_that_do_not_broadcast(query):
    with pytest.raises(PotentialsError, match=r"batch"):
        query(compile(GRAPH), tables(emission=torch.zeros(3, 2, 5), transition=torch.zeros(2, 2, 2)))


@pytest.mark.parametrize("bad", [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool)])
def test_tables_must_be_floating_point(query, bad):
    with pytest.raises(PotentialsError, match="emission"):
        query(compile(GRAPH), tables(emission=bad))


def test_tables_must_be_tensors(query):
    with pytest.raises(PotentialsError, match="initial"):
        query(compile(GRAPH), tables(initial=[0.0, 0.0]))


def test_tables_must_be_tensors_on_the_scan():
    with pytest.raises(PotentialsError, match="edge"):
        log_partition(compile(topologies.chain(3, 2), "chain scan"), {"edge": [[0.0, 0.0], [0.0, 0.0]]})


def test_errors_are_value_errors():
    assert issubclass(PotentialsError, ValueError)


# -- assignments -----------------------------------------------------------------------------------


def values(**changes):
    result = {name: torch.tensor(0) for name in GRAPH.variables}
    result.update(changes)
    return {key: value for key, value in result.items() if value is not None}


def test_score_needs_every_variable():
    with pytest.raises((CoddError, ValueError), match="x1"):
        log_score(compile(GRAPH), tables(), values(x1=None))


@pytest.mark.parametrize("bad", [-1, 5])
def test_score_refuses_values_out_of_range(bad):
    with pytest.raises((CoddError, ValueError), match=r"x1"):
        log_score(compile(GRAPH), tables(), values(x1=torch.tensor(bad)))


def test_score_refuses_floats():
    with pytest.raises((CoddError, ValueError), match=r"x1"):
        log_score(compile(GRAPH), tables(), values(x1=torch.tensor(0.0)))


def test_a_graph_where_a_plan_belongs(query):
    with pytest.raises(GraphError, match=r"expected a plan, found FactorGraph.*compile"):
        query(GRAPH, tables())


def test_a_tensor_where_a_dictionary_belongs(query):
    with pytest.raises(PotentialsError, match=r"expected log-potentials as a dictionary.*found Tensor"):
        query(compile(GRAPH), torch.zeros(3, 5))


@pytest.mark.parametrize("graph", [GRAPH, topologies.grid(2, 2, 2)])
@pytest.mark.parametrize("shape", [5, (-1,)])
def test_a_sample_shape_that_is_none(graph, shape):
    with pytest.raises(ShapeError, match="sample_shape: expected sizes of 0 or more"):
        sample(compile(graph), testing.random_log_potentials(graph), shape)


@pytest.mark.parametrize(
    "value", [0, torch.tensor(0.0), torch.tensor(True), torch.tensor(5), torch.tensor(-1)]
)
def test_values_that_are_none(value):
    assignment = dict.fromkeys(GRAPH.variables, torch.tensor(0)) | {"x1": value}
    with pytest.raises(ShapeError, match=r"assignment\['x1'\]: expected"):
        log_score(compile(GRAPH), tables(), assignment)
