"""Plans: what can be compiled, what they promise (frozen, equal, hashable, printable), what they explain."""

import copy
import dataclasses
import pickle

import networkx as nx
import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import ContractionPlan, compile
from codd_ppl.errors import CyclicGraphError, GraphError, IntractableError, TreewidthError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.inference import log_partition

GRAPHS = {
    "independent": topologies.independent(4, 3),
    "chain": topologies.chain(5, 3),
    "star": topologies.star(4, 3),
    "hidden_markov": topologies.hidden_markov(4, 5, 2),
    "latent_tree": topologies.latent_tree(6, 3, 2),
    "caterpillar": topologies.caterpillar(3, 1, 2),
    "forest": topologies.tree([None, 0, 0, None, 3], 2),
}


@pytest.fixture(params=GRAPHS)
def graph(request) -> FactorGraph:
    return GRAPHS[request.param]


def test_compile_gives_a_plan(graph):
    assert isinstance(compile(graph), ContractionPlan)


def test_equal_graphs_give_equal_plans_with_equal_hashes(graph):
    one = compile(graph)
    two = compile(FactorGraph.from_networkx(graph.to_networkx()))
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1


def test_different_graphs_give_different_plans():
    plans = {compile(graph) for graph in GRAPHS.values()}
    others = [topologies.chain(5, 4), topologies.chain(6, 3), topologies.chain(5, 3, tie=None)]
    plans |= {compile(graph) for graph in others}
    assert len(plans) == len(GRAPHS) + 3


def test_plans_are_frozen(graph):
    plan = compile(graph)
    field = dataclasses.fields(plan)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plan, field, None)
    with pytest.raises((AttributeError, TypeError)):
        plan.something_new = 1


def test_plans_can_be_copied_and_pickled(graph):
    plan = compile(graph)
    _ = hash(plan), plan.explain(), plan.variable, plan.factor  # a plan in use keeps what it has computed
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert "_hash" not in vars(copy.deepcopy(plan)), "strings have another hash in another process"


def test_plans_hold_no_tensor(graph):
    plan = compile(graph)

    def walk(item):
        assert not isinstance(item, torch.Tensor)
        if dataclasses.is_dataclass(item):
            for field in dataclasses.fields(item):
                walk(getattr(item, field.name))
        elif isinstance(item, dict):
            for pair in item.items():
                walk(pair)
        elif isinstance(item, (tuple, list, frozenset)):
            for child in item:
                walk(child)

    walk(plan)


def test_a_plan_does_not_follow_later_changes_of_the_graph():
    graph = topologies.chain(3, 2)
    plan = compile(graph)
    before = hash(plan)
    graph.add_variable("x3", 2)
    graph.add_factor(("x2", "x3"), tie="edge")
    assert hash(plan) == before
    assert plan != compile(graph)
    assert plan == compile(topologies.chain(3, 2))
    table = torch.zeros(2, 2, dtype=torch.float64)
    torch.testing.assert_close(log_partition(plan, {"edge": table}).exp().item(), 8.0)


def test_compiling_leaves_the_graph_alone(graph):
    before = FactorGraph.from_networkx(graph.to_networkx())
    compile(graph)
    assert graph == before


def test_explain_says_root_order_cost(graph):
    text = compile(graph).explain()
    lowered = text.lower()
    assert all(word in lowered for word in ("root", "order", "flop", "byte")), text
    assert any(name in text for name in graph.variables)


def test_explain_names_the_route_and_why(graph):
    plan = compile(graph)
    assert plan.route in plan.explain()
    assert plan.reason and plan.reason in plan.explain()
    assert (plan.route == "independent") == (not graph.factors)


def test_explain_counts_a_batch():
    plan = compile(topologies.chain(5, 3))
    assert f"{plan.flops * 7:,} FLOPs" in plan.explain(batch=7)


def test_roots_are_one_variable_per_component():
    assert len(compile(topologies.chain(5, 3)).roots) == 1
    assert set(compile(topologies.tree([None, 0, None, 2, None], 2)).roots) & {"x4"} == {"x4"}
    assert set(compile(topologies.independent(3, 2)).roots) == {"x0", "x1", "x2"}


@pytest.mark.parametrize("seed", range(30))
def test_every_message_is_sent_once_and_after_those_it_needs(seed):
    graph = testing.random_forest(seed)
    plan, sent, received = compile(graph), set(), set(compile(graph).roots)
    for step in plan.steps:
        for message in step.messages:
            assert set(graph.factors[message.factor].scope) == {message.parent, *message.children}
            assert message.parent not in sent
            assert graph.shape(message.factor) == step.shape
            assert graph.factors[message.factor].scope[step.parent_axis] == message.parent
        for message in step.messages:
            sent.update(message.children)
    received |= sent
    assert received == set(graph.variables)
    factors = [message.factor for step in plan.steps for message in step.messages]
    assert sorted(factors) == sorted(f.name for f in graph.factors.values() if f.order > 1)


