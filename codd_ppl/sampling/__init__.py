"""Generate: unmasking policies, ways to draw, and the few-step sampler."""

from codd_ppl.sampling.activation import ActivatedCoupling
from codd_ppl.sampling.adaptive import ConfidenceThreshold, EntropyBound, JointConfidence, JointEntropy
from codd_ppl.sampling.arguments import sampler_arguments
from codd_ppl.sampling.drawing import AnyOrder, Draw, Joint, KBest, Latent, Mode, drawing_method, k_best
from codd_ppl.sampling.logits import Temperature, TopK, TopP
from codd_ppl.sampling.policies import unmasking_policy
from codd_ppl.sampling.protocol import (
    Coupling,
    JointDistribution,
    LatentDistribution,
    ModalDistribution,
    OrderedDistribution,
    RankedDistribution,
    WarmCoupling,
)
from codd_ppl.sampling.remasking import Cap, Confident, Remasking, RemaskState, Rescale, remasking_strategy
from codd_ppl.sampling.sampler import Generation, Sampler
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

__all__ = [
    "ActivatedCoupling",
    "AnyOrder",
    "Cap",
    "Confidence",
    "ConfidenceThreshold",
    "Confident",
    "Coupling",
    "Draw",
    "Entropy",
    "EntropyBound",
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
    "OrderedDistribution",
    "RandomOrder",
    "RandomUnmasking",
    "RankedDistribution",
    "RemaskState",
    "Remasking",
    "Rescale",
    "RevealState",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "UnmaskingPolicy",
    "WarmCoupling",
    "coupled_marginals",
    "drawing_method",
    "k_best",
    "network_marginals",
    "remasking_strategy",
    "sampler_arguments",
    "unmasking_policy",
]
