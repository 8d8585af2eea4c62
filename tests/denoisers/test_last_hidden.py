"""Hidden states caught at the last layer of a network that somebody else runs."""

import pytest
import torch
from torch import nn

from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.denoisers.last_hidden import LastHidden
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.errors import ConfigError, ShapeError


class Model(nn.Module):
    """As transformers' models are: a configuration, and output embeddings that the logits come from."""

    def __init__(self, kind: str = "bert") -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": kind, "vocab_size": 5, "hidden_size": 8})()
        self.inner = BidirectionalTransformer(5, hidden_size=8, layers=1, heads=2).eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.head

    def forward(self, input_ids: torch.Tensor) -> object:
        return self.inner(input_ids)


@pytest.mark.parametrize("kind", ["bert", "Dream"])
def test_states_are_what_the_last_layer_read(kind: str) -> None:
    model, x = Model(kind), torch.randint(6, (2, 4))
    hidden = model.inner(x).hidden.detach()
    moved = torch.cat((hidden[:, :1], hidden[:, :-1]), 1)
    for given, shift, expected in (
        (model, None, moved if kind == "Dream" else hidden),
        (model, True, moved),
        (model, False, hidden),
        (model.inner.head, None, hidden),
        (PretrainedDenoiser(model, 0, shift=True), None, moved),
        (PretrainedDenoiser(model, 0, shift=True), False, hidden),
    ):
        reader = LastHidden(given, shift)
        model(x[:1])
        logits = model(x).logits  # the latest run counts
        taken = reader.take(2, 4)
        assert torch.equal(taken, expected) and not taken.requires_grad
        reader.close()
        assert torch.equal(model(x).logits, logits)


def test_states_of_a_run_with_guidance_are_those_with_the_prompt() -> None:
    model, x = Model(), torch.randint(6, (2, 4))
    reader = LastHidden(model)
    model(torch.cat((x, torch.full((2, 4), 5))))
    assert torch.allclose(reader.take(2, 4), model.inner(x).hidden, atol=1e-6)


def test_states_are_taken_once_and_the_hook_comes_off() -> None:
    model = Model()
    reader = LastHidden(model)
    with pytest.raises(ConfigError, match="run the model that was given here once before each call"):
        reader.take(1, 3)
    model(torch.zeros(1, 3, dtype=torch.int64))
    reader.take(1, 3)
    with pytest.raises(ConfigError, match="found none"):
        reader.take(1, 3)
    reader.close()
    reader.close()
    model(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="close only at the end"):
        reader.take(1, 3)
    assert not model.inner.head._forward_pre_hooks


def test_states_that_do_not_fit_the_text() -> None:
    model = Model()
    reader = LastHidden(model)
    for rows, sites in ((1, 2), (3, 3), (2, 4)):
        model(torch.zeros(rows, sites, dtype=torch.int64))
        with pytest.raises(ShapeError, match=rf"\(1, 3, hidden\) of the text, found \({rows}, {sites}, 8\)"):
            reader.take(1, 3)
    for unknown in (model.inner, nn.Embedding(2, 2)):
        with pytest.raises(ConfigError, match="pass the linear layer that makes the logits"):
            LastHidden(unknown)
    tied = Model()
    layer = nn.Embedding(6, 8)
    tied.get_output_embeddings = lambda: layer  # type: ignore[method-assign]
    reader = LastHidden(tied)
    layer(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"found \(1, 3\)"):
        reader.take(1, 3)
