"""The objective: noise schedules, masking, the T-step bound, and the process as a Pyro program."""

from codd_ppl.diffusion.closed_forms import (
    best_factorised_nelbo,
    factorization_gap,
    parity_gap,
    total_correlation,
    two_tokens_gap,
)
from codd_ppl.diffusion.enumeration import log_prob_fn, nelbo_exact
from codd_ppl.diffusion.masking import mask_tokens, reveal, stratified_times
from codd_ppl.diffusion.nelbo import NoisedBatch, SetDistribution, coupled_nelbo, factorised_nelbo, noise
from codd_ppl.diffusion.process import ReverseProcess
from codd_ppl.diffusion.schedules import CosineSchedule, LinearSchedule, Schedule
from codd_ppl.diffusion.transitions import NoisedSequence, PosteriorReveal, RevealStep

__all__ = [
    "Schedule",
    "LinearSchedule",
    "CosineSchedule",
    "mask_tokens",
    "reveal",
    "stratified_times",
    "NoisedBatch",
    "SetDistribution",
    "noise",
    "factorised_nelbo",
    "coupled_nelbo",
    "nelbo_exact",
    "log_prob_fn",
    "factorization_gap",
    "best_factorised_nelbo",
    "total_correlation",
    "two_tokens_gap",
    "parity_gap",
    "ReverseProcess",
    "RevealStep",
    "PosteriorReveal",
    "NoisedSequence",
]
