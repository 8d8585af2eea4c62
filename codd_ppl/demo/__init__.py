"""The main job on an embedded text: a small network, a coupling, and what the coupling gains."""

from codd_ppl.demo.compare import DemoResult
from codd_ppl.demo.run import DemoSettings, run_demo

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