@pytest.mark.parametrize(
    "graph",
    [
        topologies.hidden_markov(3, 4, 2),
        topologies.independent(3, 2),
        topologies.star(4, 2),
        topologies.chain(1, 3),
    ],
)
def test_chain_scan_wants_a_chain(graph):
    with pytest.raises(GraphError, match="chain scan"):
        compile(graph, route="chain scan")


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="fastest"):
        compile(topologies.chain(3, 2), route="fastest")


def test_explain_of_a_long_chain_stays_readable():
    text = compile(topologies.hidden_markov(500, 27, 16)).explain()
    assert "paths: steps 2-500, each one loop" in text
    assert len(text.splitlines()) < 100
    assert len(text) < 10_000


def test_plans_print(graph):
    plan = compile(graph)
    assert str(plan) and repr(plan)
    assert len(repr(plan)) < 2_000


def test_cost_grows_with_the_states():
    assert compile(topologies.chain(5, 3)).explain() != compile(topologies.chain(5, 30)).explain()


# -- loops -----------------------------------------------------------------------------------------


def ring(n: int, cardinality: int = 2) -> FactorGraph:
    return FactorGraph.from_networkx(nx.cycle_graph(n), cardinality=cardinality)


@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_ring_that_is_too_large_is_refused_and_named(n):
    with pytest.raises(TreewidthError) as error:
        compile(ring(n, 2000))
    for i in range(n):
        assert f"x{i}" in str(error.value)
    assert isinstance(error.value, CyclicGraphError)
    assert isinstance(error.value, IntractableError)
    assert isinstance(error.value, GraphError)
    assert isinstance(error.value, ValueError)


def test_only_the_loop_is_named_not_its_tail():
    graph = ring(3, 2000)
    graph.add_variable("tail", 2)
    graph.add_factor(("x0", "tail"))
    with pytest.raises(CyclicGraphError) as error:
        compile(graph)
    assert all(name in str(error.value) for name in ("x0", "x1", "x2"))
    assert "tail" not in str(error.value)


def test_the_message_gives_the_size_and_says_what_to_do():
    with pytest.raises(TreewidthError) as error:
        compile(ring(4, 10), memory_limit=3999)
    text = str(error.value)
    assert "10 x 10 x 10 = 1,000 entries = 4,000 bytes per batch element in float32" in text
    assert "memory_limit = 3,999" in text
    for remedy in ("fewer states", "another topology", "approximate=LoopyBeliefPropagation()"):
        assert remedy in text
    assert compile(ring(4, 10), memory_limit=4000).junction.largest.entries == 1000


def test_the_memory_limit_leaves_forests_alone():
    assert compile(topologies.chain(3, 100), memory_limit=1).route == "tree sweep"


@pytest.mark.parametrize(
    "graph",
    [ring(3), topologies.grid(3, 3, 2), topologies.tree([1, 2, 0], 2), topologies.skip_chain(8, 3)],
    ids=["ring", "grid", "parents", "skip chain"],
)
def test_loops_compile_to_cliques(graph):
    plan = compile(graph)
    assert plan.route == "clique contraction"
    assert plan == compile(graph) and hash(plan) == hash(compile(graph))
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.steps == ()
    assert "clique contraction" in repr(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.junction = None


def test_two_factors_over_one_pair_are_a_loop():
    graph = topologies.chain(2, 3)
    graph.add_factor(("x1", "x0"), name="again")
    plan = compile(graph)
    assert plan.route == "clique contraction"
    assert [c.factors for c in plan.junction.cliques] == [("x0,x1", "again")]


def test_routes_that_need_a_forest_name_the_loop():
    for route in ("tree sweep", "chain scan"):
        with pytest.raises(GraphError, match=f"{route}.*x0, x1, x2"):
            compile(ring(3), route=route)


def test_the_empty_graph():
    """No variable, no factor: either refused by name or one empty joint value of weight 1."""
    try:
        plan = compile(FactorGraph())
    except GraphError as error:
        assert "variable" in str(error)
    else:
        assert log_partition(plan, {}).item() == 0.0


def test_compile_wants_a_factor_graph():
    with pytest.raises((GraphError, TypeError), match="FactorGraph"):
        compile(nx.path_graph(3))


@pytest.mark.parametrize("seed", range(40))
def test_every_random_forest_compiles(seed):
    graph = testing.random_forest(seed)
    plan = compile(graph)
    assert hash(plan) == hash(compile(graph))
    assert plan.explain()
