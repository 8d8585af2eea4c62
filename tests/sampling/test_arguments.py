"""Names of LLaDA, Dream and diffusers: what they become, and what those hear that mean something else."""

import pytest
import torch

from codd_ppl.errors import ConfigError
from codd_ppl.sampling import (
    Cap,
    ConfidenceThreshold,
    Entropy,
    LowConfidence,
    Margin,
    Mode,
    RandomOrder,
    RandomUnmasking,
    Sampler,
    Temperature,
    TopK,
    TopP,
    sampler_arguments,
)
from codd_ppl.sampling.arguments import REFUSED


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"steps": 8}, {"steps": 8}),
        ({"num_inference_steps": 8}, {"steps": 8}),
        ({"steps": 8, "num_inference_steps": 8}, {"steps": 8}),
        ({"temperature": 0}, {"drawing": "mode"}),
        ({"temperature": 0.0, "drawing": "mode"}, {"drawing": "mode"}),
        ({"temperature": 1.0, "top_p": None, "top_k": None}, {}),
        (
            {"temperature": 0.5, "top_p": 0.9, "top_k": 50},
            {"logits": [Temperature(0.5), TopK(50), TopP(0.9)]},
        ),
        ({"remasking": "low_confidence"}, {"unmasking": LowConfidence()}),
        ({"remasking": "random"}, {"unmasking": RandomOrder()}),
        ({"remasking": "cap"}, {"remasking": "cap"}),
        ({"remasking": Cap(0.1)}, {"remasking": Cap(0.1)}),
        ({"alg": "origin"}, {"unmasking": RandomUnmasking()}),
        ({"alg": "origin", "alg_temp": 0.0}, {"unmasking": RandomUnmasking()}),
        ({"alg": "maskgit_plus"}, {"unmasking": LowConfidence()}),
        ({"alg": "topk_margin"}, {"unmasking": Margin()}),
        ({"alg": "entropy", "alg_temp": 0.2}, {"unmasking": Entropy(temperature=0.2)}),
        ({"threshold": 0.9}, {"unmasking": ConfidenceThreshold(0.9)}),
        ({"threshold": 0.9, "alg": "maskgit_plus"}, {"unmasking": ConfidenceThreshold(0.9)}),
        ({"unmasking": "margin", "warm_start": True}, {"unmasking": "margin", "warm_start": True}),
    ],
)
def test_what_they_mean_here(theirs, ours):
    assert sampler_arguments(**theirs) == ours


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"steps": 8, "num_inference_steps": 9}, "leave one of them out"),
        ({"temperature": 0, "drawing": "latent"}, "leave one of them out"),
        ({"alg": "entropy", "unmasking": "margin"}, "leave one of them out"),
        ({"alg": "entropy", "remasking": "random"}, "leave one of them out"),
        ({"threshold": 0.9, "unmasking": "margin"}, "leave one of them out"),
        ({"alg": "greedy"}, "maskgit_plus"),
        ({"alg": "origin", "alg_temp": 0.1}, "alg_temp"),
        ({"alg": "origin", "threshold": 0.9}, "threshold"),
        ({"alg_temp": 0.1}, "alg_temp"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": -1.0}, "temperature"),
        ({"stepz": 8}, "stepz: unknown.*steps"),
        ({"gen_length": 128}, "template"),
        ({"cfg_scale": 2.0}, "guidance=0.5"),
        ({"editing_threshold": 0.5}, "remasking"),
        ({"seed": 0}, "manual_seed"),
    ],
)
def test_errors_teach(theirs, said):
    with pytest.raises(ConfigError, match=said):
        sampler_arguments(**theirs)


def test_every_refused_name_says_what_to_do():
    for name, remedy in REFUSED.items():
        with pytest.raises(ConfigError, match=name) as caught:
            sampler_arguments(**{name: 1})
        assert remedy in str(caught.value)


def test_a_sampler_from_their_arguments(toy):
    toy = toy()
    sampler = Sampler.from_arguments(toy.denoiser, toy.perfect, num_inference_steps=3, alg="entropy", top_k=2)
    assert (sampler.steps, sampler.unmasking, sampler.logits) == (3, Entropy(), (TopK(2),))
    generation = sampler.generate(toy.template(4), torch.Generator().manual_seed(0))
    assert generation.nfe == 3
    assert Sampler.from_arguments(toy.denoiser, toy.perfect, temperature=0).drawing == Mode()
