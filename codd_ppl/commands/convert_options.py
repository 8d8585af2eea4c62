"""The options of ``codd convert``; nothing heavy is imported here, as every command builds the whole parser."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_convert_options"]


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("model", type=Path, help="a hidden Markov model of PyJuice, .jpc; nothing in the file is run")
    add("--out", type=Path, required=True, help="folder for the coupling: safetensors and JSON")
    add("--backbone", help="name of the network that it is for, such as GSAI-ML/LLaDA-8B-Instruct")
    add("--tokenizer", type=Path, help="folder of the network's tokenizer.json; its vocabulary is noted")
    add("--sites", type=int, help="tokens of the coupling; default: those of the circuit")
    add(
        "--combine",
        choices=["projected", "product"],
        default="projected",
        help="product: as in the article that the circuits are from",
    )
    add(
        "--candidates",
        type=int,
        help="project the likeliest tokens and a lumped tail; default: all, 256 if many",
    )
    add("--weights", choices=["float16", "float32"], default="float32", help="of the coupling's file")
    add(
        "--trust-pickle",
        action="store_true",
        help="load the file with PyJuice, which RUNS the code in it: only if it can't be read otherwise",
    )
