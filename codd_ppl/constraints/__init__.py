"""Hard constraints on the text, exactly: an automaton multiplied into the coupling.

coupled = constraints.constrain(coupling, constraints.regex("[0-9]{4}-[0-9]{2}"), tokenizer)
Sampler(denoiser, coupled, steps=2).generate(template)
"""

from codd_ppl.constraints.coupling import ConstrainedCoupling, constrain
from codd_ppl.constraints.language import Constraint, contains, forbids, length, one_of, regex
from codd_ppl.constraints.law import ConstrainedCategorical
from codd_ppl.constraints.token_strings import token_bytes

__all__ = [
    "ConstrainedCategorical",
    "ConstrainedCoupling",
    "Constraint",
    "constrain",
    "contains",
    "forbids",
    "length",
    "one_of",
    "regex",
    "token_bytes",
]
