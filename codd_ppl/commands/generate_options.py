"""The options of ``codd generate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from codd_ppl.commands.backbone_options import add_backbone_options

__all__ = ["add_generate_options"]

ORDERS = ("random", "random_order", "low_confidence", "margin", "entropy")
ADAPTIVE = ("joint_confidence", "joint_entropy", "entropy_bound", "confidence_threshold")
POLICIES = (
    f"which sites a step writes: {', '.join(ORDERS)}; or as many as are sure enough, so that --steps is the most: "
    f"{', '.join(ADAPTIVE)}"
)
DRAWINGS = ("joint", "latent", "any_order", "mode", "k_best")
REMASKINGS = ("cap", "rescale", "confidence")


def add_generate_options(generate: argparse.ArgumentParser) -> None:
    """What to write, how, and what comes out."""
    generate.add_argument("model", type=Path, help="a model folder, or a coupling by `codd attach`")
    what = generate.add_argument_group("what to write (nothing given: texts without a beginning)")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    what.add_argument(
        "--prompt-file",
        type=Path,
        action="append",
        default=[],
        help="a prompt on each line; - reads standard input",
    )
    what.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to infill: _ or [MASK] for a token to write, [MASK:12] for twelve, \\_ and \\[ for the characters",
    )
    what.add_argument(
        "--length", type=int, help="tokens to write after the prompt; default: up to the model's sites"
    )
    what.add_argument("--chat", action="store_true", help="prompts by the network's chat template")
    what.add_argument("--samples", type=int, default=4, help="texts for each prompt or template")
    what.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="of N texts keep the one of the highest joint probability",
    )
    what.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (\\n: line end); repeatable",
    )
    what.add_argument(
        "--stop-token", type=int, action="append", default=[], metavar="ID", help="end with this token"
    )
    must = generate.add_argument_group("what the text must be, prompt included (texts of the model's sites)")
    must.add_argument("--regex", metavar="PATTERN", help="match this regular expression as a whole")
    must.add_argument(
        "--contains", action="append", default=[], metavar="TEXT", help="contain this; repeatable"
    )
    must.add_argument(
        "--forbids", action="append", default=[], metavar="TEXT", help="not contain this; repeatable"
    )
    how = generate.add_argument_group("how")
    how.add_argument("--steps", type=int, default=4, help="reverse steps of each block, or of the whole text")
    how.add_argument(
        "--unmasking", default="random", choices=[*ORDERS, *ADAPTIVE], metavar="POLICY", help=POLICIES
    )
    how.add_argument(
        "--drawing", default="joint", choices=DRAWINGS, help="the tokens of a step; default: joint"
    )
    how.add_argument(
        "--drawing-temperature",
        type=float,
        metavar="TAU",
        help="of --drawing latent and any_order; default: 1",
    )
    how.add_argument("--temperature", type=float, metavar="TAU", help="of the network, before it is coupled")
    how.add_argument("--top-k", type=int, metavar="K", help="tokens of each site, of the network")
    how.add_argument("--top-p", type=float, metavar="P", help="nucleus of each site, of the network")
    how.add_argument(
        "--active-below", type=float, metavar="GAMMA", help="couple only where at most this share is masked"
    )
    how.add_argument(
        "--remasking", choices=REMASKINGS, help="mask written tokens again now and then, to correct them"
    )
    how.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance; 0: none")
    how.add_argument("--factorised", action="store_true", help="leave the coupling out")
    long = how.add_mutually_exclusive_group()
    long.add_argument(
        "--block-length",
        type=int,
        help="long texts block by block, the default, in blocks of the model's sites",
    )
    long.add_argument("--windows", action="store_true", help="long texts at once, coupled in windows")
    long.add_argument(
        "--extend", action="store_true", help="long texts at once, the coupling's tied chain made longer"
    )
    how.add_argument(
        "--context", type=int, help="most tokens the network reads before a window; default: all"
    )
    how.add_argument(
        "--lookahead", action="store_true", help="the network also reads what is right of a block"
    )
    how.add_argument("--batch-size", type=int, default=64, help="texts that are written together")
    how.add_argument("--device", default="cpu", help="such as cuda")
    how.add_argument("--seed", type=int, default=0)
    add_backbone_options(generate)
    generate.add_argument(
        "--html", type=Path, metavar="FILE", help="a page that plays how the texts were written"
    )
    generate.add_argument(
        "--jsonl", action="store_true", help="for scripts: a JSON object for each text, one a line"
    )
