"""Names that users of other samplers type, where they mean the same thing here.

LLaDA's ``generate`` (arXiv:2502.09992), Dream's ``diffusion_generate`` (arXiv:2508.15487) and diffusers' block
refinement call the same choices by other names; :func:`sampler_arguments` maps them onto those of
:class:`codd_ppl.Sampler`:

=============================================  ===========================================================
theirs                                         here
=============================================  ===========================================================
``steps``, ``num_inference_steps``             ``steps``
``temperature`` > 0                            ``logits=[Temperature(temperature), ...]``
``temperature=0``                              ``drawing="mode"`` (the argmax of their independent sites)
``top_k``, ``top_p``                           ``logits=[..., TopK(top_k), TopP(top_p)]``
``remasking="low_confidence"`` (LLaDA)         ``unmasking="low_confidence"``
``remasking="random"`` (LLaDA)                 ``unmasking="random_order"``
``alg="origin"`` (Dream)                       ``unmasking="random"``
``alg="maskgit_plus"``                         ``unmasking="low_confidence"``
``alg="topk_margin"``, ``alg="entropy"``       ``unmasking="margin"``, ``unmasking="entropy"``
``alg_temp``                                   the temperature of that order
``threshold`` (diffusers, Fast-dLLM)           ``unmasking=ConfidenceThreshold(threshold)``
=============================================  ===========================================================

Their confidence is that of the token that was drawn, ours the largest of the site (equal at temperature 0), read off
the coupled marginals. The sampler's own names go through as they are.
"""

from collections.abc import Callable
from typing import Any

from codd_ppl.errors import ConfigError
from codd_ppl.sampling.adaptive import ConfidenceThreshold
from codd_ppl.sampling.logits import Temperature, TopK, TopP, chain_of
from codd_ppl.sampling.unmasking import (
    Confidence,
    Entropy,
    LowConfidence,
    Margin,
    RandomOrder,
    RandomUnmasking,
)

__all__ = ["OWN", "REFUSED", "sampler_arguments"]

OWN = ("unmasking", "steps", "schedule", "warm_start", "drawing", "logits", "active_below", "remasking")
"""Names of the sampler itself."""

LLADA: dict[str, Callable[[], Any]] = {"low_confidence": LowConfidence, "random": RandomOrder}
"""LLaDA's ``remasking``."""

DREAM: dict[str, Callable[[], Any]] = {
    "origin": RandomUnmasking,
    "maskgit_plus": LowConfidence,
    "topk_margin": Margin,
    "entropy": Entropy,
}
"""Dream's ``alg``."""

REFUSED: dict[str, str] = {
    "gen_length": "the template says where to write: torch.full((batch, sites), denoiser.mask_token_id)",
    "max_new_tokens": "the template says where to write: torch.full((batch, sites), denoiser.mask_token_id)",
    "max_length": "the template says where to write, and how long the text is",
    "block_length": "long texts in blocks are written by BlockSampler(sampler, block_length=32)",
    "cfg_scale": "guidance is a setting of BlockSampler and WholeTextSampler: guidance=0.5",
    "mask_id": "it is denoiser.mask_token_id",
    "mask_token_id": "it is denoiser.mask_token_id",
    "attention_mask": "all sites of a template are read; cut it to the text",
    "eps": "the schedule ends at t = 0 exactly; pass schedule=",
    "seed": "pass generator=torch.Generator().manual_seed(seed) to generate()",
    "generator": "pass it to generate(), which draws from it",
    "output_history": "generate() always returns history, the step that wrote each site",
    "return_dict_in_generate": "generate() returns a Generation with tokens, nfe and history",
    "editing_threshold": 'to let written tokens change, mask them again: remasking="confidence"',
    "minimal_topk": "a policy reveals at least one site by itself; set steps",
    "num_beams": "the k best assignments come with drawing=KBest(k), or codd_ppl.sampling.k_best",
    "repetition_penalty": "pass a transform of the logits: logits=[your_callable]",
    "do_sample": 'for no randomness pass temperature=0 or drawing="mode"',
}
"""Names that mean something else, and what to do instead."""


def sampler_arguments(**arguments: Any) -> dict[str, Any]:
    """Keyword arguments of :class:`codd_ppl.Sampler` from those of LLaDA, Dream or diffusers (table above).

    ``None`` means "not given", as it does there.

    Raises:
        ConfigError: a name that means something else here, an unknown one, two that contradict each other, or a value
            that is out of range.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    known = {*OWN, "num_inference_steps", "temperature", "top_k", "top_p", "alg", "alg_temp", "threshold"}
    for name in given:
        if name in REFUSED:
            raise ConfigError(f"{name}: not an argument of this sampler; {REFUSED[name]}")
        if name not in known:
            raise ConfigError(f"{name}: unknown; expected one of {', '.join(sorted(known))}")
    result = {name: given[name] for name in OWN if name in given}
    if "num_inference_steps" in given:
        _once(result, "steps", "num_inference_steps", given["num_inference_steps"])
    _logits(given, result)
    _unmasking(given, result)
    return result


def _logits(given: dict[str, Any], result: dict[str, Any]) -> None:
    """Temperature, then top-k, then the nucleus, as Hugging Face orders them; after the caller's own transforms."""
    transforms = list(chain_of(given.get("logits")))
    temperature = given.get("temperature", 1.0)
    if temperature == 0:
        _once(result, "drawing", "temperature=0", "mode")
    elif temperature != 1:
        transforms.append(Temperature(temperature))
    transforms += [TopK(given["top_k"])] if given.get("top_k") else []
    transforms += [TopP(given["top_p"])] if given.get("top_p", 1.0) != 1.0 else []
    if transforms:
        result["logits"] = transforms


def _unmasking(given: dict[str, Any], result: dict[str, Any]) -> None:
    policy: Any = None
    if isinstance(given.get("remasking"), str) and given["remasking"] in LLADA:
        policy = LLADA[result.pop("remasking")]()
        _once(result, "unmasking", "remasking", policy)
    if "alg" in given:
        if given["alg"] not in DREAM:
            raise ConfigError(
                f"alg: expected one of {', '.join(DREAM)}, found {given['alg']!r}; or pass unmasking="
            )
        policy = DREAM[given["alg"]]()
        _once(result, "unmasking", "alg", policy)
    if given.get("alg_temp"):
        if not isinstance(policy, Confidence):
            raise ConfigError(
                'alg_temp: expected with it an order by confidence, alg="maskgit_plus", "topk_margin" or "entropy"; '
                "a random order has no temperature: leave it out"
            )
        policy = result["unmasking"] = type(policy)(temperature=given["alg_temp"])
    if "threshold" in given:
        if policy is not None and not isinstance(policy, Confidence):
            raise ConfigError(
                "threshold: expected with it an order by confidence; a random order has none: leave it out"
            )
        order = LowConfidence() if policy is None else policy
        if policy is not None:
            del result["unmasking"]
        _once(result, "unmasking", "threshold", ConfidenceThreshold(given["threshold"], order))


def _once(result: dict[str, Any], name: str, source: str, value: Any) -> None:
    """Set an argument that may be given under two names, but not with two values."""
    if name in result and result[name] != value:
        raise ConfigError(
            f"{source}: it says {name}={value!r}, but {name}={result[name]!r} is given as well; leave one of them out"
        )
    result[name] = value
