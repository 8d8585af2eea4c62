"""Options of commands that take a coupling of a pretrained network where they take a model folder."""

from __future__ import annotations

import argparse

__all__ = ["add_backbone_options"]


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """For a folder that ``codd attach`` wrote."""
    group = parser.add_argument_group("with a coupling by `codd attach` in place of a model folder")
    group.add_argument("--backbone", help="its network, a folder or id; default: the one that it names")
    group.add_argument("--revision", help="commit of the network on the hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the network"
    )
    group.add_argument("--dtype", help="of the network's weights, such as bfloat16")
