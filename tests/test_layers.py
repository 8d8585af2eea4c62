"""The order of the house (docs: CONTRIBUTING.md), read off the import statements.

The package is not imported here, only parsed. ``violations(root)`` returns one line for each import that
breaks a rule; the second half of this file gives it small packages that break each rule, so that a rule
which no longer bites is noticed.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "codd_ppl"

# A module imports only from units of a smaller number, or from its own unit.
LAYERS = {
    "typing": 0, "errors": 0, "data": 0,
    "graphs": 1, "folders": 1,
    "compiler": 2,
    "inference": 3, "fingerprint": 3,
    "potentials": 4,
    "distributions": 5, "coupling_files": 5,
    "coupling": 6,
    "spanning_tree_coupling": 7, "constraints": 7, "convert": 7, "diffusion": 7, "denoisers": 7,
    "model_folder": 8,
    "judge": 9, "sampling": 9,
    "training": 10, "evaluation": 10,
    "attach": 11, "demo": 11, "teaching": 11, "testing": 11,
    "commands": 12,
    "cli": 13, "__main__": 14,
}  # fmt: skip
TOP = 11  # from here on, `from codd_ppl import ...` is fine: these are users of the library

FORBIDDEN = {("evaluation", "training")}  # although the order would allow it

# Third-party packages that one file alone may import ...
SEAMS = {
    "torch_struct": "inference/chain.py",
    "transformers": "denoisers/pretrained.py",
    "lm_eval": "evaluation/harness.py",
    "interegular": "constraints/patterns.py",
    "pyjuice": "convert/pyjuice_library.py",
}
# ... or some units alone ...
UNITS = {"lightning": {"training", "attach", "cli", "demo"}, "pytorch_lightning": set[str]()}
# ... and units that may import nothing else (beside the standard library and codd_ppl).
ONLY = {"graphs": {"networkx", "matplotlib"}}

# Not needed for a core install: inside functions only. The seam of an optional package may import it at
# the top; then nothing else may import that file at the top.
OPTIONAL = {"transformers", "datasets", "huggingface_hub", "lm_eval", "pyjuice", "sacrebleu"}
OPTIONAL |= {"jax", "dynamax", "torchcrf", "pomegranate"}  # peers of the benchmark
# Slow to import: inside functions only, but for units that `import codd_ppl` does not load.
SLOW = {"matplotlib", "torchmetrics"}
LOADED_LATE = {"training", "evaluation", "attach", "demo", "commands", "cli", "teaching", "testing"}


@dataclass(frozen=True)
class Imported:
    """One name of one import statement: ``from module import name``, or ``import module`` (name None)."""

    line: int
    module: str
    name: str | None
    lazy: bool  # inside a function, or under ``if TYPE_CHECKING``


def imports(path: Path, package: str) -> Iterator[Imported]:
    """All imports of a file, relative ones resolved against its ``package``."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Imported]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(node.lineno, alias.name, None, lazy)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                yield Imported(node.lineno, module, alias.name, lazy)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if (
                called in ("import_module", "__import__")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                yield Imported(node.lineno, str(node.args[0].value), None, lazy)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
            return
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def is_protocol(root: Path, module: str, name: str, depth: int = 3) -> bool:
    """Whether ``name`` is a ``typing.Protocol`` class of ``module``, which may import it from elsewhere."""
    path = root.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if depth == 0 or not file.is_file():
        return False
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return any("Protocol" in ast.unparse(base) for base in node.bases)
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return is_protocol(root, node.module, name, depth - 1)
    return False


def target_unit(root: Path, found: Imported) -> str | None:
    """The unit that an import of the package reaches; None for the package itself (its public names)."""
    parts = found.module.split(".")
    if len(parts) > 1:
        return parts[1]
    if found.name and ((root / found.name).is_dir() or (root / f"{found.name}.py").is_file()):
        return found.name
    return None


