"""Generate: unmasking policies, ways to draw, the few-step sampler, and texts longer than the graph."""

from codd_ppl.sampling.activation import ActivatedCoupling
from codd_ppl.sampling.adaptive import ConfidenceThreshold, EntropyBound, JointConfidence, JointEntropy
from codd_ppl.sampling.arguments import sampler_arguments
from codd_ppl.sampling.blocks import BlockSampler
from codd_ppl.sampling.cover import Cover, aligned_cover, minimum_cover
from codd_ppl.sampling.drawing import AnyOrder, Draw, Joint, KBest, Latent, Mode, drawing_method, k_best
from codd_ppl.sampling.extension import extended, on_graph
from codd_ppl.sampling.generation import Generation
from codd_ppl.sampling.hooks import CoupledLogits
from codd_ppl.sampling.logits import Temperature, TopK, TopP
from codd_ppl.sampling.policies import unmasking_policy
from codd_ppl.sampling.protocol import (
    CheckedCoupling,
    Coupling,
    JointDistribution,
    LatentDistribution,
    ModalDistribution,
    OrderedDistribution,
    RankedDistribution,
    WarmCoupling,
)
from codd_ppl.sampling.remasking import Cap, Confident, Remasking, RemaskState, Rescale, remasking_strategy
from codd_ppl.sampling.sampler import Sampler
from codd_ppl.sampling.scoring import Best, PathScore, best_of, path_nelbo
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.stopping import FirstStop, NeverStop, StopRule, StopStrings, StopTokens
from codd_ppl.sampling.templates import encode_template, parse_template
from codd_ppl.sampling.texts import TextGeneration, TextSampler
from codd_ppl.sampling.unmasking import (
    Confidence,
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
    RevealState,
    UnmaskingPolicy,
    coupled_marginals,
    network_marginals,
)
from codd_ppl.sampling.whole import WholeTextSampler
from codd_ppl.sampling.windows import WindowedCoupling

__all__ = [
    "ActivatedCoupling",
    "AnyOrder",
    "Best",
    "BlockSampler",
    "Cap",
    "CheckedCoupling",
    "Confidence",
    "ConfidenceThreshold",
    "Confident",
    "CoupledLogits",
    "Coupling",
    "Cover",
    "Draw",
    "Entropy",
    "EntropyBound",
    "FirstStop",
    "Generation",
    "Joint",
    "JointConfidence",
    "JointDistribution",
    "JointEntropy",
    "KBest",
    "Latent",
    "LatentDistribution",
    "LowConfidence",
    "Margin",
    "ModalDistribution",
    "Mode",
    "NeverStop",
    "OnStep",
    "OrderedDistribution",
    "PathScore",
    "RandomOrder",
    "RandomUnmasking",
    "RankedDistribution",
    "RemaskState",
    "Remasking",
    "Rescale",
    "RevealState",
    "Sampler",
    "Step",
    "StopRule",
    "StopStrings",
    "StopTokens",
    "Temperature",
    "TextGeneration",
    "TextSampler",
    "TopK",
    "TopP",
    "UnmaskingPolicy",
    "WarmCoupling",
    "WholeTextSampler",
    "WindowedCoupling",
    "aligned_cover",
    "best_of",
    "coupled_marginals",
    "drawing_method",
    "encode_template",
    "extended",
    "k_best",
    "minimum_cover",
    "network_marginals",
    "on_graph",
    "parse_template",
    "path_nelbo",
    "remasking_strategy",
    "sampler_arguments",
    "unmasking_policy",
]
