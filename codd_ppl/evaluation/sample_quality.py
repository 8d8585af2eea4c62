"""Samples under an independent judge, with the statistics that show when it is fooled, and the time they took.

Generative perplexity alone can be lowered by writing dull text. So each row has the entropy, the share of different
n-grams and the repetition beside it, held-out text is judged as well, and the independent tokens get as many steps as
fit into the coupled model's time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.metrics import distinct_n, repetition, token_entropy
from codd_ppl.evaluation.timing import wait_for
from codd_ppl.graphs import topologies
from codd_ppl.sampling import Coupling, Draw, Sampler, UnmaskingPolicy
from codd_ppl.typing import Float, Int, Tensor

__all__ = [
    "FORMAT",
    "SAMPLES",
    "Judge",
    "SampleQuality",
    "judge_samplers",
    "judge_text",
    "quality_table",
    "read_samples",
    "samples_record",
    "samples_rows",
]

FORMAT = "codd_ppl samples 1"
SAMPLES = "samples.json"
"""Where the card of a model looks for them."""


@runtime_checkable
class Judge(Protocol):
    """Such as :class:`codd_ppl.judge.CausalJudge` or :class:`codd_ppl.evaluation.NGramModel`."""

    def token_log_prob(self, tokens: Int[Tensor, "batch sites"]) -> Float[Tensor, "batch sites"]:
        """log P(x_i | the tokens before it), nats."""


@dataclass(frozen=True)
class SampleQuality:
    """What a set of sequences looks like.

    Attributes:
        name: "held-out text", "factorised", "coupled", or "factorised, in the time of coupled".
        steps: reverse steps; None for text.
        samples: how many.
        judge_bits, judge_error: mean of the judge's -log2 P per token, and its standard error over the sequences.
        entropy: mean of the unigram entropy of a sequence, bits.
        distinct: different n-grams over all, as a share.
        repetition: mean share of the n-grams of a sequence that occurred in it before.
        n: length of the n-grams.
        seconds: per sample.
    """

    name: str
    steps: int | None
    samples: int
    judge_bits: float
    judge_error: float
    entropy: float
    distinct: float
    repetition: float
    n: int
    seconds: float | None = None


def judge_text(
    tokens: Int[Tensor, "samples sites"],
    judge: Judge,
    n: int = 4,
    name: str = "held-out text",
    steps: int | None = None,
    seconds: float | None = None,
) -> SampleQuality:
    """Statistics of sequences, and what a judge says of them.

    Raises:
        ConfigError: fewer than two sequences.
        ShapeError, TokenError: sequences that are too short for n, or ids that the judge doesn't know.
    """
    if len(tokens) < 2:
        raise ConfigError(f"samples: expected at least 2 to say how exact a mean is, found {len(tokens)}")
    bits = -judge.token_log_prob(tokens).double().mean(-1) / math.log(2)
    return SampleQuality(
        name=name,
        steps=steps,
        samples=len(tokens),
        judge_bits=float(bits.mean()),
        judge_error=float(bits.std() / math.sqrt(len(bits))),
        entropy=float(token_entropy(tokens).mean()),
        distinct=distinct_n(tokens, n),
        repetition=float(repetition(tokens, n).mean()),
        n=n,
        seconds=seconds,
    )


def judge_samplers(
    denoiser: Denoiser,
    coupling: Coupling,
    judge: Judge,
    steps: Sequence[int] = (4, 8),
    samples: int = 1000,
    batch_size: int = 50,
    unmasking: str | UnmaskingPolicy = "random",
    drawing: str | Draw = "joint",
    n: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> list[SampleQuality]:
    """For each number of steps: independent tokens, the coupling, and independent tokens with as many steps as took as
    long as the coupled ones.

    All are generated from nothing, batch by batch in turn, so that whatever else the machine does falls on all alike.

    Args:
        denoiser, coupling: the model.
        judge: of its vocabulary.
        steps: numbers of reverse steps.
        samples, batch_size: sequences, in all and at a time.
        unmasking, drawing: as the sampler's, for all rows.
        n: length of the n-grams.
        seed: of the draws.
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: numbers below 1, fewer than two samples, or vocabularies that differ.
    """
    if not steps or min(*steps, batch_size, n) < 1 or samples < 2:
        raise ConfigError(
            f"expected steps, batch_size and n of at least 1 and 2 samples, found {list(steps)}, {batch_size}, {n} and "
            f"{samples}"
        )
    device, sites = device_of(denoiser, default=torch.device("cpu")), coupling.sites
    alone = CouplingLayer(topologies.independent(sites, coupling.vocab_size), coupling.vocab_size).to(device)
    found = []
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        for T in steps:
            pair: dict[str, Sampler] = {
                "factorised": Sampler(denoiser, alone, unmasking, T, drawing=drawing),
                "coupled": Sampler(denoiser, coupling, unmasking, T, drawing=drawing),
            }
            drawn, seconds = _draw(pair, sites, samples, batch_size, seed, device, bar)
            same = max(T, round(T * seconds["coupled"] / seconds["factorised"]))
            name = "factorised, in the time of coupled"
            more = {name: Sampler(denoiser, alone, unmasking, same, drawing=drawing)}
            others, times = _draw(more, sites, samples, batch_size, seed, device, bar)
            found += [judge_text(drawn[key], judge, n, key, T, seconds[key] / samples) for key in pair]
            found.append(judge_text(others[name], judge, n, name, same, times[name] / samples))
    return found


def _draw(
    samplers: Mapping[str, Sampler],
    sites: int,
    samples: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    bar: Progress,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sequences of each sampler, on the CPU, and the seconds that all took; a first, small batch isn't counted."""
    parts: dict[str, list[Tensor]] = {name: [] for name in samplers}
    seconds = dict.fromkeys(samplers, 0.0)
    task = bar.add_task(", ".join(samplers), total=samples)
    for start in (-1, *range(0, samples, batch_size)):
        count = 1 if start < 0 else min(batch_size, samples - start)
        for name, sampler in samplers.items():
            template = torch.full((count, sites), sampler.denoiser.mask_token_id, device=device)
            generator = torch.Generator(device).manual_seed(seed + start + 1)
            wait_for(device)
            begin = time.perf_counter()
            tokens = sampler.generate(template, generator).tokens
            wait_for(device)
            if start >= 0:
                seconds[name] += time.perf_counter() - begin
                parts[name].append(tokens.cpu())
        bar.advance(task, 0 if start < 0 else count)
    bar.remove_task(task)
    return {name: torch.cat(found) for name, found in parts.items()}, seconds


