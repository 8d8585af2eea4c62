"""Masked models of transformers as denoisers: through the folder that a user has, remote code included."""

import json
import re
from pathlib import Path

import pytest
import torch

from codd_ppl import CouplingLayer, Sampler, topologies
from codd_ppl.denoisers import Denoiser
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[MASK]", "the", "cat", "sat", "on", "mat", "dog", "log"]
VOCAB, MASK, SITES = len(WORDS), 2, 6


def words_of(folder: Path, mask: str | None = "[MASK]") -> None:
    """A tokenizer beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {} if mask is None else {"mask_token": mask}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", **special
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random masked model, as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if request.param == "bert":
        config = transformers.BertConfig(vocab_size=VOCAB, pad_token_id=0, **sizes)
        transformers.BertForMaskedLM(config).save_pretrained(where)
    else:
        ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
        config = transformers.ModernBertConfig(vocab_size=VOCAB, **ends, **sizes)
        transformers.ModernBertForMaskedLM(config).save_pretrained(where)
    words_of(where)
    return where


MODEL = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class ToyConfig(PretrainedConfig):
    model_type = "TYPE"

    def __init__(self, d_model=8, vocab_size=10, mask_token_id=2, **settings):
        super().__init__(**settings)
        self.d_model, self.vocab_size, self.mask_token_id = d_model, vocab_size, mask_token_id


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, ARGUMENTS output_hidden_states=False):
        hidden = self.embedding(input_ids).cumsum(1)
        states = (hidden,) if output_hidden_states else None
        return MaskedLMOutput(logits=self.head(hidden), hidden_states=states)
"""


def remote(where: Path, kind: str, arguments: str = "", auto: str = "AutoModel") -> Path:
    """A folder with a model whose code comes along, as LLaDA's and Dream's do."""
    where.mkdir()
    (where / "modeling_toy.py").write_text(MODEL.replace("TYPE", kind).replace("ARGUMENTS", arguments))
    named = {"AutoConfig": "modeling_toy.ToyConfig", auto: "modeling_toy.ToyModel"}
    config = {"model_type": kind, "auto_map": named, "d_model": 8, "vocab_size": VOCAB, "mask_token_id": MASK}
    (where / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    from safetensors.torch import save_file

    weights = {
        "embedding.weight": torch.randn(VOCAB, 8),
        "head.weight": torch.randn(VOCAB, 8),
        "head.bias": torch.randn(VOCAB),
    }
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return where


def test_logits_and_hidden_states_are_the_model_s(folder: Path) -> None:
    network = PretrainedDenoiser.from_pretrained(folder)
    assert isinstance(network, Denoiser)
    assert (network.vocab_size, network.mask_token_id, network.hidden_size) == (VOCAB, MASK, 16)
    assert network.tokenizer is not None and network.tokenizer.encode("the cat").ids == [3, 4]
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    xt = torch.tensor([[3, 4, MASK, 6, MASK, 7], [MASK] * 6])
    own = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=xt).logits
    output = network(xt)
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(output.logits[..., real], own[..., real])
    assert bool((output.logits[..., MASK] == -torch.inf).all())
    head = network.model.get_output_embeddings()
    torch.testing.assert_close(head(output.hidden)[..., real], own[..., real])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_batch(folder: Path, side: str) -> None:
    """What the model itself says of texts of unequal lengths, given its attention mask."""
    network = PretrainedDenoiser.from_pretrained(folder)
    short, padding = [3, MASK, 5], [0, 0, 0]
    row = padding + short if side == "left" else short + padding
    xt = torch.tensor([[3, 4, MASK, 6, MASK, 7], row])
    seen = (xt != 0).long()
    own = (
        transformers.AutoModelForMaskedLM.from_pretrained(folder)
        .eval()(input_ids=xt, attention_mask=seen)
        .logits
    )
    real = torch.arange(VOCAB) != MASK
    found = network(xt).logits
    torch.testing.assert_close(found[seen == 1][:, real], own[seen == 1][:, real])
    if side == "right":  # positions are the same then
        alone = network(torch.tensor([short])).logits
        torch.testing.assert_close(found[1, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_a_coupling_on_it_writes_text(folder: Path) -> None:
    network = PretrainedDenoiser.from_pretrained(folder)
    coupling = CouplingLayer(topologies.hidden_markov(SITES, VOCAB, 3), VOCAB)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    template = torch.full((4, SITES), MASK)
    template[:, 0] = 3
    tokens = Sampler(network, coupling, steps=3).generate(template, torch.Generator().manual_seed(0)).tokens
    assert bool((tokens[:, 0] == 3).all()) and not bool((tokens == MASK).any())
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_code_that_comes_with_the_model(tmp_path: Path) -> None:
    where = remote(tmp_path / "llada", "llada_toy")
    with pytest.raises(ConfigError, match="read it, then pass trust_remote_code=True"):
        PretrainedDenoiser.from_pretrained(where)
    network = PretrainedDenoiser.from_pretrained(where, trust_remote_code=True)
    assert not network.shift and network.mask_token_id == MASK and network.hidden_size == 8
    assert network.tokenizer is None
    xt = torch.tensor([[3, 4, MASK]])
    output = network(xt)
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(output.logits[..., real], network.model(input_ids=xt).logits[..., real])
    torch.testing.assert_close(output.hidden, network.model.embedding(xt).cumsum(1))  # no head to read from


def test_logits_of_the_next_token_are_moved(tmp_path: Path) -> None:
    where = remote(tmp_path / "dream", "Dream")
    network = PretrainedDenoiser.from_pretrained(where, trust_remote_code=True)
    assert network.shift
    xt = torch.tensor([[3, MASK, 5, MASK]])
    own = network.model(input_ids=xt).logits
    moved = torch.cat((own[:, :1], own[:, :-1]), 1)
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(network(xt).logits[..., real], moved[..., real])
    plain = PretrainedDenoiser.from_pretrained(where, trust_remote_code=True, shift=False)
    torch.testing.assert_close(plain(xt).logits[..., real], own[..., real])


def test_a_model_that_asks_for_a_time(tmp_path: Path) -> None:
    where = remote(tmp_path / "mdlm", "mdlm_toy", "timesteps,", auto="AutoModelForMaskedLM")
    network = PretrainedDenoiser.from_pretrained(where, trust_remote_code=True)
    assert network(torch.tensor([[3, MASK]])).logits.shape == (1, 2, VOCAB)


def test_code_from_the_hub_is_pinned() -> None:
    for revision in (None, "main", "abc123"):
        with pytest.raises(ConfigError, match=re.escape("the full commit (40 hex digits)")):
            PretrainedDenoiser.from_pretrained("owner/name", revision=revision, trust_remote_code=True)


def test_no_mask_no_model_no_width(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    transformers.AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(bare)
    words_of(bare, mask=None)
    with pytest.raises(ConfigError, match="expected mask_token_id in the configuration or the tokenizer"):
        PretrainedDenoiser.from_pretrained(bare)
    assert PretrainedDenoiser.from_pretrained(bare, mask_token_id=5).mask_token_id == 5
    with pytest.raises(ConfigError, match=f"below vocab_size = {VOCAB}, found {VOCAB}"):
        PretrainedDenoiser.from_pretrained(bare, mask_token_id=VOCAB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a masked model of transformers"):
        PretrainedDenoiser.from_pretrained(tmp_path / "empty")

    class Widthless(torch.nn.Module):
        config = transformers.PretrainedConfig()

    with pytest.raises(ConfigError, match="expected a configuration with one of"):
        PretrainedDenoiser(Widthless(), 1)
