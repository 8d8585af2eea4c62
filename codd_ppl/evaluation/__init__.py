"""Evaluate: likelihood bounds, sample metrics and plots."""

from codd_ppl.evaluation.bootstrap import Interval, paired_bootstrap
from codd_ppl.evaluation.comparison import EquivalentSteps
from codd_ppl.evaluation.continuation import ContinuationScorer, Scores
from codd_ppl.evaluation.controls import MarginalsAlone, PriorAlone, Sharpened
from codd_ppl.evaluation.likelihood import nelbo_table
from codd_ppl.evaluation.metrics import distinct_n, repetition, token_entropy, word_perplexity
from codd_ppl.evaluation.ngram import NGramModel
from codd_ppl.evaluation.plots import plot_nelbo, plot_reveal_history, save_figure
from codd_ppl.evaluation.table import NelboTable
from codd_ppl.evaluation.timing import time_network, time_sampling

__all__ = [
    "ContinuationScorer",
    "EquivalentSteps",
    "Interval",
    "MarginalsAlone",
    "NGramModel",
    "NelboTable",
    "PriorAlone",
    "Scores",
    "Sharpened",
    "distinct_n",
    "nelbo_table",
    "paired_bootstrap",
    "plot_nelbo",
    "plot_reveal_history",
    "repetition",
    "save_figure",
    "time_network",
    "time_sampling",
    "token_entropy",
    "word_perplexity",
]
