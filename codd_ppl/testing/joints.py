"""Joints small enough to write down: tables of probabilities with one axis per token, and what they depend on.

All results are float64 and in nats; divide by ``math.log(2)`` for bits. Entropies, total correlations and bounds of
such tables are in :mod:`codd_ppl.diffusion`.
"""

import math

import torch

from codd_ppl.diffusion.closed_forms import product_of_marginals, subset_entropies, total_correlation
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.graphs import FactorGraph, properties, topologies
from codd_ppl.testing.oracles import enumerate_sequences
from codd_ppl.typing import Float, Tensor

__all__ = [
    "chow_liu_joint",
    "forest_joint",
    "joint_table",
    "kl_divergence",
    "mutual_information_matrix",
    "product_of_marginals",
]


def joint_table(dist: CoupledCategorical) -> Float[Tensor, "..."]:
    """The joint of all tokens of one distribution as a table, latents summed out, by `log_prob` of each sequence.

    Entry [x_0, x_1, ..] is p(x_0, x_1, ..); where tokens are known, sequences that disagree have probability 0.

    Args:
        dist: of batch shape () or (1,).

    Raises:
        ShapeError: a distribution of several batch entries.
        IntractableError: more than ``MAX_JOINT`` sequences.
    """
    if math.prod(dist.batch_shape) != 1:
        raise ShapeError(
            f"expected the distribution of one sequence, found batch shape {tuple(dist.batch_shape)}; index one row"
        )
    sites, vocab = len(dist.sites), dist.vocab_size
    sequences = enumerate_sequences(vocab, sites)
    log_probs = dist.log_prob(sequences.reshape(-1, *dist.batch_shape, sites))
    return log_probs.detach().double().exp().reshape((vocab,) * sites)


def kl_divergence(p: Float[Tensor, "..."], q: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """KL(p || q) = sum p log(p / q) of two tables; infinite where q is 0 and p is not.

    Raises:
        ShapeError: tables of different shapes.
    """
    if p.shape != q.shape:
        raise ShapeError(
            f"expected two tables of one shape, found {tuple(p.shape)} and {tuple(q.shape)}; "
            f"give both an axis per token in the same order"
        )
    p, q = p.double(), q.double()
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def mutual_information_matrix(joint: Float[Tensor, "..."]) -> Float[Tensor, "sites sites"]:
    """I(X_i; X_j) of every pair of sites; the diagonal holds the entropies H(X_i)."""
    entropies = subset_entropies(joint)
    bit = 1 << torch.arange(joint.ndim)
    single = entropies[bit]
    return single.unsqueeze(0) + single.unsqueeze(1) - entropies[bit.unsqueeze(0) | bit.unsqueeze(1)]


def chow_liu_joint(joint: Float[Tensor, "..."]) -> tuple[FactorGraph, Float[Tensor, "..."]]:
    """The tree over the tokens that is closest to a joint, and its law (Chow and Liu 1968).

    The law is prod_i P(x_i) prod_{(i, j) in tree} P(x_i, x_j) / (P(x_i) P(x_j)) along the maximum spanning tree of
    the mutual informations. KL(joint || law) = TC(joint) - sum of I(X_i; X_j) over the tree, the least of any tree.

    Raises:
        ConfigError: fewer than 2 sites, sites of different cardinalities, or no table of probabilities.
    """
    if joint.ndim < 2 or len(set(joint.shape)) != 1:
        raise ConfigError(
            f"expected a joint of at least 2 sites with equally many values, found shape {tuple(joint.shape)}"
        )
    total_correlation(joint)  # its check: a table of probabilities
    graph = topologies.chow_liu(
        joint.ndim, joint.shape[0], mutual_information_matrix(joint.double()), tie=False
    )
    return graph, forest_joint(joint, graph)


def forest_joint(joint: Float[Tensor, "..."], graph: FactorGraph) -> Float[Tensor, "..."]:
    """The law closest to a joint among those of a forest over the tokens: it has the least KL(joint || law).

    It is prod_i P(x_i) prod_{(i, j) in forest} P(x_i, x_j) / (P(x_i) P(x_j)), with the joint's own marginals of tokens
    and edges, and KL(joint || law) = TC(joint) - sum of I(X_i; X_j) over the edges.

    Raises:
        ConfigError: latents, loops, factors of other orders than two, or tokens that don't fit the joint's axes.
    """
    cards = tuple(graph.variables[name].cardinality for name in graph.tokens)
    pairwise = all(factor.order == 2 for factor in graph.factors.values())
    if graph.latents or not pairwise or not properties.is_forest(graph) or cards != tuple(joint.shape):
        raise ConfigError(
            f"expected a forest of pairwise factors over tokens with {tuple(joint.shape)} values, found {graph} with "
            f"{cards}; with latents or loops the closest law has no closed form"
        )
    joint, sites = joint.double(), joint.ndim
    law = product_of_marginals(joint)
    for factor in graph.factors.values():
        i, j = (graph.tokens.index(name) for name in factor.scope)
        pair = joint.sum([axis for axis in range(sites) if axis not in (i, j)], keepdim=True)
        apart = pair.sum(i, keepdim=True) * pair.sum(j, keepdim=True)
        law = law * torch.where(apart > 0, pair / apart, 0.0)
    return law
