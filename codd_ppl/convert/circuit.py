"""A hidden Markov model, recognised among the nodes of a circuit.

``pyjuice.structures.HMM`` builds it from the last token to the first. Sum node i of the vector at site t is the state
z_t = i; its children are the products of site t+1, so that its parameters are the row P(z_{t+1} = . | z_t = i), and
product j of that site joins input node j, P(x_{t+1} | z_{t+1} = j), with sum node j of the next vector. The root is one
sum node over the products of site 0: P(z_0 = .). Parameters come in blocks, (edges, block, children's block), an edge
joining block to block; what has no edge is 0. A homogeneous model keeps those of the last site, and the others point to
them. All are probabilities; rows add up to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from codd_ppl.convert.jpc_file import CircuitNodes
from codd_ppl.errors import DataError

__all__ = ["CATEGORICAL", "HiddenMarkovTables", "hidden_markov_tables"]

CATEGORICAL = ("Categorical", "ExternProductCategorical", "SoftEvidenceCategorical")
"""Distributions whose parameters are a table of probabilities; the last two multiply evidence onto it when run."""

ROUNDING = 1e-3
"""So far from 1 may rows of float32 add up."""


@dataclass(frozen=True)
class HiddenMarkovTables:
    """Probabilities of a tied hidden Markov model.

    Attributes:
        initial: P(z_0), (states,).
        transition: P(z' | z), (states, states), rows are z; None: the model has one site.
        emission: P(x | z), (states, vocab).
        sites: length of the circuit.
        distribution: of its input nodes.
    """

    initial: np.ndarray
    transition: np.ndarray | None
    emission: np.ndarray
    sites: int
    distribution: str


def hidden_markov_tables(nodes: Sequence[CircuitNodes]) -> HiddenMarkovTables:
    """The tables of the model that the nodes are.

    Args:
        nodes: of a circuit, the root last.

    Raises:
        DataError: they are another circuit; what was found is said.
    """
    sums, inputs = _chain(nodes)
    scopes = [nodes[i].scope for i in inputs]
    if any(len(scope) != 1 for scope in scopes):
        _refuse(f"input nodes over several variables, {max(scopes, key=len)}")
    order = [scope[0] for scope in scopes]
    if order != list(range(len(order))):
        _refuse(
            f"a chain over the variables {_some(order)}, from the root on, where 0, 1, .. is reading order"
        )
    kinds = sorted({nodes[i].distribution for i in inputs})
    if kinds[0] not in CATEGORICAL or len(kinds) > 1:
        _refuse(f"the input distribution {' and '.join(kinds)}, where {', '.join(CATEGORICAL)} are read")
    (root, *steps), states = sums, nodes[inputs[0]].size
    emission = _shared("emissions", [_emission(nodes, i) for i in _sources(nodes, inputs)])
    transition = _shared("transitions", [_dense(nodes, i, states) for i in _sources(nodes, steps)])
    (initial,) = _dense(nodes, root, states)
    for name, table in (("initial", initial), ("transition", transition), ("emission", emission)):
        _check(name, table)
    assert emission is not None
    return HiddenMarkovTables(initial, transition, emission, len(inputs), kinds[0])


def _chain(nodes: Sequence[CircuitNodes]) -> tuple[list[int], list[int]]:
    """Positions of the sums, the root first, and of the input nodes, site by site."""
    if nodes[-1].kind != "Sum" or nodes[-1].size != 1:
        _refuse(
            f"a root of {nodes[-1].size} {nodes[-1].kind.lower()} node(s), where one sum node is expected"
        )
    sums, inputs = [len(nodes) - 1], list[int]()
    while True:
        top = nodes[sums[-1]]
        if top.external:
            _refuse("sum nodes whose parameters are changed from outside (external_params)")
        if len(top.children) != 1:
            _refuse(f"sum nodes over {len(top.children)} vectors of products at site {len(inputs)}")
        product = nodes[_before(top.children[0], sums[-1])]
        below = [_before(child, top.children[0]) for child in product.children]
        leaves = [child for child in below if nodes[child].kind == "Input"]
        others = [child for child in below if nodes[child].kind == "Sum"]
        if product.kind != "Product" or len(leaves) != 1 or len(others) > 1 or len(below) > 2:
            _refuse(
                f"{product.kind.lower()} nodes over {len(leaves)} vectors of input and {len(others)} of sum nodes at "
                f"site {len(inputs)}, where one token and one next state are expected"
            )
        if any(nodes[child].size != product.size for child in below) or not _straight(product):
            _refuse(f"product nodes that join other states than their own at site {len(inputs)}")
        inputs.append(leaves[0])
        if not others:
            return sums, inputs
        sums.append(others[0])


def _before(child: int, parent: int) -> int:
    """The child, which the file lists before its parent."""
    if not 0 <= child < parent:
        _refuse(f"node {parent} with the child {child}, where children come first")
    return child


def _straight(product: CircuitNodes) -> bool:
    """Whether product j has child j of every vector."""
    rows = product.edges
    if rows is None or rows.ndim != 2 or len(rows) not in (product.blocks, product.size):
        return False
    return bool((rows == np.arange(len(rows))[:, None]).all())


def _sources(nodes: Sequence[CircuitNodes], users: Sequence[int]) -> list[int]:
    """Whose parameters they use, each once."""
    found = []
    for user in users:
        own, source = nodes[user], nodes[user].source
        at = user if source is None else source
        if not 0 <= at < len(nodes) or not _alike(own, nodes[at]):
            _refuse(f"node {user} tied to node {source}, which has other sizes or edges")
        found.append(at)
    return list(dict.fromkeys(found))


def _alike(one: CircuitNodes, other: CircuitNodes) -> bool:
    """Whether they can have the same parameters."""
    sizes = [(n.kind, n.blocks, n.block_size, n.categories, n.edges is None) for n in (one, other)]
    return sizes[0] == sizes[1] and (one.edges is None or np.array_equal(one.edges, np.asarray(other.edges)))


def _parameters(node: CircuitNodes) -> np.ndarray:
    if node.parameters is None:
        _refuse(f"{node.kind.lower()} nodes without parameters; init_parameters() or training sets them")
    return node.parameters


def _emission(nodes: Sequence[CircuitNodes], position: int) -> np.ndarray:
    """(states, vocab)."""
    node = nodes[position]
    values = _parameters(node)
    if values.size != node.size * node.categories:
        _refuse(f"{values.size} parameters of {node.size} input nodes with {node.categories} categories")
    return values.reshape(node.size, node.categories)


def _dense(nodes: Sequence[CircuitNodes], position: int, states: int) -> np.ndarray:
    """(nodes, states), from blocks."""
    node = nodes[position]
    values, edges, child = _parameters(node), node.edges, nodes[node.children[0]]
    edge_count = -1 if edges is None else edges.shape[-1]
    shape = (edge_count, node.block_size, child.block_size)
    inside = edges is not None and edges.shape == (2, edge_count) and edges.min() >= 0
    if not inside or child.size != states or values.shape != shape:
        _refuse(
            f"parameters of shape {values.shape} for {edge_count} edges from {node.size} to {child.size} nodes"
        )
    assert edges is not None
    if edges[0].max() >= node.blocks or edges[1].max() >= child.blocks:
        _refuse("edges to blocks that aren't there")
    grid = np.zeros((node.blocks, child.blocks, node.block_size, child.block_size), values.dtype)
    grid[edges[0], edges[1]] = values
    return grid.transpose(0, 2, 1, 3).reshape(node.size, states)


def _shared(name: str, tables: Sequence[np.ndarray]) -> np.ndarray | None:
    """The one that all sites use; tables that aren't tied may be equal."""
    if any(not np.array_equal(table, tables[0]) for table in tables[1:]):
        _refuse(f"different tables of {name} at different sites (homogeneous=False)")
    return tables[0] if tables else None


def _check(name: str, table: np.ndarray | None) -> None:
    """Whether rows are probabilities."""
    if table is None:
        return
    totals = table.sum(-1, dtype=np.float64)
    if not (table >= 0).all() or not (abs(totals - 1) <= ROUNDING).all():
        _refuse(
            f"rows of the {name} table with values from {table.min():g} on that add up to {totals.min():g} .. "
            f"{totals.max():g}, where probabilities are expected"
        )


def _some(order: Sequence[int]) -> str:
    return ", ".join(map(str, order[:4])) + (", .." if len(order) > 4 else "")


def _refuse(found: str) -> NoReturn:
    raise DataError(
        f"expected a tied hidden Markov model, as pyjuice.structures.HMM builds it (homogeneous=True), found {found}"
    )
