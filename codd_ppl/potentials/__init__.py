"""Layer 4, parameterise: modules that hold the log-potentials of a coupling, and their starts from text."""

from codd_ppl.potentials.baum_welch import baum_welch
from codd_ppl.potentials.latent import LatentPotentials
from codd_ppl.potentials.starts import Clones, Clusters, Given, RandomStart, Start
from codd_ppl.potentials.statistics import log_unigram, pointwise_mutual_information
from codd_ppl.potentials.table import Potentials, TablePotentials
from codd_ppl.potentials.trace import Trace

__all__ = [
    "Clones",
    "Clusters",
    "Given",
    "LatentPotentials",
    "Potentials",
    "RandomStart",
    "Start",
    "TablePotentials",
    "Trace",
    "baum_welch",
    "log_unigram",
    "pointwise_mutual_information",
]
