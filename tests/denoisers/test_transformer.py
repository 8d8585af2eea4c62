"""The small bidirectional transformer: shapes, what it can see, its start, its errors, and that it learns."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from codd_ppl.denoisers import BidirectionalTransformer, Denoiser, DenoiserOutput, TransformerConfig
from codd_ppl.errors import ConfigError, ShapeError, TokenError

VOCAB = 11


def small(**sizes: float) -> BidirectionalTransformer:
    return BidirectionalTransformer(VOCAB, **({"hidden_size": 16, "layers": 2, "heads": 2} | sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(9,), (1, 1), (3, 5), (2, 3, 17), (0, 6), (2, 0, 4)])
def test_shapes_for_any_batch_and_any_length(shape: tuple[int, ...]) -> None:
    output = small()(torch.randint(VOCAB + 1, shape))
    assert isinstance(output, DenoiserOutput)
    assert output.logits.shape == (*shape, VOCAB) and output.hidden.shape == (*shape, 16)


def test_is_a_denoiser() -> None:
    network = small()
    assert isinstance(network, Denoiser) and not isinstance(nn.Linear(2, 2), Denoiser)
    assert (network.vocab_size, network.mask_token_id, network.hidden_size) == (VOCAB, VOCAB, 16)


def test_batch_dimensions_are_independent() -> None:
    """A sequence gets the same answer alone, in a batch and in a grid of batches."""
    network, xt = small(), torch.randint(VOCAB + 1, (2, 3, 8))
    whole = network(xt).logits
    torch.testing.assert_close(network(xt.flatten(0, 1)).logits, whole.flatten(0, 1))
    torch.testing.assert_close(network(xt[1, 2]).logits, whole[1, 2])


def test_hidden_is_what_the_head_reads() -> None:
    network = small()
    output = network(torch.randint(VOCAB + 1, (2, 8)))
    torch.testing.assert_close(network.head(output.hidden), output.logits)


@pytest.mark.parametrize(("changed", "read"), [(0, 39), (39, 0), (20, 19)])
def test_every_site_sees_both_sides(changed: int, read: int) -> None:
    network, xt = small(layers=1, kernel_size=3), torch.randint(VOCAB, (1, 40))
    other = xt.clone()
    other[0, changed] = (xt[0, changed] + 1) % VOCAB
    assert not torch.equal(network(xt).logits[0, read], network(other).logits[0, read])


def test_attention_knows_positions() -> None:
    """Two far tokens change places, beyond the reach of the convolution: rotary positions tell."""
    network, xt = small(layers=1, kernel_size=1), torch.zeros(1, 20, dtype=torch.long)
    xt[0, 10], xt[0, 15] = 1, 2
    swapped = xt.clone()
    swapped[0, 10], swapped[0, 15] = 2, 1
    assert (network(xt).logits[0, 0] - network(swapped).logits[0, 0]).abs().max() > 1e-5


def test_attention_sees_distances_only() -> None:
    """Rotary scores depend on the distance alone: a site in a sequence of one repeated token, shifted or not."""
    network = small(layers=1, kernel_size=1).double()
    logits = network(torch.full((1, 7), 3)).logits[0]
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


def test_starts_near_the_uniform_distribution() -> None:
    network, xt = small(hidden_size=64), torch.randint(VOCAB + 1, (32, 20))
    logits = network(xt).logits.detach()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(VOCAB, (640,)))
    assert abs(float(loss) - math.log(VOCAB)) < 0.05 and float(logits.std()) > 1e-3


def test_gradients_reach_every_weight() -> None:
    network = small()
    network(torch.arange(VOCAB + 1)).logits.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_learns_a_period() -> None:
    """Masked tokens of a repeated word are certain: the loss falls from log V to near nothing."""
    network = BidirectionalTransformer(5, hidden_size=32, layers=1, heads=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    phases = (torch.arange(12)[None] + torch.arange(4)[:, None]) % 4
    for _ in range(60):
        masked = torch.rand(phases.shape) < 0.5
        logits = network(phases.masked_fill(masked, network.mask_token_id)).logits
        loss = nn.functional.cross_entropy(logits[masked], phases[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15


def test_rebuilt_from_its_config_and_weights() -> None:
    network = small(kernel_size=5)
    twin = BidirectionalTransformer.from_config(TransformerConfig(**dataclasses.asdict(network.config)))
    twin.load_state_dict(network.state_dict())
    xt = torch.randint(VOCAB + 1, (2, 8))
    assert torch.equal(twin(xt).logits, network(xt).logits) and twin.config == network.config


def test_dropout_only_in_training() -> None:
    network, xt = small(dropout=0.5), torch.randint(VOCAB + 1, (2, 8))
    assert not torch.equal(network(xt).logits, network(xt).logits)
    network.eval()
    assert torch.equal(network(xt).logits, network(xt).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_follows_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    network, xt = small(), torch.randint(VOCAB + 1, (2, 8))
    expected = network(xt).logits
    found = network.to(dtype)(xt).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_any_integer_dtype_and_no_edit(dtype: torch.dtype) -> None:
    network, xt = small(), torch.randint(VOCAB + 1, (2, 8))
    given = xt.to(dtype)
    assert torch.equal(network(given).logits, network(xt).logits)
    assert torch.equal(given, xt.to(dtype))


@pytest.mark.parametrize(("token", "found"), [(-1, "found -1"), (VOCAB + 1, f"found {VOCAB + 1}")])
def test_a_token_outside_the_vocabulary(token: int, found: str) -> None:
    xt = torch.zeros(2, 4, dtype=torch.long)
    xt[1, 2] = token
    with pytest.raises(TokenError, match=f"from 0 to {VOCAB}.*{found}"):
        small()(xt)


@pytest.mark.parametrize(
    ("xt", "message"),
    [
        (torch.zeros(2, 4), "integer dtype, found torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bool), "integer dtype, found torch.bool"),
        (torch.tensor(3), r"\(\*batch, sites\).*found \(\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"sites >= 1, found \(2, 0\)"),
    ],
)
def test_a_wrong_tensor(xt: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        small()(xt)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers >= 1, found 0"),
        ({"hidden_size": 18, "heads": 4}, "multiple of 2 \\* heads = 8.*found 18"),
        ({"kernel_size": 4}, "odd kernel_size.*found 4"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), found 1.0"),
    ],
)
def test_sizes_that_make_no_network(sizes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**sizes)
    with pytest.raises(ConfigError, match="vocab_size >= 1, found 0"):
        TransformerConfig(vocab_size=0)
