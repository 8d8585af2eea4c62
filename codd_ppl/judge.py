"""An autoregressive language model that judges samples: generative perplexity, under a model of the same text.

A network of the ``transformers`` library, which the extra ``hf`` installs; trained by ``codd fit`` with
:class:`codd_ppl.training.JudgeModule`, and kept in a folder that ``transformers`` reads as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from codd_ppl.denoisers.pretrained import quiet_transformers, transformers_library
from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.folders import whole_folder
from codd_ppl.typing import Float, Int

__all__ = ["CausalJudge"]

FORMAT = "codd_ppl judge 1"
JUDGE = "judge.json"
"""The file by which a judge's folder is known."""


class CausalJudge(nn.Module):
    """log P(x_i | x_1 .. x_{i-1}) of a causal transformer, with Llama's layers (Touvron et al. 2023, arXiv:2302.13971).

    The first token is predicted from a token of its own for the beginning, so that blocks which were cut anywhere, as
    those of training and the samples are, are judged from their first token on.

    Args:
        vocab_size: of the tokenizer.
        hidden_size, layers, heads: of the network; the layers between are 8/3 as wide.
        length: longest sequence.

    Attributes:
        tokenizer: of the text that it was trained on, if it was read from a folder that has one.
        about: notes of the writer.

    Raises:
        ConfigError: sizes that don't go together, or the library ``transformers`` is missing.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int = 256, layers: int = 6, heads: int = 8, length: int = 1024
    ) -> None:
        super().__init__()
        if min(vocab_size, hidden_size, layers, heads, length) < 1 or hidden_size % (2 * heads):
            raise ConfigError(
                f"expected sizes of at least 1 and hidden_size a multiple of 2 * heads, found vocab_size={vocab_size}, "
                f"hidden_size={hidden_size}, layers={layers}, heads={heads}, length={length}"
            )
        llama = transformers_library()
        self.model: Any = llama.LlamaForCausalLM(
            llama.LlamaConfig(
                vocab_size=vocab_size + 1,
                hidden_size=hidden_size,
                intermediate_size=hidden_size * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=length + 1,
                bos_token_id=vocab_size,
                eos_token_id=None,
                pad_token_id=None,
                use_cache=False,
            )
        )
        self.tokenizer: Tokenizer | None = None
        self.about: dict[str, Any] = {}

    @property
    def vocab_size(self) -> int:
        """Without the token for the beginning."""
        return int(self.model.config.vocab_size) - 1

    def forward(self, tokens: Int[Tensor, "batch sites"]) -> Float[Tensor, "batch sites"]:
        """log P(x_i | the tokens before it), nats.

        Raises:
            ShapeError, TokenError: not int64 (batch, sites), or ids outside the vocabulary.
        """
        if tokens.dtype != torch.int64 or tokens.dim() != 2:
            raise ShapeError(
                f"tokens: expected int64 (batch, sites), found {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise TokenError(
                f"tokens: expected ids in 0..{self.vocab_size - 1}, found {int(tokens.min())}..{int(tokens.max())}; "
                "encode the text with the tokenizer of the judge, and write all masked sites first"
            )
        first = tokens.new_full((len(tokens), 1), self.vocab_size)
        logits = self.model(input_ids=torch.cat([first, tokens[:, :-1]], 1)).logits[..., : self.vocab_size]
        return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    @torch.no_grad()
    def token_log_prob(
        self, tokens: Int[Tensor, "batch sites"], batch_size: int = 64
    ) -> Float[Tensor, "batch sites"]:
        """The same without a graph, so many sequences at a time, of tokens on any device; the result is on theirs."""
        device = self.model.device
        parts = [self(part.to(device)).to(tokens.device) for part in tokens.split(batch_size)]
        return torch.cat(parts) if len(tokens) else tokens.float()

    def save(
        self,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer | None = None,
        about: dict[str, Any] | None = None,
    ) -> Path:
        """Write a folder; one that holds a judge already is replaced as a whole.

        Raises:
            ConfigError: something else is there.
        """
        path = Path(path)
        with whole_folder(path, JUDGE) as draft:
            with quiet_transformers():
                self.model.save_pretrained(draft)
            (draft / JUDGE).write_text(
                json.dumps({"format": FORMAT, "about": about or self.about}, indent=1), encoding="utf-8"
            )
            if tokenizer is not None:
                tokenizer.save(str(draft / "tokenizer.json"))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CausalJudge:
        """Read a folder, in eval mode.

        Raises:
            DataError: no judge's folder, or a damaged one.
            ConfigError: the library ``transformers`` is missing.
        """
        path = Path(path)
        try:
            notes = json.loads((path / JUDGE).read_text(encoding="utf-8"))
            if notes.get("format") != FORMAT:
                raise ValueError(f"format {notes.get('format')!r}")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: expected the folder of a judge, with judge.json of the format {FORMAT!r} ({error}); train "
                "one with `codd fit --config models/text8/judge.yaml`"
            ) from error
        judge = cls.__new__(cls)
        nn.Module.__init__(judge)
        try:
            with quiet_transformers() as llama:
                judge.model = llama.LlamaForCausalLM.from_pretrained(path)
            file = path / "tokenizer.json"
            judge.tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        except ConfigError:
            raise
        except Exception as error:  # the libraries raise many kinds
            raise DataError(f"{path}: the judge can't be read ({error}); train it again") from error
        judge.about = dict(notes.get("about") or {})
        return judge.eval()
