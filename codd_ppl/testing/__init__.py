"""Brute-force oracles, random factor graphs, and a test case that a graph of your own can inherit.

class TestMyGraph(TopologyTestCase):
    graph = topologies.star(4, cardinality=3)
"""

from codd_ppl.testing.exact_marginals import ExactMarginals
from codd_ppl.testing.joints import (
    chow_liu_joint,
    forest_joint,
    joint_table,
    kl_divergence,
    mutual_information_matrix,
    product_of_marginals,
)
from codd_ppl.testing.oracles import (
    MAX_JOINT,
    brute_entropy,
    brute_log_partition,
    brute_log_score,
    brute_marginals,
    brute_mode,
    chi_square_p_value,
    enumerate_log_joint,
    enumerate_sequences,
    joint_counts,
    random_forest,
    random_log_potentials,
    random_loopy_graph,
    sample_p_value,
)
from codd_ppl.testing.query_oracles import (
    brute_condition,
    brute_cross_entropy,
    brute_expectation,
    brute_k_best,
    brute_kl,
    brute_log_prob,
    brute_marginal,
)
from codd_ppl.testing.topology_case import TopologyTestCase

__all__ = [
    "ExactMarginals",
    "MAX_JOINT",
    "TopologyTestCase",
    "brute_condition",
    "brute_cross_entropy",
    "brute_entropy",
    "brute_expectation",
    "brute_k_best",
    "brute_kl",
    "brute_log_partition",
    "brute_log_prob",
    "brute_log_score",
    "brute_marginal",
    "brute_marginals",
    "brute_mode",
    "chi_square_p_value",
    "chow_liu_joint",
    "enumerate_log_joint",
    "enumerate_sequences",
    "forest_joint",
    "joint_counts",
    "joint_table",
    "kl_divergence",
    "mutual_information_matrix",
    "product_of_marginals",
    "random_forest",
    "random_log_potentials",
    "random_loopy_graph",
    "sample_p_value",
]
