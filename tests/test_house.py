"""The house: what may import what, public docstrings, the README's two commands, the examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from wnsurgery import layers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "wnsurgery"

LAYERS = [
    {"fused_kernels", "norms", "row_threads"},
    {"errors", "fused", "kept", "text", "snapshot", "mean_only", "calls", "dataflow", "axis_counts"}
    | {"csv_text", "ownership", "dtensors", "compiled", "loaded_keys", "placed", "onnx_nodes", "onnx_own_types"}
    | {"sgd_kernels", "linear_kernels", "channel_kernels", "typed_kernels", "lean_modules", "safety"}
    | {"onlookers", "silence"},
    {"other_types", "parts"},
    {"keys", "loans", "reparam", "stores", "differences", "onnx_values", "optimizer_state", "blocked_linear"}
    | {"charts", "page", "onnx_checks", "declared"}
    | {"batches", "masks", "lockstep", "own_state", "ranks", "channelwise"},
    {
        "fully_sharded",
        "layers",
        "onnx_file",
        "proof",
        "states",
        "chain_rule",
        "after_step",
        "small_weights",
        "torch_node",
        "looked_up",
        "large_linear",
        "spread",
        "sgd_step",
    }
    | {"onnx_layout", "onnx_functions", "onnx_guard", "moments", "outputs", "onnx_weights", "graph_inputs"},
    {"graph_matching", "parity", "choice", "carried_state", "multi_tensor", "straight", "joint_norm"} | {"entries"},
    {"graph", "walk", "steps", "flat_magnitudes", "deferred", "preparation", "following"},
    {"plan", "mechanism", "checkpoint", "tracing", "tied_names", "resizing"},
    {"affine", "directions", "own_passes", "pairs", "targets", "promises", "manifest"},
    {"batchnorm", "data_init", "fans", "hosts", "modes"},
    {"reading"},
    {"checkpoint_directory"},
    {"surgery", "renormalize", "magnitudes", "param_groups", "delivery", "monitor", "loading"},
    {"directory"},
    {"files", "runs", "benchmark", "bench_models", "bench_works"},
    {"export", "inout", "bisection", "bench_surgery", "contents"},
    {"verification", "inspection", "deployment", "folder", "suite", "turning"},
    {"report", "weight_table", "html_report", "arguments", "completion"},
    {"leaving"},
    {"cli"},
    {"__init__", "__main__"},
]


def row_of(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if module in row)


def test_the_root_stays_small() -> None:
    """What is kept there is named here: nothing that a command has left behind."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    texts = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    found = {line.split("/")[0] for line in done.stdout.splitlines() if not line.startswith(".")}
    assert found == texts | {"examples", "tests", "wnsurgery"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wnsurgery"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name[:2] != "__"}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("wnsurgery.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    """A module imports only from rows above its own, inside functions too; a package's own files are one row."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path) - {own}:
        assert row_of(name) < row_of(own), f"{own} imports {name}"


def test_every_module_is_in_the_table_of_contributing() -> None:
    """CONTRIBUTING.md names every module of the package."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in modules()} - {"__init__", "__main__"}
    assert {n for n in names if f"`{n}`" not in text} == set()


@pytest.mark.parametrize(("module", "heavy"), [("cli", {"torch", "numpy", "rich"}), ("report", {"torch", "numpy"})])
def test_light_modules_stay_light(module: str, heavy: set[str]) -> None:
    """The command line and its reports import nothing heavy at module level."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert not names & heavy


def test_public_functions_show_an_example() -> None:
    """Every public function and class documents itself, with an example but for exceptions, and each parameter."""
    import inspect

    import wnsurgery as wn

    for name in wn.__all__[1:]:
        thing = getattr(wn, name)
        assert thing.__doc__, name
        if not (isinstance(thing, type) and issubclass(thing, Exception)):
            assert ">>>" in thing.__doc__, name
        if inspect.isfunction(thing):
            told = re.findall(r"^ +([\w, ]+): ", thing.__doc__, flags=re.MULTILINE)
            known = {one for line in told for one in line.split(", ")}
            plain = [p.name for p in inspect.signature(thing).parameters.values() if p.kind is not p.VAR_KEYWORD]
            assert set(plain) <= known, (name, set(plain) - known)


def test_public_docstrings_speak_of_public_names() -> None:
    """What a docstring refers to can be had from the package: no name that only a module inside of it knows."""
    import wnsurgery as wn

    inside = set()
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    inside -= {*wn.__all__, "forward", "backward"}  # everybody's
    stems = "|".join({path.stem for path in modules()} - {"__init__"})
    for name in wn.__all__[1:]:
        text = getattr(wn, name).__doc__
        assert not inside & set(re.findall(r"`(\w+)(?:\([^`]*\))?`", text)), name
        assert not re.search(rf"`({stems})\.", text), name


@pytest.mark.parametrize("path", [p for p in modules() if p.stem != "__main__"], ids=lambda p: p.stem)
def test_examples_in_docstrings(path: Path) -> None:
    """Every example in a docstring gives what it says: those of public names after `import torch`, `from torch import
    nn` and `import wnsurgery as wn` alone, others with all public names and those of their module."""
    import torch

    import wnsurgery as wn

    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    three = {"torch": torch, "nn": torch.nn, "wn": wn, "__name__": name}
    names = {n: getattr(wn, n) for n in wn.__all__} | vars(module) | three
    runner = doctest.DocTestRunner()
    kept = dict(layers._by_type), dict(layers._by_name)
    torch.manual_seed(0)
    try:
        for example in doctest.DocTestFinder().find(module, name):
            first = example.name.removeprefix(name).split(".")[1:2]
            example.globs = dict(three if not first or first[0] in wn.__all__ else names)
            runner.run(example)
    finally:
        for table, before in zip((layers._by_type, layers._by_name), kept, strict=True):
            table.clear()
            table.update(before)  # type: ignore[attr-defined]
    assert runner.summarize().failed == 0


def test_readme_has_exactly_two_commands() -> None:
    """All set-up is two lines of the form `pip install ... && ...`: one runs the quickstart, one the tests."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^pip install .+ && .+$", text, flags=re.MULTILINE)
    assert [c.rpartition("&& ")[2] for c in commands] == ["python examples/quickstart.py", "pytest"]
    assert text.count("pip install") == 2


def test_readme_python_names_exist() -> None:
    """Every call the README shows is a public name."""
    import wnsurgery as wn

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## In Python") : text.index("## Limits")]
    names = set(re.findall(r"^\| `(\w+)\(", table, flags=re.MULTILINE)) | set(re.findall(r"wn\.(\w+)\(", text))
    assert len(names) >= 10
    assert {n for n in names if n not in wn.__all__} == set()


def test_nothing_private_in_the_repository() -> None:
    """No absolute path of a machine and no registry host stands in the repository's text."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    words = ["/" + "work/", "/" + "root/", "/opt/" + "wheels", "pypi" + ".org", "files.python" + "hosted"]
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [w for w in words if w in text], name