def violations(root: Path) -> list[str]:
    """One line for each import below ``root`` (the folder of the package) that breaks a rule."""
    out: list[str] = []
    heavy: set[str] = set()  # modules that import an optional package at the top
    top_level: list[tuple[str, str, Imported]] = []  # (file, module it may reach, import)
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        parts = path.relative_to(root).with_suffix("").parts
        dotted = ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])
        unit = parts[0]
        if file == "__init__.py":
            continue  # the list of public names
        if unit not in LAYERS:
            out.append(f"{file}: {unit!r} has no place in LAYERS of tests/test_layers.py")
            continue
        for found in imports(path, ".".join([PACKAGE, *parts[:-1]])):
            where = f"{file}:{found.line}"
            third = found.module.split(".")[0]
            if third == PACKAGE:
                if not found.lazy:
                    top_level.append((where, found.module, found))
                out += [f"{where}: {problem}" for problem in _order(root, unit, found)]
                continue
            if third in sys.stdlib_module_names:
                continue
            seam = SEAMS.get(third)
            if seam is not None and file != seam:
                out.append(f"{where}: {third} is imported in {seam} only")
            if third in UNITS and unit not in UNITS[third]:
                out.append(f"{where}: {third} is imported in {sorted(UNITS[third]) or 'no module'} only")
            if unit in ONLY and third not in ONLY[unit]:
                out.append(f"{where}: {unit} imports {sorted(ONLY[unit])} only, found {third}")
            if not found.lazy and (third in OPTIONAL or (third in SLOW and unit not in LOADED_LATE)):
                if seam == file:
                    heavy.add(dotted)
                else:
                    out.append(f"{where}: import {third} inside the function that needs it")
    for where, module, found in top_level:
        for reached in (module, f"{module}.{found.name}"):
            if reached in heavy:
                out.append(f"{where}: {reached} needs an optional package; import it inside a function")
    return out


def _order(root: Path, unit: str, found: Imported) -> Iterator[str]:
    target = target_unit(root, found)
    if target is None:
        if LAYERS[unit] < TOP:
            yield "import from the module that defines the name, not from codd_ppl itself"
        return
    if target not in LAYERS:
        yield f"{target!r} has no place in LAYERS of tests/test_layers.py"
        return
    if unit == "graphs" and target == "typing":
        yield "codd_ppl.typing imports torch, and graphs may not"
    if found.name and is_protocol(root, found.module, found.name):
        return
    if target != unit and (LAYERS[target] >= LAYERS[unit] or (unit, target) in FORBIDDEN):
        yield f"{unit} (layer {LAYERS[unit]}) may not import {target} (layer {LAYERS[target]})"


def test_the_package_keeps_its_order() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    assert len(list(root.rglob("*.py"))) > 10, f"this is not the package: {root}"
    found = violations(root)
    assert not found, "\n" + "\n".join(found)


