"""Plug-and-play: a coupling for a pretrained network that stays frozen, from a user's own text."""

from codd_ppl.attach.examples import Answers, Conversations, Example, Texts
from codd_ppl.attach.features import FeatureCache
from codd_ppl.attach.run import attach
from codd_ppl.attach.settings import AttachSettings
from codd_ppl.attach.source import Source, open_source
from codd_ppl.attach.token_store import Rows, TokenStore

__all__ = [
    "Answers",
    "AttachSettings",
    "Conversations",
    "Example",
    "FeatureCache",
    "Rows",
    "Source",
    "Texts",
    "TokenStore",
    "attach",
    "open_source",
]
