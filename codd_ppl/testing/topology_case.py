"""A test case that a graph of your own can inherit."""

import math
import random
from typing import ClassVar

import torch

from codd_ppl.compiler import compile as compile_graph
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import (
    condition,
    cross_entropy,
    entropy,
    expectation,
    k_best,
    kl,
    log_partition,
    log_prob,
    log_score,
    marginal,
    marginals,
    mode,
    sample,
)
from codd_ppl.testing.oracles import (
    brute_entropy,
    brute_log_partition,
    brute_log_score,
    brute_marginals,
    brute_mode,
    random_log_potentials,
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
from codd_ppl.typing import Tensor

__all__ = ["TopologyTestCase"]


class TopologyTestCase:
    """The exactness ladder for a graph of your own: inherit, set ``graph``, run pytest.

    Every query of ``codd_ppl.inference`` is compared with enumeration, in float64, on random potentials
    with and without impossible entries. The graph must be small enough to enumerate.
    """

    graph: ClassVar[FactorGraph]
    seed: ClassVar[int] = 0
    batch_shape: ClassVar[tuple[int, ...]] = (2,)
    draws: ClassVar[int] = 4000
    tolerance: ClassVar[float] = 1e-9
    infinite: ClassVar[float] = 0.2

    def _cases(self) -> list[dict[str | tuple[str, ...], Tensor]]:
        shapes = ((), self.batch_shape)
        return [
            random_log_potentials(self.graph, shape, infinite=infinite, evidence=0.5, seed=self.seed + k)
            for k, (shape, infinite) in enumerate((s, i) for s in shapes for i in (0.0, self.infinite))
        ]

    def _close(self, found: Tensor, expected: Tensor, what: str) -> None:
        torch.testing.assert_close(
            found, expected, rtol=self.tolerance, atol=self.tolerance, msg=lambda text: f"{what}: {text}"
        )

    def test_log_partition(self) -> None:
        """``log_partition`` is the log-sum over all joint values."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            self._close(log_partition(plan, tables), brute_log_partition(self.graph, tables), "log_partition")

    def test_marginals(self) -> None:
        """``marginals`` has every variable and every given key, with the enumerated probabilities."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            found, expected = marginals(plan, tables), brute_marginals(self.graph, tables)
            assert set(found) >= set(tables) | set(self.graph.variables)
            for key, table in found.items():
                self._close(table, expected[key], f"marginals[{key!r}]")

    def test_gradient_is_marginals(self) -> None:
        """The gradient of ``log_partition`` is the marginals, finite where an entry is ``-inf``."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
            log_partition(plan, leaves).sum().backward()
            expected = brute_marginals(self.graph, tables)
            for key, leaf in leaves.items():
                assert leaf.grad is not None, f"no gradient for {key!r}"
                self._close(leaf.grad, expected[key], f"gradient of {key!r}")

    def test_gradcheck(self) -> None:
        """First and second derivatives of ``log_partition`` agree with finite differences."""
        plan = compile_graph(self.graph)
        tables = random_log_potentials(self.graph, evidence=0.5, seed=self.seed)
        keys = list(tables)

        def function(*values: Tensor) -> Tensor:
            return log_partition(plan, dict(zip(keys, values, strict=True)))

        leaves = tuple(tables[key].requires_grad_() for key in keys)
        if leaves:
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    def test_mode(self) -> None:
        """``mode`` reaches the largest joint score."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            best, _ = brute_mode(self.graph, tables)
            self._close(brute_log_score(self.graph, tables, mode(plan, tables)), best, "score of the mode")

    def test_sample(self) -> None:
        """``sample`` has the enumerated frequencies (chi-square, p > 1e-4) and repeats with its generator."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            first, second = (
                sample(plan, tables, (self.draws,), generator=torch.Generator().manual_seed(self.seed))
                for _ in range(2)
            )
            assert all(torch.equal(first[name], second[name]) for name in first), "generator is not obeyed"
            p_value = sample_p_value(self.graph, tables, first)
            assert p_value > 1e-4, f"samples don't follow the joint: chi-square p-value {p_value:.2e}"

    def test_entropy(self) -> None:
        """``entropy`` is that of the enumerated distribution."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            self._close(entropy(plan, tables), brute_entropy(self.graph, tables), "entropy")

    def test_log_score(self) -> None:
        """``log_score`` is the entry of the enumerated table, ``-inf`` included."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            shape = brute_log_partition(self.graph, tables).shape
            generator = torch.Generator().manual_seed(self.seed)
            assignment = {
                variable.name: torch.randint(variable.cardinality, shape, generator=generator)
                for variable in self.graph
            }
            expected = brute_log_score(self.graph, tables, assignment)
            self._close(log_score(plan, tables, assignment), expected, "log_score")

    def test_impossible_evidence(self) -> None:
        """Evidence that forbids every value of a variable gives a log_partition of ``-inf``."""
        plan = compile_graph(self.graph)
        tables = random_log_potentials(self.graph, seed=self.seed)
        variable = next(iter(self.graph))
        tables[variable.name] = torch.full((variable.cardinality,), -math.inf, dtype=torch.float64)
        assert log_partition(plan, tables).item() == -math.inf

    def _names(self, count: int) -> list[str]:
        """Some variables, in an order of their own."""
        names = list(self.graph.variables)
        return random.Random(self.seed + count).sample(names, min(count, len(names)))

    def _values(self, names: list[str], shape: torch.Size) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        cards = {variable.name: variable.cardinality for variable in self.graph}
        return {name: torch.randint(cards[name], shape, generator=generator) for name in names}

    def test_marginal(self) -> None:
        """``marginal`` of one to three variables is the enumerated table."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            for names in map(self._names, (1, 2, 3)):
                expected = brute_marginal(self.graph, tables, names)
                self._close(marginal(plan, tables, names), expected, f"marginal of {names}")

    def test_log_prob(self) -> None:
        """``log_prob`` of values of two variables sums the others out."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            shape = brute_log_partition(self.graph, tables).shape
            assignment = self._values(self._names(2), torch.Size((3, *shape)))
            expected = brute_log_prob(self.graph, tables, assignment)
            self._close(log_prob(plan, tables, assignment), expected, "log_prob")

    def test_condition(self) -> None:
        """``condition`` clamps one variable and weighs another one."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            shape = brute_log_partition(self.graph, tables).shape
            observed, weighed = self._names(2)[0], self._names(2)[-1]
            hard = {observed: self._values([observed], shape)[observed]}
            soft = {weighed: torch.linspace(-1, 1, plan.variable[weighed].cardinality, dtype=torch.float64)}
            expected = brute_condition(self.graph, tables, hard, soft).flatten(len(shape)).logsumexp(-1)
            self._close(log_partition(plan, condition(plan, tables, hard, soft)), expected, "condition")

    def test_k_best(self) -> None:
        """``k_best`` has the largest scores, each reached by its own assignment."""
        plan = compile_graph(self.graph)
        for tables in self._cases():
            scores, values = k_best(plan, tables, 5)
            self._close(scores, brute_k_best(self.graph, tables, 5), "scores of k_best")
            found = torch.stack([values[name] for name in self.graph.variables], -1)
            given = {name: value.clamp(min=0).movedim(-1, 0) for name, value in values.items()}
            again = brute_log_score(self.graph, tables, given).movedim(0, -1)
            self._close(torch.where(scores == -math.inf, scores, again), scores, "values of k_best")
            same = (found[..., :, None, :] == found[..., None, :, :]).all(-1) & (scores > -math.inf)[
                ..., None
            ]
            assert bool((same.sum(-1) <= 1).all()), "k_best names an assignment twice"

    def test_divergences(self) -> None:
        """``kl`` and ``cross_entropy`` between two random distributions, +inf included."""
        plan = compile_graph(self.graph)
        cases = self._cases()
        for p, q in [(cases[0], cases[2]), (cases[2], cases[0]), (cases[1], cases[0]), (cases[0], cases[1])]:
            self._close(kl(plan, p, q), brute_kl(self.graph, p, q), "kl")
            expected = brute_cross_entropy(self.graph, p, q)
            self._close(cross_entropy(plan, p, q), expected, "cross_entropy")

    def test_expectation(self) -> None:
        """``expectation`` of a random statistic; of the log-potentials it is log_partition - entropy."""
        plan = compile_graph(self.graph)
        statistics = random_log_potentials(self.graph, evidence=0.5, seed=self.seed + 9)
        for tables in self._cases():
            expected = brute_expectation(self.graph, tables, statistics)
            self._close(expectation(plan, tables, statistics), expected, "expectation")
            average = log_partition(plan, tables) - entropy(plan, tables)
            self._close(expectation(plan, tables, tables), average, "expected log_score")