def samples_rows(rows: Sequence[SampleQuality]) -> list[list[str]]:
    """Cells for a table, the head first."""
    n = rows[0].n if rows else "n"
    head = ["samples", "T", "judge, bits", "entropy, bits", f"distinct-{n}", f"repetition-{n}", "ms a sample"]
    cells = [
        [
            row.name,
            "" if row.steps is None else str(row.steps),
            f"{row.judge_bits:.3f} ± {row.judge_error:.3f}",
            f"{row.entropy:.3f}",
            f"{row.distinct:.3f}",
            f"{row.repetition:.3f}",
            "" if row.seconds is None else f"{1000 * row.seconds:.1f}",
        ]
        for row in rows
    ]
    return [head, *cells]


def quality_table(rows: Sequence[SampleQuality]) -> Table:
    """For the terminal."""
    head, *body = samples_rows(rows)
    table = Table(title="samples under the judge")
    for k, name in enumerate(head):
        table.add_column(name, justify="right" if k else "left")
    for cells in body:
        table.add_row(*cells)
    return table


def samples_record(rows: Sequence[SampleQuality], **about: Any) -> str:
    """As JSON, with notes such as the command, the date and the device."""
    return json.dumps({"format": FORMAT, **about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def read_samples(folder: Path) -> tuple[dict[str, Any], list[SampleQuality]] | None:
    """Notes and rows of FOLDER/samples.json; None if there is none.

    Raises:
        DataError: a damaged one.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("format") != FORMAT:
            raise ValueError("another format")
        rows = [SampleQuality(**row) for row in record.pop("rows")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected a record of `codd judge --output` ({FORMAT}), found {error}; write it again"
        ) from error
    return record, rows
