"""The options of ``codd judge``; nothing heavy is imported here, as every command builds the whole parser."""

from __future__ import annotations

import argparse
from pathlib import Path

from codd_ppl.commands.generate_options import DRAWINGS, ORDERS

__all__ = ["add_judge_options"]


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+", help="held-out text, judged beside the samples")
    parser.add_argument(
        "--judge",
        type=Path,
        required=True,
        help="folder of a judge: codd fit --config models/text8/judge.yaml",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50, help="sequences at a time")
    parser.add_argument("--order", default="random", choices=ORDERS, help="which sites a step reveals")
    parser.add_argument("--drawing", default="joint", choices=DRAWINGS, help="the tokens of a step")
    parser.add_argument("--ngram", type=int, default=4, help="of distinct-n and repetition-n")
    parser.add_argument("--fields", nargs="+", default=["text"], help="fields of a .jsonl line")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="write a record for `codd card`, models/NAME/samples.json"
    )
