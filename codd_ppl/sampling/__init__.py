"""Generate: unmasking policies, the few-step sampler, and texts longer than the graph."""

from codd_ppl.sampling.blocks import BlockSampler
from codd_ppl.sampling.cover import Cover, minimum_cover
from codd_ppl.sampling.extension import extended, on_graph
from codd_ppl.sampling.protocol import Coupling, JointDistribution, WarmCoupling
from codd_ppl.sampling.sampler import Generation, Sampler
from codd_ppl.sampling.scoring import Best, PathScore, best_of, path_nelbo
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.stopping import FirstStop, NeverStop, StopRule, StopStrings, StopTokens
from codd_ppl.sampling.templates import encode_template, parse_template
from codd_ppl.sampling.texts import TextGeneration, TextSampler
from codd_ppl.sampling.unmasking import (
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
    RevealState,
    UnmaskingPolicy,
    coupled_marginals,
    network_marginals,
    unmasking_policy,
)
from codd_ppl.sampling.whole import WholeTextSampler
from codd_ppl.sampling.windows import WindowedCoupling

__all__ = [
    "Best",
    "BlockSampler",
    "Coupling",
    "Cover",
    "Entropy",
    "FirstStop",
    "Generation",
    "JointDistribution",
    "WarmCoupling",
    "LowConfidence",
    "Margin",
    "NeverStop",
    "OnStep",
    "PathScore",
    "RandomOrder",
    "RandomUnmasking",
    "RevealState",
    "Sampler",
    "Step",
    "StopRule",
    "StopStrings",
    "StopTokens",
    "TextGeneration",
    "TextSampler",
    "UnmaskingPolicy",
    "WholeTextSampler",
    "WindowedCoupling",
    "best_of",
    "coupled_marginals",
    "encode_template",
    "extended",
    "minimum_cover",
    "network_marginals",
    "on_graph",
    "parse_template",
    "path_nelbo",
    "unmasking_policy",
]
