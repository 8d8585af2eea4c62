"""The factor graph: what it refuses, what it remembers, and the way to networkx and back."""

import networkx as nx
import pytest

from codd_ppl import testing
from codd_ppl.errors import CoddError, GraphError
from codd_ppl.graphs import Factor, FactorGraph, Variable, topologies


def small() -> FactorGraph:
    graph = FactorGraph()
    graph.add_variable("x0", cardinality=27)
    graph.add_variable("z0", cardinality=64, latent=True)
    graph.add_factor(("z0", "x0"), tie="emission")
    return graph


def test_the_example_of_the_design():
    graph = small()
    assert graph.variables == {"x0": Variable("x0", 27), "z0": Variable("z0", 64, latent=True)}
    assert graph.factors == {"z0,x0": Factor("z0,x0", ("z0", "x0"), "emission")}
    assert (graph.tokens, graph.latents) == (("x0",), ("z0",))
    assert graph.ties == {"emission": ("z0,x0",)}
    assert graph.shape("z0,x0") == (64, 27)
    assert [variable.name for variable in graph] == ["x0", "z0"]
    assert len(graph) == 2


def test_repr_counts():
    assert repr(small()) == "FactorGraph(2 variables (1 latent), 1 factor, 1 tie)"
    assert repr(FactorGraph()) == "FactorGraph(0 variables (0 latent), 0 factors, 0 ties)"


def test_scope_may_be_a_list_and_its_order_is_kept():
    graph = small()
    graph.add_variable("y", 2)
    graph.add_factor(["y", "z0"])
    assert graph.factors["y,z0"].scope == ("y", "z0")
    assert graph.factors["y,z0"].order == 2
    assert graph.shape("y,z0") == (2, 64)


@pytest.mark.parametrize("cardinality", [0, -1, 2.0, "3", None, True])
def test_cardinality_must_be_a_positive_integer(cardinality):
    with pytest.raises(GraphError, match=r"variable 'x0': cardinality must be an integer >= 1, found"):
        FactorGraph().add_variable("x0", cardinality)


@pytest.mark.parametrize("name", ["", "a,b", 3, None])
def test_variable_name_must_be_a_plain_string(name):
    with pytest.raises(GraphError, match="non-empty string without a comma"):
        FactorGraph().add_variable(name, 2)


def test_variable_twice():
    with pytest.raises(GraphError, match="variable 'x0' was added before"):
        small().add_variable("x0", 27)


def test_unknown_variable_in_scope_names_it_and_the_known_ones():
    with pytest.raises(GraphError, match=r"no variable 'x9'.*add_variable.*x0, z0"):
        small().add_factor(("x0", "x9"))


def test_empty_scope():
    with pytest.raises(GraphError, match="at least one variable"):
        small().add_factor(())


def test_scope_as_a_string_is_caught():
    with pytest.raises(GraphError, match=r"found the string 'x0'; write \('x0',\)"):
        small().add_factor("x0")


def test_repeated_variable_in_scope():
    with pytest.raises(GraphError, match="may appear once in a scope"):
        small().add_factor(("x0", "x0"))


def test_factor_twice():
    with pytest.raises(GraphError, match="factor 'z0,x0' was added before"):
        small().add_factor(("z0", "x0"))


def test_second_factor_over_the_same_scope_needs_a_name():
    graph = small()
    graph.add_factor(("z0", "x0"), name="again")
    assert set(graph.factors) == {"z0,x0", "again"}


@pytest.mark.parametrize("name", ["", 3])
def test_factor_name_must_be_a_string(name):
    with pytest.raises(GraphError, match="factor's name must be a non-empty string"):
        small().add_factor(("x0",), name=name)


@pytest.mark.parametrize("tie", ["", 3])
def test_tie_must_be_a_string(tie):
    with pytest.raises(GraphError, match="tie must be a non-empty string"):
        small().add_factor(("x0",), tie=tie)


def test_tie_of_different_shapes_names_both_factors_and_shapes():
    graph = small()
    with pytest.raises(GraphError, match=r"tie 'emission'.*'x0,z0'.*\(27, 64\).*'z0,x0'.*\(64, 27\)"):
        graph.add_factor(("x0", "z0"), tie="emission")


def test_names_of_variables_factors_and_ties_never_collide():
    graph = small()
    graph.add_factor(("x0",), name="prior")
    with pytest.raises(GraphError, match="'x0' is the name of a variable"):
        graph.add_factor(("z0",), name="x0")
    with pytest.raises(GraphError, match="tie 'x0' is the name of a variable"):
        graph.add_factor(("z0",), name="f", tie="x0")
    with pytest.raises(GraphError, match="'prior' is the name of a factor"):
        graph.add_variable("prior", 2)
    with pytest.raises(GraphError, match="tie 'prior' is the name of another factor"):
        graph.add_factor(("z0",), name="f", tie="prior")
    with pytest.raises(GraphError, match="'emission' is a tie"):
        graph.add_factor(("z0",), name="emission")


def test_a_variable_must_not_take_the_name_of_a_tie():
    with pytest.raises(GraphError, match="emission"):
        small().add_variable("emission", 2)


