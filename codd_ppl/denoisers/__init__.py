"""Backbones: networks that read a partly masked sequence and give logits and hidden states per site."""

from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.guidance import Guided
from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.denoisers.transformer import BidirectionalTransformer, TransformerConfig

__all__ = [
    "Denoiser",
    "DenoiserOutput",
    "BidirectionalTransformer",
    "Guided",
    "InContext",
    "TransformerConfig",
]
