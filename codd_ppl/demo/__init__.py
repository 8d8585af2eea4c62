"""The main job on an embedded text: a small network, a coupling, and what the coupling gains."""

from codd_ppl.demo.compare import DemoResult
from codd_ppl.demo.run import run_demo
from codd_ppl.demo.settings import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
