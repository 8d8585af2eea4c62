"""What all tests share: fixed seeds, one thread, no display, no network, and shapes that are checked.

Which package is tested: pytest runs in importlib mode (pyproject.toml), which puts no folder of the
checkout on ``sys.path``. So plain ``pytest`` tests the *installed* codd_ppl, and a file that is missing
from the wheel fails here. To test the checkout itself, without installing: ``PYTHONPATH=$PWD pytest``.
The header of the report says which one it is. For the same reason a test can't import from another
test file: what tests share is a fixture of this file, or belongs to ``codd_ppl.testing``.

Shapes: every annotated function of codd_ppl is checked against its jaxtyping shapes while the tests
run (``CODD_CHECK_SHAPES=0`` turns it off). See :func:`check_after_call`.
"""

import importlib.util
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib; subprocesses inherit these
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyro
import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # tests are small: handing work to a second thread costs more than it gains


def check_after_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, except that arguments are checked when the call has returned.

    jaxtyping asks its type checker to wrap two functions for every function of the package: one with the
    parameters only, called before the call, and one with the parameters and the return value, called
    after it. The first stays unchecked here. A call with wrong shapes meets the library's own named error
    first, as it does for a user (and tests can ask for that error); a call that *accepts* shapes which
    contradict its annotations, or returns such, fails the test.
    """
    if function.__annotations__.get("return", Any) is Any:
        return function
    from beartype import BeartypeConf, beartype

    with warnings.catch_warnings():
        # Pyro's distributions inherit from typing.Callable, so beartype meets it in every hint that is one of ours.
        warnings.filterwarnings("ignore", ".*PEP 484 type hint typing.Callable", DeprecationWarning)
        return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def _install_shape_checks() -> str:
    if os.environ.get("CODD_CHECK_SHAPES", "1") == "0":
        return "not checked (CODD_CHECK_SHAPES=0)"
    if importlib.util.find_spec("beartype") is None:
        return "not checked (beartype is not installed)"
    if "codd_ppl" in sys.modules:
        return "not checked (a plugin imported codd_ppl before conftest.py)"
    from jaxtyping import install_import_hook

    module = types.ModuleType("codd_shape_checks")  # the hook wants a name that it can import
    module.check_after_call = check_after_call  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    install_import_hook("codd_ppl", f"{module.__name__}.{check_after_call.__name__}")
    return "checked"


SHAPES = _install_shape_checks()


def pytest_report_header() -> list[str]:
    """Which package, which torch, and whether shapes are checked."""
    spec = importlib.util.find_spec("codd_ppl")
    return [
        f"codd_ppl: {spec.origin if spec else 'not found: pip install it, or PYTHONPATH=$PWD pytest'}",
        f"torch: {torch.__version__}, {torch.get_num_threads()} thread(s); shapes: {SHAPES}",
    ]


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The same random numbers in every test, whatever ran before; leaves torch's defaults as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    pyro.clear_param_store()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    assert after == (dtype, grad), "the test, or what it called, changed torch's defaults and left them so"


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator for the calls that take ``generator=``."""
    return torch.Generator().manual_seed(0)
