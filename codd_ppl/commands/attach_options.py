"""The options of ``codd attach``; nothing heavy is imported here, as every command builds the whole parser."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_attach_options"]


def add_attach_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command; their names are those of :class:`codd_ppl.attach.AttachSettings`."""
    add = parser.add_argument
    add("--backbone", required=True, help="a masked model of transformers (folder or id), or a model folder")
    add("--data", nargs="+", required=True, help=".jsonl or .txt (.gz, .xz), or hf:owner/name")
    add("--out", type=Path, required=True, help="folder for the coupling")
    add("--work", type=Path, help="folder for tokens, checkpoints and features; default: OUT.work")
    text = parser.add_argument_group("the text")
    add = text.add_argument
    add("--valid-data", nargs="+", default=[], help="held-out text; default: a part of --data")
    add("--held-out", type=float, default=0.02, help="share of the examples to hold out")
    add("--fields", nargs="+", default=["text"], help="fields that make up a document")
    add("--prompt-fields", nargs="+", default=[], help="fields of the prompt, by the model's chat template")
    add("--answer-field", help="the field of the answer: only answers are fitted, each beginning a block")
    add("--messages-field", help="a field with a conversation of roles and contents: the assistant's turns")
    add("--plain-prompts", action="store_true", help="prompts as they are, without the chat template")
    add("--max-tokens", type=int, help="read no more")
    prior = parser.add_argument_group("the prior, fitted to the text alone")
    add = prior.add_argument
    add("--topology", default="hidden_markov", help="hidden_markov, latent_tree or mixture")
    add("--states", type=int, default=1024)
    add("--length", type=int, default=32, help="tokens of a block")
    add("--epochs", type=float, default=1.0, help="passes of Baum-Welch over the blocks; may be a fraction")
    add("--batch-size", type=int, default=64, help="blocks of an update")
    add("--smoothing", type=float, default=1e-3, help="counts added to each state")
    how = parser.add_argument_group("how it is combined with the network")
    add = how.add_argument
    add(
        "--combine", choices=["projected", "product"], default="projected", help="product: the article's form"
    )
    add("--sharpen", type=float, default=1.0, help="divide the network's logits by this in the report")
    add(
        "--candidates",
        type=int,
        help="project the likeliest tokens and a lumped tail; default: all, 256 if many",
    )
    add("--pool", action="store_true", help="pool the network's and the prior's marginals; runs the network")
    context = parser.add_argument_group("a coupling that reads hidden states (optional)")
    add = context.add_argument
    add("--contextual", action="store_true", help="train evidence of the latents on the network's features")
    add("--gates", action="store_true", help="and gates on their edges")
    add("--examples", type=int, default=4096, help="noised blocks that the network reads, once")
    add("--updates", type=int, default=600)
    add("--top-k", type=int, default=64, help="likeliest tokens kept of each site")
    add("--reduced", type=int, default=256, help="principal components of the hidden states; 0: all")
    add("--context", type=int, help="tokens that the network reads before a block; default: 512 for answers")
    report = parser.add_argument_group("the report")
    add = report.add_argument
    add(
        "--blocks",
        type=int,
        default=64,
        help="held-out blocks; 0: no report, the network isn't loaded for it",
    )
    add("--timing", type=float, default=20.0, metavar="SECONDS", help="of measuring the clock; 0: none")
    network = parser.add_argument_group("the network")
    add = network.add_argument
    add("--revision", help="commit on the hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--mask-token-id", type=int, help="if the model doesn't say it")
    add("--dtype", help="of its weights, such as bfloat16")
    add("--network-batch", type=int, default=16, help="blocks in one call")
    add("--device", default="cpu", help="such as cuda")
    add("--devices", type=int, default=1, help="that share the training of the contextual part")
    add("--weights", choices=["float16", "float32"], default="float16", help="of the coupling's file")
    add("--seed", type=int, default=0)
