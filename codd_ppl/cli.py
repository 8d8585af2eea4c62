"""The command line: ``codd explain`` prints how a ready-made topology is contracted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="codd", description="Coupled discrete diffusion.")
    commands = parser.add_subparsers(required=True)
    explain = commands.add_parser("explain", help="print the contraction plan of a hidden Markov coupling")
    explain.add_argument("--sites", type=int, default=32)
    explain.add_argument("--vocab", type=int, default=27)
    explain.add_argument("--states", type=int, default=64)
    explain.add_argument("--batch", type=int, default=None)
    options = parser.parse_args(arguments)
    graph = topologies.hidden_markov(options.sites, options.vocab, options.states)
    print(compile(graph).explain(options.batch))
    return 0
