"""Couplings from the files of other libraries."""

from codd_ppl.convert.circuit import HiddenMarkovTables, hidden_markov_tables
from codd_ppl.convert.hidden_markov import (
    hidden_markov_coupling,
    hidden_markov_from_pyjuice,
    read_hidden_markov,
)
from codd_ppl.convert.jpc_file import CircuitNodes, read_jpc

__all__ = [
    "CircuitNodes",
    "HiddenMarkovTables",
    "hidden_markov_coupling",
    "hidden_markov_from_pyjuice",
    "hidden_markov_tables",
    "read_hidden_markov",
    "read_jpc",
]
