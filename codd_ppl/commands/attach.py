"""``codd attach``: a coupling for a pretrained network, from a user's own text."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields

from codd_ppl.attach import AttachSettings, attach
from codd_ppl.commands.device import named_device

__all__ = ["run_attach"]


def run_attach(options: argparse.Namespace) -> None:
    """What the command line asks for; ``options.words`` are the words as typed.

    Raises:
        ConfigError, DataError: settings, a network, text or place that can't be used.
    """
    named_device(options.device)
    given = {field.name: getattr(options, field.name) for field in fields(AttachSettings)}
    settings = AttachSettings(**given)
    try:
        attach(settings, "codd " + shlex.join(options.words))
    except KeyboardInterrupt:
        print(f"codd: stopped; the same command goes on with {settings.folder}", file=sys.stderr)
        raise
