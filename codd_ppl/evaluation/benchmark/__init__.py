"""The benchmark of the inference engine: other libraries and straightforward torch code on the same problems."""

from codd_ppl.evaluation.benchmark.run import PARTS, BenchmarkSettings, benchmark_inference

__all__ = ["PARTS", "BenchmarkSettings", "benchmark_inference"]
