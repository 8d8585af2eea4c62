"""Hidden Markov models of PyJuice as couplings, such as those of the CoDD article.

Checked against PyJuice 2.6.3 and 2.4.1 on a machine without a GPU, with circuits of 3 to 16 states that they built,
trained and saved: log-likelihoods of their own kernels, run by triton's interpreter, and ours differ by less than 1e-5
(block sizes 1 to 16, sparse edges, after steps of EM, all three input distributions); so does log p(x_M | x_K) with
evidence. Not checked: kernels on a GPU, and the authors' own checkpoints, which couldn't be had; their code names
PyJuice 2.4.1 and an argument of ``ExternProductCategorical``.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch

from codd_ppl.convert.circuit import HiddenMarkovTables, hidden_markov_tables
from codd_ppl.convert.jpc_file import read_jpc
from codd_ppl.coupling import CouplingLayer
from codd_ppl.errors import ConfigError
from codd_ppl.graphs.topologies import hidden_markov
from codd_ppl.potentials import LatentPotentials

__all__ = ["hidden_markov_coupling", "hidden_markov_from_pyjuice", "read_hidden_markov"]


def hidden_markov_from_pyjuice(
    path_or_circuit: str | os.PathLike[str] | Any,
    sites: int | None = None,
    combine: Literal["projected", "product"] = "projected",
    candidates: int | None = None,
    trust_pickle: bool = False,
) -> CouplingLayer:
    """A coupling from a tied hidden Markov model of PyJuice.

    ``combine="product"`` is the law of the article's code (arXiv:2603.00045, github.com/liuanji/CoDD: PyJuice with
    ``extern_product_categorical_mode="unnormalized_ll"``), which also sharpens the logits and leaves the circuit out
    while many tokens are masked. Where evidence is normalised state by state (``SoftEvidenceCategorical``, or
    ``"normalized_ll"``), PyJuice's law is another one, which isn't made here: the prior alone is taken.

    Args:
        path_or_circuit: a .jpc file, which is read without PyJuice and without running anything in it; or a circuit in
            memory, compiled or not, which needs PyJuice.
        sites: tokens of the coupling; a tied chain has any length. None: the circuit's.
        combine, candidates: of :class:`codd_ppl.CouplingLayer`.
        trust_pickle: load the file with PyJuice instead. A .jpc is a pickle, and **loading a pickle runs the code in
            it**: only for a file that can't be read otherwise, by somebody whom you trust.

    Returns:
        In eval mode; tables have the probabilities of the circuit, 0 as -inf.

    Raises:
        DataError: a file that can't be read, or a circuit of another kind; what was found is said.
        ConfigError: PyJuice is needed and isn't installed, too large a table, or a chain of one site to be extended.
    """
    return hidden_markov_coupling(
        read_hidden_markov(path_or_circuit, trust_pickle), sites, combine, candidates
    )


def read_hidden_markov(
    path_or_circuit: str | os.PathLike[str] | Any, trust_pickle: bool = False
) -> HiddenMarkovTables:
    """The tables alone; see :func:`hidden_markov_from_pyjuice`."""
    if not isinstance(path_or_circuit, str | os.PathLike):
        from codd_ppl.convert.pyjuice_library import nodes_in_memory

        return hidden_markov_tables(nodes_in_memory(path_or_circuit))
    if trust_pickle:
        from codd_ppl.convert.pyjuice_library import load_trusted

        return hidden_markov_tables(load_trusted(path_or_circuit))
    return hidden_markov_tables(read_jpc(path_or_circuit))


def hidden_markov_coupling(
    tables: HiddenMarkovTables,
    sites: int | None = None,
    combine: Literal["projected", "product"] = "projected",
    candidates: int | None = None,
) -> CouplingLayer:
    """A coupling with these tables; see :func:`hidden_markov_from_pyjuice`."""
    sites = tables.sites if sites is None else sites
    states, vocab = tables.emission.shape
    if sites > 1 and tables.transition is None:
        raise ConfigError(f"sites: expected 1, as the circuit has no transitions, found {sites}")
    graph = hidden_markov(sites, vocab, states)
    potentials = LatentPotentials(graph)
    logs = {"initial": _log(tables.initial), "emission": _log(tables.emission)}
    if tables.transition is not None:
        logs["transition"] = _log(tables.transition)
    potentials.start_from(logs)
    layer = CouplingLayer(graph, vocab, combine=combine, potentials=potentials, candidates=candidates)
    return layer.eval()


def _log(table: np.ndarray) -> torch.Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(table, dtype=np.result_type(table, np.float32)))
