"""Absorbing noise: which tokens are masked at time t, and which masked sites one step reveals.

Every function draws from ``generator`` if given (on the generator's device, so that one seed gives
the same noise on every device), else from PyTorch's global generator. No input is edited.
"""

import torch

from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.typing import Bool, Float, Int, Tensor

__all__ = ["mask_tokens", "reveal", "stratified_times"]


def _uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
) -> Tensor:
    """Uniform draws on [0, 1), made where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)


def _per_sequence(value: Tensor | float, name: str, tokens: Tensor) -> Tensor:
    """``value``, one number or one per sequence, shaped so that it broadcasts over the sites."""
    value = torch.as_tensor(value, device=tokens.device)
    if not value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    if bool((value < 0).any()) or bool((value > 1).any()) or bool(value.isnan().any()):
        raise ConfigError(
            f"expected {name} to be a probability in [0, 1], found values from {value.min():.6g} to "
            f"{value.max():.6g}; take {name} from a Schedule"
        )
    if value.ndim and value.shape != tokens.shape[:-1]:
        raise ShapeError(
            f"expected {name} of shape {tuple(tokens.shape[:-1])} (one per sequence) or a single number, "
            f"found {tuple(value.shape)}; index the schedule's grid with one step per sequence"
        )
    return value.unsqueeze(-1)


def stratified_times(
    n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Float[Tensor, "n"]:
    """Times t in [0, 1), float64: evenly spaced with one random offset, t_i = (u + i/n) mod 1.

    Every t_i alone is uniform, so each sequence's loss is unbiased; together they cover [0, 1)
    evenly, so the loss of a batch varies less (systematic sampling).

    Raises:
        ConfigError: n < 0.
    """
    if n < 0:
        raise ConfigError(f"expected n >= 0 times, found {n}; pass the number of sequences")
    offset = _uniform((1,), torch.device(device), generator, torch.float64)
    return (offset + torch.arange(n, dtype=torch.float64, device=device) / max(n, 1)) % 1


def mask_tokens(
    x0: Int[Tensor, "*#batch sites"],
    alpha: Float[Tensor, "*#batch"] | float,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*#batch sites"]:
    """Draw xt ~ q(xt | x0): each token stays with probability ``alpha``, else becomes the mask token.

    ``alpha`` is one number or one per sequence; 1 keeps every token, 0 masks every token.

    Raises:
        ConfigError: ``alpha`` outside [0, 1].
        ShapeError: ``alpha`` doesn't fit the batch.
        TokenError: ``x0`` holds the mask token already.
    """
    keep = _per_sequence(alpha, "alpha", x0)
    if bool((x0 == mask_token_id).any()):
        raise TokenError(
            f"expected clean tokens, found the mask token (id {mask_token_id}) in x0; "
            f"pass x0 without masks, or a mask_token_id that is not a token"
        )
    stays = _uniform(tuple(x0.shape), x0.device, generator, torch.float32) < keep
    return torch.where(stays, x0, mask_token_id)


def reveal(
    masked: Bool[Tensor, "*#batch sites"],
    rate: Float[Tensor, "*#batch"] | float,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*#batch sites"]:
    """Draw the set S that one reverse step reveals: each masked site with probability ``rate``.

    ``rate`` is one number or one per sequence; 1 reveals every masked site, 0 none.

    Raises:
        ConfigError: ``rate`` outside [0, 1].
        ShapeError: ``rate`` doesn't fit the batch.
    """
    chosen = _uniform(tuple(masked.shape), masked.device, generator, torch.float32) < _per_sequence(
        rate, "rate", masked
    )
    return masked & chosen