# --- the rules bite ---------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    """A package folder with these files (and the ``__init__.py`` that they need)."""
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in [root / PACKAGE, *(p for p in (root / PACKAGE).rglob("*") if p.is_dir())]:
        (folder / "__init__.py").touch()
    return root / PACKAGE


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("graphs/a.py", "import torch", "graphs imports"),
        ("graphs/a.py", "def f():\n    from torch import nn", "graphs imports"),
        ("graphs/a.py", "from codd_ppl.typing import Tensor", "imports torch"),
        ("graphs/a.py", "from codd_ppl.compiler import compile", "may not import compiler"),
        ("graphs/a.py", "from ..compiler.plan import Plan", "may not import compiler"),
        ("graphs/a.py", "from codd_ppl import compiler", "may not import compiler"),
        ("compiler/a.py", "import codd_ppl.inference.chain", "may not import inference"),
        ("inference/tree.py", "import torch_struct", "inference/chain.py only"),
        ("inference/tree.py", "import importlib\nimportlib.import_module('torch_struct')", "chain.py only"),
        ("denoisers/a.py", "def f():\n    import transformers", "denoisers/pretrained.py only"),
        ("evaluation/a.py", "def f():\n    from lm_eval.api import model", "evaluation/harness.py only"),
        ("evaluation/a.py", "from codd_ppl.training import CoDDModule", "may not import training"),
        ("evaluation/a.py", "import sacrebleu", "inside the function"),
        ("graphs/a.py", "from matplotlib import pyplot", "inside the function"),
        ("sampling/a.py", "import lightning as L", "lightning is imported in"),
        ("sampling/a.py", "from codd_ppl.training import CoDDModule", "may not import training"),
        ("training/a.py", "from codd_ppl.evaluation import nelbo_table", "may not import evaluation"),
        ("training/a.py", "def f():\n    from codd_ppl import Sampler", "not from codd_ppl itself"),
        ("diffusion/a.py", "from codd_ppl.denoisers import Network", "may not import denoisers"),
        ("denoisers/a.py", "import codd_ppl.diffusion", "may not import diffusion"),
        ("coupling.py", "from codd_ppl.diffusion import schedules", "may not import diffusion"),
        ("training/a.py", "from codd_ppl.testing import brute", "may not import testing"),
        ("errors.py", "from codd_ppl.typing import Tensor", "may not import typing"),
        ("newcomer/a.py", "import torch", "has no place in LAYERS"),
    ],
)
def test_a_breach_is_reported(tmp_path: Path, file: str, text: str, said: str) -> None:
    found = violations(write(tmp_path, {"compiler/plan.py": "", "typing.py": "", file: text}))
    assert found and any(said in line and line.startswith(file) for line in found), found


@pytest.mark.parametrize(
    "files",
    [
        {"graphs/a.py": "import networkx as nx\nfrom codd_ppl.errors import GraphError\nfrom . import b"},
        {"evaluation/plots.py": "from matplotlib.figure import Figure"},
        {"graphs/a.py": "def draw():\n    from matplotlib import pyplot"},
        {
            "graphs/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.axes import Axes"
        },
        {"inference/chain.py": "import torch_struct\nfrom codd_ppl.compiler import plan"},
        {"evaluation/a.py": "from codd_ppl.sampling import Sampler\nfrom codd_ppl.denoisers import x"},
        {"denoisers/pretrained.py": "def load():\n    import transformers"},
        {"training/a.py": "import lightning as L\nfrom codd_ppl.sampling import Sampler"},
        {"cli.py": "from codd_ppl import demo, Sampler\nimport lightning", "demo.py": "import codd_ppl"},
        {
            "denoisers/protocol.py": "from typing import Protocol\nclass Denoiser(Protocol): ...",
            "denoisers/__init__.py": "from codd_ppl.denoisers.protocol import Denoiser",
            "diffusion/process.py": "from codd_ppl.denoisers import Denoiser",
        },
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, files: dict[str, str]) -> None:
    assert violations(write(tmp_path, files)) == []


def test_only_the_protocol_itself_may_cross(tmp_path: Path) -> None:
    files = {
        "denoisers/protocol.py": "from typing import Protocol\nclass Denoiser(Protocol): ...\nclass Output: ...",
        "diffusion/process.py": "from codd_ppl.denoisers.protocol import Denoiser, Output",
    }
    assert len(violations(write(tmp_path, files))) == 1


def test_a_seam_that_needs_an_optional_package_is_imported_late(tmp_path: Path) -> None:
    files = {
        "evaluation/harness.py": "from lm_eval.api.model import LM",
        "evaluation/bench.py": "def run():\n    from codd_ppl.evaluation.harness import x",
    }
    assert violations(write(tmp_path / "late", files)) == []
    for text in ("from codd_ppl.evaluation.harness import x", "from codd_ppl.evaluation import harness"):
        found = violations(write(tmp_path / str(len(text)), files | {"evaluation/bench.py": text}))
        assert len(found) == 1 and "optional package" in found[0]
