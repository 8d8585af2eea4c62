"""The options of ``codd evaluate``; nothing heavy is imported here, as every command builds the whole parser."""

from __future__ import annotations

import argparse
from pathlib import Path

from codd_ppl.commands.backbone_options import add_backbone_options

__all__ = ["add_evaluate_options"]


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", type=Path, help="a model folder, or a coupling by `codd attach`")
    parser.add_argument("text", type=Path, nargs="+", help="held-out text")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another model folder of the same sites and vocabulary, as a row NAME; may be repeated",
    )
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--blocks", type=int, default=256, help="so many, spread evenly over the text")
    parser.add_argument("--draws", type=int, default=2, help="of the noise, for each block")
    parser.add_argument("--reveals", type=int, default=8, help="revealed sets for each draw of the noise")
    parser.add_argument("--batch-size", type=int, default=64, help="blocks in one call of the network")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timing", type=float, default=0.0, metavar="SECONDS", help="measure the wall clock of sampling, too"
    )
    parser.add_argument(
        "--fields", nargs="+", default=["text"], help="fields of a .jsonl line that make up a document"
    )
    parser.add_argument(
        "--wikitext",
        action="store_true",
        help="the text is WikiText's tokens: made running text first, and perplexities per word of it printed",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also the coupling's marginals drawn independently, the prior alone, and sharper logits",
    )
    parser.add_argument(
        "--output", type=Path, help="write a record for `codd card`, models/NAME/results.json"
    )
    parser.add_argument("--table", type=Path, help="write all values, block by block, as JSON")
    add_backbone_options(parser)
