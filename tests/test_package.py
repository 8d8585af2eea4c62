"""The package as an installer and an importer see it: names, docstrings, contents, size, import time."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

_spec = importlib.util.find_spec("codd_ppl")
assert _spec is not None and _spec.submodule_search_locations
ROOT = Path(_spec.submodule_search_locations[0])
CHECKOUT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

PUBLIC = {
    "codd_ppl": (
        "FactorGraph topologies compile CouplingLayer CoupledCategorical CoDDModule TextDataModule Sampler"
    ),
    "codd_ppl.inference": "log_partition marginals mode sample entropy log_score",
    "codd_ppl.graphs": "FactorGraph Variable Factor topologies properties",
    "codd_ppl.compiler": "compile ContractionPlan",
    "codd_ppl.distributions": "CoupledCategorical",
}

# Modules that need a package of an extra; what they need may be missing.
EXTRAS = {"codd_ppl.denoisers.pretrained": "transformers", "codd_ppl.evaluation.harness": "lm_eval"}

# Slow to import (lightning brings torchmetrics, which brings matplotlib and, if there, transformers).
HEAVY = ("lightning", "torchmetrics", "matplotlib", "transformers", "datasets", "lm_eval", "sacrebleu")


def load(file: str) -> ModuleType:
    """The module of a file of the package; skips if it is of an extra that is not installed."""
    parts = Path(file).with_suffix("").parts
    name = ".".join(["codd_ppl", *(parts[:-1] if parts[-1] == "__init__" else parts)])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name in EXTRAS and error.name and error.name.split(".")[0] == EXTRAS[name]:
            pytest.skip(f"{name} needs {error.name}")
        raise


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert name in loaded.__all__, f"{module}.__all__ lacks {name}"
        assert getattr(loaded, name) is not None


@pytest.mark.parametrize("file", FILES)
def test_what_a_module_offers_is_documented(file: str) -> None:
    """Every name of ``__all__`` exists once, and every class and function among them says what it is."""
    module = load(file)
    assert module.__doc__, f"{file} has no docstring"
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names)), f"{file}: a name stands twice in __all__"
    for name in names:
        thing = getattr(module, name)
        ours = getattr(thing, "__module__", "").split(".")[0] == "codd_ppl"
        if ours and (inspect.isclass(thing) or inspect.isroutine(thing)):
            doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
            assert doc and doc.strip(), f"{file}: {name} has no docstring"
            # a dataclass without a docstring gets its signature for one
            assert not doc.startswith(f"{name}("), f"{file}: {name} has no docstring"


@pytest.mark.parametrize("file", FILES)
def test_a_module_has_one_noun(file: str) -> None:
    """At most 400 lines (60 to 250 is the aim), an explicit ``__all__``, and no stub behind a public name."""
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count("\n") <= 400, f"{file}: {source.count(chr(10))} lines; split it"
    tree = ast.parse(source)
    public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_"]
    if public:
        assigned = [
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        ]
        assert "__all__" in assigned, f"{file}: list the public names in __all__"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any(
            "abstract" in ast.unparse(d) for d in node.decorator_list
        ):
            body = [
                s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ]
            stub = (
                len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplemented" in ast.unparse(body[0])
            )
            assert not stub, f"{file}:{node.lineno}: {node.name} is a stub"


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("__init__.py")])
def test_an_init_is_a_list_of_names(file: str) -> None:
    """No logic in ``__init__.py``. The root alone may have a ``__getattr__``, for names that load late."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in tree.body:
        fine = isinstance(node, ast.Import | ast.ImportFrom)
        fine |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        fine |= isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
        fine |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        fine |= file == "__init__.py" and isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        assert fine, f"{file}:{node.lineno}: {ast.unparse(node)[:60]}"
    if len(tree.body) > 1:
        assert "__all__" in ast.unparse(tree), f"{file}: list the public names in __all__"


def test_import_is_light() -> None:
    """``import codd_ppl`` brings torch and Pyro, and nothing else that is slow to import.

    Lightning alone takes longer than all the rest (3 s against 1 s, with transformers installed), and
    graphs, inference, couplings and the sampler never need it. So the root loads the two names of
    ``codd_ppl.training`` on first use (a module ``__getattr__``, PEP 562), and what is drawn or compared
    with an optional package imports it inside the function (tests/test_layers.py holds that rule).
    """
    code = f"import sys, codd_ppl; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def distribution() -> importlib.metadata.Distribution:
    """What pip knows of codd-ppl; skips if the tests run on the checkout itself."""
    if ROOT == CHECKOUT / "codd_ppl":
        pytest.skip("codd_ppl is imported from the checkout, not from an installed wheel")
    return importlib.metadata.distribution("codd-ppl")


def test_wheel_holds_one_package() -> None:
    """No ``models``, no ``tests``: the wheel installs codd_ppl, its metadata and the command ``codd``."""
    dist = distribution()
    tops = {file.parts[0] for file in dist.files or () if ".." not in file.parts}
    assert tops == {"codd_ppl", f"codd_ppl-{dist.version}.dist-info"}
    assert [(e.name, e.value) for e in dist.entry_points] == [("codd", "codd_ppl.cli:main")]


def test_wheel_lacks_nothing() -> None:
    """Every file of the package's folder in the checkout is installed: data files and py.typed included."""
    distribution()
    if not (CHECKOUT / "codd_ppl").is_dir():
        pytest.skip("the tests run without a checkout")

    def contents(root: Path) -> set[str]:
        files = (p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {p.relative_to(root).as_posix() for p in files}

    assert contents(ROOT) == contents(CHECKOUT / "codd_ppl")
    assert {"py.typed", "inference/native.c"} <= contents(ROOT)