def test_a_failed_call_leaves_the_graph_as_it_was():
    graph = small()
    for call in (
        lambda: graph.add_factor(("x0", "x9")),
        lambda: graph.add_factor(("x0", "z0"), tie="emission"),
        lambda: graph.add_variable("x0", 3),
        lambda: graph.add_variable("x1", 0),
    ):
        with pytest.raises(GraphError):
            call()
    assert graph == small()


def test_errors_are_value_errors_of_the_library():
    assert issubclass(GraphError, ValueError)
    assert issubclass(GraphError, CoddError)


def test_views_are_copies():
    graph = small()
    graph.variables.clear()
    graph.factors.clear()
    assert graph == small()


def test_shape_of_an_unknown_factor():
    with pytest.raises(GraphError, match=r"no factor 'f'.*z0,x0"):
        small().shape("f")


def test_equality_is_by_content_and_order():
    assert small() == small()
    other = small()
    other.add_variable("x1", 2)
    assert small() != other
    assert small() != "graph"
    with pytest.raises(TypeError):
        hash(small())


def test_tokens_are_in_reading_order_whatever_the_declaration_order():
    graph = FactorGraph()
    for index in (10, 2, 0):
        graph.add_variable(f"x{index}", 2)
        graph.add_variable(f"z{index}", 2, latent=True)
    assert graph.tokens == ("x0", "x2", "x10")
    assert graph.latents == ("z10", "z2", "z0")


def test_other_names_keep_the_order_of_declaration():
    graph = FactorGraph()
    for name in ("verb", "noun", "x0"):
        graph.add_variable(name, 2)
    assert graph.tokens == ("verb", "noun", "x0")


# -- networkx --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_round_trip_of_random_forests_is_the_identity(seed):
    graph = testing.random_forest(seed)
    assert FactorGraph.from_networkx(graph.to_networkx()) == graph


@pytest.mark.parametrize(
    "graph",
    [
        FactorGraph(),
        small(),
        topologies.hidden_markov(5, 4, 3),
        topologies.latent_tree(7, 4, 3),
        FactorGraph.from_networkx(nx.cycle_graph(4), cardinality=2),
    ],
    ids=["empty", "small", "hidden_markov", "latent_tree", "loop"],
)
def test_round_trip_is_the_identity(graph):
    again = FactorGraph.from_networkx(graph.to_networkx())
    assert again == graph
    assert list(again.variables) == list(graph.variables)
    assert list(again.factors) == list(graph.factors)


def test_to_networkx_is_bipartite_and_undirected():
    bipartite = topologies.hidden_markov(3, 4, 2).to_networkx()
    assert nx.is_bipartite(bipartite)
    assert not bipartite.is_directed()
    assert bipartite.number_of_nodes() == 6 + 6
    assert set(bipartite[("factor", "z0,x0")]) == {("variable", "z0"), ("variable", "x0")}


@pytest.mark.parametrize(
    "source",
    [nx.balanced_tree(2, 4), nx.path_graph(6), nx.star_graph(5), nx.grid_2d_graph(3, 3), nx.empty_graph(4)],
    ids=["tree", "path", "star", "grid", "edgeless"],
)
def test_nodes_become_tokens_in_order_and_edges_pairwise_factors(source):
    graph = FactorGraph.from_networkx(source, cardinality=27)
    names = {node: f"x{index}" for index, node in enumerate(source.nodes)}
    assert graph.tokens == tuple(names.values())
    assert {variable.cardinality for variable in graph} == {27}
    expected = {frozenset((names[a], names[b])) for a, b in source.edges}
    assert {frozenset(factor.scope) for factor in graph.factors.values()} == expected
    assert len(graph.factors) == source.number_of_edges()


def test_node_and_edge_attributes_override_the_defaults():
    source = nx.Graph()
    source.add_node("a", cardinality=3)
    source.add_node("b", latent=True, cardinality=5)
    source.add_node("c")
    source.add_edge("b", "a", tie="emission")
    source.add_edge("b", "c")
    graph = FactorGraph.from_networkx(source, cardinality=2, tie="edge")
    assert graph.variables == {
        "x0": Variable("x0", 3),
        "z0": Variable("z0", 5, latent=True),
        "x1": Variable("x1", 2),
    }
    assert graph.ties == {"emission": ("x0,z0",), "edge": ("z0,x1",)}


def test_from_networkx_needs_a_cardinality():
    with pytest.raises(GraphError, match="node 0 has no cardinality"):
        FactorGraph.from_networkx(nx.path_graph(2))


@pytest.mark.parametrize("source", [nx.DiGraph([(0, 1)]), nx.MultiGraph([(0, 1), (0, 1)]), [(0, 1)], None])
def test_from_networkx_wants_an_undirected_simple_graph(source):
    with pytest.raises(GraphError, match=r"undirected nx\.Graph"):
        FactorGraph.from_networkx(source, cardinality=2)


def test_from_networkx_refuses_a_self_loop():
    with pytest.raises(GraphError, match="edge to itself"):
        FactorGraph.from_networkx(nx.Graph([(0, 1), (1, 1)]), cardinality=2)


def test_from_networkx_leaves_its_input_alone():
    source = nx.path_graph(3)
    before = nx.Graph(source)
    FactorGraph.from_networkx(source, cardinality=2)
    assert nx.utils.graphs_equal(source, before)
