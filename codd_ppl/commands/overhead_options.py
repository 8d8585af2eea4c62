"""The options of ``codd bench overhead``; nothing heavy is imported here, as every command builds the whole parser."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_overhead_options"]


def add_overhead_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--backbone-config",
        default="llada-8b",
        help="llada-8b, dream-7b, bert-base, or a config.json of transformers",
    )
    parser.add_argument(
        "--scale", default="auto", help="share of the layers, such as 1 or 1/8; auto: all, where they fit"
    )
    parser.add_argument("--states", type=int, default=1024, help="of the hidden Markov coupling")
    parser.add_argument("--length", type=int, default=32, help="sites that a step writes")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before them")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--candidates", type=int, nargs="+", default=[64], help="tokens fitted at each site")
    parser.add_argument(
        "--drawing", nargs="+", default=["joint", "any_order"], help="joint, latent or any_order"
    )
    parser.add_argument(
        "--drawing-temperature", type=float, default=0.7, help="of latent and any_order; at 1 both are joint"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the network")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu on a machine in use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
