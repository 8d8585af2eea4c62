"""Other libraries as candidates. Each is optional: one that is not installed is listed with that reason.

What a library wants laid out differently (evidence folded into edges, an HMM object) is made before the clock runs.
Calls that would take more than ten seconds or too much memory are predicted from measured rates and not made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codd_ppl.evaluation.benchmark.cases import Case, Inputs
from codd_ppl.evaluation.benchmark.rounds import Candidate
from codd_ppl.inference.chain import torch_struct_crf

__all__ = ["PEERS", "peer_candidates", "versions"]

PEERS = {
    "torch-struct": "torch_struct",
    "dynamax": "dynamax",
    "pytorch-crf": "torchcrf",
    "pomegranate": "pomegranate",
}
"""Column of the table -> module that must be importable."""

LONGEST = 10.0
"""Seconds that a single call may take, as predicted."""

# Seconds per (batch element, site, cell), cells being states^3 or states^2: measured on one core, rounded up.
RATES = {
    "torch-struct": {
        "log_partition": 1.2e-8,
        "gradient": 3e-8,
        "marginals": 3e-8,
        "mode": 1.2e-8,
        "sample": 7e-7,
    },
    "pytorch-crf": {"log_partition": 4e-9, "gradient": 1.2e-8, "mode": 6e-9},
    "pomegranate": {"log_partition": 1e-9, "marginals": 2.5e-8, "mode": 6e-9},
    "dynamax": {"log_partition": 1e-9, "marginals": 6e-9, "mode": 6e-9, "sample": 2e-9},
}


COPIES = {("pytorch-crf", "gradient"): 3, ("pomegranate", "marginals"): 3}
"""Tables of (batch, sites, states, states) that a call holds at once."""

MOST = 4 << 30
"""Bytes that they may take."""


def versions() -> dict[str, str]:
    """Version of each peer, or "not installed"; jax with dynamax."""
    found = {}
    for name in [*PEERS, "jax"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def peer_candidates(query: str, inputs: Inputs, threads: int = 1) -> list[Candidate]:
    """Every peer that knows the query, with its call or the reason why there is none."""
    builders = {
        "torch-struct": _torch_struct,
        "dynamax": _dynamax,
        "pytorch-crf": _crf,
        "pomegranate": _pomegranate,
    }
    found = []
    before = torch.get_num_threads()
    for name, module in PEERS.items():
        if query not in RATES[name] or (inputs.unary is None and name in ("pytorch-crf", "pomegranate")):
            continue
        reason = _obstacle(name, query, inputs.case)
        if importlib.util.find_spec(module) is None:
            reason = "not installed"
        if reason:
            found.append(Candidate(name, "peer", reason=reason))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name == "dynamax":
                    call, read = _dynamax(query, inputs, threads)
                else:
                    call, read = builders[name](query, inputs)  # type: ignore[operator]
        except (
            Exception
        ) as error:  # whatever another library raises is a line of the table, not the end of it
            found.append(Candidate(name, "peer", reason=f"{type(error).__name__}: {str(error)[:100]}"))
            continue
        finally:
            torch.set_num_threads(before)  # pomegranate changes it when it is imported
        found.append(Candidate(name, "peer", call, read=read))
    return found


def _obstacle(name: str, query: str, case: Case) -> str:
    """Why a call is not made, or an empty string."""
    power = 3 if name == "torch-struct" else 2
    cells = case.batch * case.sites * case.states**power
    if name == "torch-struct" and case.states >= 128:
        return f"needs {cells * 4 / 2**30:.0f} GiB or more: O(sites states^3)"
    if (name, query) in COPIES and COPIES[name, query] * cells * 4 > MOST:
        return f"needs {COPIES[name, query] * cells * 4 / 2**30:.0f} GiB"
    seconds = RATES[name][query] * cells
    return f"predicted {seconds:.0f} s a call" if seconds > LONGEST else ""


Built = tuple[Callable[[], Any], Callable[[Any], Tensor]]


def _same(result: Any) -> Tensor:
    return torch.as_tensor(result)


def _torch_struct(query: str, inputs: Inputs) -> Built:
    edges = inputs.edges.mT.contiguous()  # theirs is [next, previous]

    def first(m: Tensor) -> Tensor:
        m = m.detach().mT
        return torch.cat((m[:, :1].sum(-1), m.sum(-2)), 1)

    def path(m: Tensor) -> Tensor:
        return first(m).argmax(-1)

    if query == "log_partition":
        return lambda: torch_struct_crf(edges.clone()).partition, lambda z: z.detach()
    if query in ("gradient", "marginals"):  # its marginals are the gradient of its partition, by autograd
        edge = inputs.unary is None and query == "gradient"
        return lambda: torch_struct_crf(edges.clone()).marginals, (lambda m: m.detach().mT) if edge else first
    if query == "mode":
        return lambda: torch_struct_crf(edges.clone()).argmax, path
    return lambda: torch_struct_crf(edges.clone()).sample((1,)), _same


def _crf(query: str, inputs: Inputs) -> Built:
    from torchcrf import CRF

    assert inputs.unary is not None
    crf = CRF(inputs.case.states, batch_first=True)
    with torch.no_grad():
        crf.transitions.copy_(inputs.table)
        crf.start_transitions.zero_()
        crf.end_transitions.zero_()
    rows = inputs.unary.transpose(0, 1).contiguous()
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    if query == "mode":
        return lambda: crf.decode(inputs.unary, mask.T), _same
    if query == "log_partition":

        def normalizer() -> Tensor:
            with torch.no_grad():
                return crf._compute_normalizer(rows, mask)

        return normalizer, _same
    leaf = rows.clone().requires_grad_()

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(crf._compute_normalizer(leaf, mask).sum(), [leaf, crf.transitions])

    return gradient, lambda g: g[0].transpose(0, 1)


def _pomegranate(query: str, inputs: Inputs) -> Built:
    from pomegranate.distributions import Categorical
    from pomegranate.hmm import DenseHMM

    C = inputs.case.states
    nodes = [Categorical([[0.5, 0.5]]) for _ in range(C)]
    even = torch.full((C,), 1.0 / C)
    model = DenseHMM(nodes, edges=inputs.table.exp(), starts=even, ends=even)
    with (
        torch.no_grad()
    ):  # it takes probabilities; its own attributes are logs, and its methods don't normalise
        model.edges.copy_(inputs.table)
        model.starts.zero_()
        model.ends.zero_()
    unary = inputs.unary

    if query == "log_partition":

        def total() -> Tensor:
            with torch.no_grad():
                return model.forward(emissions=unary)[:, -1].logsumexp(-1)

        return total, _same
    if query == "mode":
        return lambda: model.viterbi(emissions=unary), lambda p: p.long()

    def smooth() -> Any:
        with torch.no_grad():
            return model.forward_backward(emissions=unary)

    return smooth, lambda found: found[1].exp()


def _dynamax(query: str, inputs: Inputs, threads: int) -> Built:
    if threads == 1:  # read when jax starts
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
        os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import inference as hmm

    case = inputs.case
    table = jnp.asarray(inputs.table.numpy())
    shared = inputs.unary is not None
    ones = jnp.ones(case.states)
    if inputs.unary is None:
        unary = jnp.zeros((case.batch, case.sites, case.states))
    else:
        unary = jnp.asarray(inputs.unary.numpy())
    one: Callable[..., Any]
    if query == "sample":
        keys = jax.random.split(jax.random.PRNGKey(0), case.batch)

        def one(key: Any, u: Any, t: Any) -> Any:
            return hmm.hmm_posterior_sample(key, ones, jnp.exp(t), u)[1]

        function = jax.jit(jax.vmap(one, in_axes=(0, 0, None if shared else 0)))
        return lambda: jax.block_until_ready(function(keys, unary, table)), _from_jax

    def filtered(u: Any, t: Any) -> Any:
        return hmm.hmm_filter(ones, jnp.exp(t), u).marginal_loglik

    def smoothed(u: Any, t: Any) -> Any:
        found = hmm.hmm_smoother(ones, jnp.exp(t), u)
        return found.smoothed_probs, found.trans_probs

    def best(u: Any, t: Any) -> Any:
        return hmm.hmm_posterior_mode(ones, jnp.exp(t), u)

    one = {"log_partition": filtered, "marginals": smoothed, "mode": best}[query]
    function = jax.jit(jax.vmap(one, in_axes=(0, None if shared else 0)))
    read = (lambda found: _from_jax(found[0])) if query == "marginals" else _from_jax
    return lambda: jax.block_until_ready(function(unary, table)), read


def _from_jax(result: Any) -> Tensor:
    import numpy as np

    found = torch.from_numpy(np.array(result))
    return found if found.is_floating_point() else found.long()
