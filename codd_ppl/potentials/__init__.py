"""Layer 4, parameterise: modules that hold the log-potentials of a coupling, and their starts from text."""

from codd_ppl.potentials.aspect_model import AspectModel, aspect_model
from codd_ppl.potentials.baum_welch import baum_welch
from codd_ppl.potentials.contextual import ContextualLatentPotentials
from codd_ppl.potentials.emission_correction import EmissionCorrection
from codd_ppl.potentials.latent import LatentPotentials
from codd_ppl.potentials.low_rank import LowRankPotentials
from codd_ppl.potentials.mixture import MixturePotentials
from codd_ppl.potentials.mixture_start import MixtureStart
from codd_ppl.potentials.offset_pairs import EdgeScores, OffsetPairs
from codd_ppl.potentials.pool import LogarithmicPool
from codd_ppl.potentials.starts import Clones, Clusters, Given, RandomStart, Start
from codd_ppl.potentials.statistics import (
    log_unigram,
    mutual_information,
    pairwise_mutual_information,
    pointwise_mutual_information,
)
from codd_ppl.potentials.table import Potentials, TablePotentials
from codd_ppl.potentials.tied import TiedEmissionPotentials, TiedStart
from codd_ppl.potentials.tied_fit import TiedFit, fit_tied
from codd_ppl.potentials.trace import Trace

__all__ = [
    "AspectModel",
    "ContextualLatentPotentials",
    "EdgeScores",
    "EmissionCorrection",
    "Clones",
    "Clusters",
    "Given",
    "LatentPotentials",
    "LogarithmicPool",
    "LowRankPotentials",
    "MixturePotentials",
    "MixtureStart",
    "OffsetPairs",
    "Potentials",
    "RandomStart",
    "Start",
    "TablePotentials",
    "TiedEmissionPotentials",
    "TiedFit",
    "TiedStart",
    "aspect_model",
    "Trace",
    "baum_welch",
    "fit_tied",
    "log_unigram",
    "mutual_information",
    "pairwise_mutual_information",
    "pointwise_mutual_information",
]
