"""Everything the README and the help texts show is run: commands in a folder with the files they name, code with the
names it uses."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWERS = (ROOT / "examples" / "ANSWERS.md").read_text(encoding="utf-8")
COSTS = (ROOT / "examples" / "COSTS.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(README)
CODE = [text for language, text in BLOCKS if language == "python"]
PROGRAMS = ("wnsurgery ", "python ", "torchrun ", "pip ")
LINES = [line for language, text in BLOCKS if not language for line in text.splitlines() if line.startswith(PROGRAMS)]
SET_UP = [line for line in LINES if line.startswith("pip ")]
RUN = [line for line in LINES if line not in SET_UP]
INLINE = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README + ANSWERS + COSTS))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are tiny
    yield
    torch.set_num_threads(threads)


def test_every_block_is_known() -> None:
    """A block is Python, or commands alone, or what the first command prints."""
    for language, text in BLOCKS:
        commands = [line.startswith(PROGRAMS) for line in text.splitlines()]
        assert language == "python" or all(commands) or "weight norm, there and back" in text, text
    assert len(CODE) >= 6
    assert len(RUN) >= 15


# Set-up --------------------------------------------------------------------------------------------------


def test_set_up_names_what_there_is() -> None:
    """The two `pip install` lines, which tests cannot run without a network, name extras and files that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in SET_UP:
        install, _, then = line.partition(" && ")
        words = shlex.split(install)
        assert words[:3] == ["pip", "install", "-c"]
        assert (ROOT / words[3]).is_file()
        (extra,) = re.findall(r"\.\[(\w+)\]", words[-1])
        assert extra in project["optional-dependencies"]
        assert then == "pytest" or (ROOT / then.removeprefix("python ")).is_file()


def test_quickstart_prints_what_is_shown() -> None:
    """From a plain file to onnxruntime, row for row: counts exactly, accuracies within 2 %, a small difference."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "quickstart.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (shown,) = [text for _, text in BLOCKS if "weight norm, there and back" in text]
    found, stated = ([re.split(r"\s*│\s*", row)[1:4] for row in re.findall("│.*", t)] for t in (done.stdout, shown))
    assert len(stated) == 7
    assert [row[:2] for row in found] == [row[:2] for row in stated]
    for (_, what, value), (_, _, expected) in zip(found, stated, strict=True):
        if value.endswith("%"):
            assert abs(float(value[:-1]) - float(expected[:-1])) <= 2, what
        elif "difference" in what:
            assert float(value) < 1e-4
        else:
            assert value == expected, what


# Commands ------------------------------------------------------------------------------------------------


def generator() -> nn.Module:
    """Made of torch.nn classes, with a transposed convolution."""
    layers = {
        "pre": nn.Conv1d(80, 8, 7, padding=3), "norm": nn.BatchNorm1d(8), "act": nn.LeakyReLU(0.1),
        "ups": nn.Sequential(nn.ConvTranspose1d(8, 4, 4, 2, 1)), "post": nn.Conv1d(4, 1, 7, padding=3),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def classifier() -> nn.Module:
    layers = {"conv1": nn.Conv2d(3, 6, 3), "norm": nn.BatchNorm2d(6), "act": nn.ReLU(), "conv2": nn.Conv2d(6, 4, 3)}
    return nn.Sequential(OrderedDict(layers))


def normed(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Under torch's own weight norm, its parameters scaled."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d):
            torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def directory(folder: Path, state: dict[str, Tensor], files: int) -> None:
    """A Hugging Face directory."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if files == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    owners = {key: f"model-{1 + i % files:05}-of-{files:05}.safetensors" for i, key in enumerate(state)}
    for name in set(owners.values()):
        save_file({k: t for k, t in state.items() if owners[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def make(folder: Path, net: Callable[[], nn.Module], x: Tensor) -> Path:
    """Every file that a command names, around one kind of net."""
    folder.mkdir()
    torch.manual_seed(0)
    plain = net()
    for name in ("model.pt", "before.pt", "after.pt", "MODEL"):
        torch.save(plain, folder / name)
    for name in ("weights.pt", "A", "B"):
        torch.save(plain.state_dict(), folder / name)
    save_file({**plain.state_dict(), "embed.weight": torch.randn(3, 4)}, folder / "weights.safetensors")
    torch.save(wn.apply_weight_norm(copy.deepcopy(plain)), folder / "model.wn.pt")
    theirs = normed(copy.deepcopy(plain), 1.5)
    torch.save(theirs.state_dict(), folder / "generator.pth")
    torch.save({"generator": theirs.state_dict(), "steps": 9000}, folder / "checkpoint.pth")
    save_file(theirs.state_dict(), folder / "generator.safetensors")
    torch.save(normed(copy.deepcopy(plain)).state_dict(), folder / "step0.pt")
    torch.save(theirs.state_dict(), folder / "step9000.pt")
    directory(folder / "gpt2-normed", theirs.state_dict(), 1)
    directory(folder / "sharded-model", theirs.state_dict(), 3)
    (folder / "fold.json").write_text(json.dumps({"proof": {"max_ulp": 1.25}}))
    torch.onnx.export(theirs, (x,), folder / "exported.onnx", input_names=["x"], dynamo=False, verbose=False)
    wn.export_onnx(plain, (x,), folder / "model.onnx", dynamic=True)
    np.savez(folder / "batch.npz", x.repeat(4, *[1] * (x.ndim - 1)).numpy())
    np.savez(folder / "x.npz", x.numpy())
    (folder / "inputs").mkdir()
    for i in range(3):
        np.savez(folder / "inputs" / f"{i}.npz", x.numpy())
    package = folder / "mypackage"
    package.mkdir()
    source = f"{inspect.getsource(net)}build = {net.__name__}\n"
    (package / "nets.py").write_text(
        f"from collections import OrderedDict\nfrom torch import nn\n{source}build = {net.__name__}\n"
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files around a generator of sound, and the same around a classifier of images."""
    base = tmp_path_factory.mktemp("shown")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        sound = make(base / "sound", generator, torch.randn(1, 80, 100))
        return {"sound": sound, "images": make(base / "images", classifier, torch.randn(1, 3, 32, 32))}


def command(line: str) -> tuple[list[str], str]:
    """The words of a line as a user types them, and the explanation behind."""
    typed, *explained = re.split(r"\s{3,}", re.sub(r"^(wnsurgery \w+)\s+", r"\1 ", line.strip()), maxsplit=1)
    typed = re.sub(r"\[(-o) OUT\]", r"\1 OUT", typed)
    return shlex.split(typed, comments=True), "".join(explained)


def only(folder: Path, names: set[str], here: Path) -> Path:
    """A copy of what a command reads, and nothing that it would have to overwrite."""
    here.mkdir()
    for path in folder.iterdir():
        if path.name in {name.rstrip("/") for name in names} | {"mypackage"}:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, here.joinpath(path.name))
    return here


def wnsurgery(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    return int(stop.value.code or 0), capsys.readouterr().err


HELP = [
    line.strip()
    for each in cli.cli.commands.values()
    for line in (each.help or "").splitlines()
    if line.strip().startswith(PROGRAMS)
]
SHOWN = list(dict.fromkeys(RUN + HELP))


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("wnsurgery ")])
def test_command(
    line: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each command of the README and of a help text does its work on files of the names it uses."""
    words, explained = command(line)
    written = [words[i + 1] for i, word in enumerate(words) if word in ("-o", "--html", "--manifest")]
    here = only(folders["images" if "3x32x32" in line else "sound"], set(words) - set(written), tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    monkeypatch.delitem(sys.modules, "mypackage.nets", raising=False)
    options = {name for p in cli.cli.commands[words[1]].params for name in p.opts}
    assert set(re.findall(r"--[a-z-]+", explained)) <= options
    for sign in {">", ">>"} & set(words):  # the shell's work
        words = words[: words.index(sign)]
    if "bench" in words:
        words += ["--repeats", "3"] if "--suite" not in words else []
    if "--suite" in words:
        assert not (set(words) - options - {"wnsurgery", "bench", "gpt-*", "train", "1"})
        words = [*words[:2], "--help"]  # minutes of measuring, which tests/test_bench_suite.py does on small nets
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    code, said = wnsurgery(words[1:], capsys)
    assert code == (6 if "cuda" in words and not cuda else 0), said
    assert code or all((here / name).exists() for name in written)


@pytest.mark.parametrize("line", [line for line in SHOWN if not line.startswith("wnsurgery ")])
def test_other_program(line: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Scripts, and several processes under torchrun, run as they are written."""
    words = shlex.split(line, comments=True)
    here = only(folders["sound"], set(words), tmp_path / "here")
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    else:
        words = [sys.executable, *words[1:]]
    if "lightning" in line:
        pytest.importorskip("pytorch_lightning")
    if "transformers" in line or "gallery" in line:
        pytest.importorskip("transformers")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    for attempt in range(2):
        done = subprocess.run(
            words, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        # threads that gloo has not yet joined have ended an interpreter's exit, after all was done
        if attempt or "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert ": False" not in done.stdout  # how the examples report a difference
    assert "-o" not in words or (here / words[words.index("-o") + 1]).exists()


def test_commands_in_the_text() -> None:
    """What stands in the middle of a sentence names commands, options and files that exist."""
    options = {name for each in cli.cli.commands.values() for p in each.params for name in p.opts} | {"--help"}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    commands = 0
    for code in INLINE:
        words = code.split()
        if words[0] == "wnsurgery" and len(words) > 1:
            commands += 1
            assert words[1] in cli.cli.commands, code
        if words[0] in ("python", "torchrun") and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), code
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            known = options | ({"--nproc-per-node", "--standalone"} if words[0] == "torchrun" else set())
            assert option in known or f'"{option}"' in scripts, code
    assert commands >= 5


@pytest.mark.parametrize("page", ["README.md", "examples/ANSWERS.md", "examples/COSTS.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Every link of a page is another site's, or a file and a heading that are there."""
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in file:
            continue
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.is_file(), link
        heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link


# Code ----------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Takes padded sequences and their mask; has names that the README's patterns fit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv1": nn.Linear(6, 6), "conv2": nn.Linear(6, 6)}) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block["conv2"](block["conv1"](h).relu())  # type: ignore[index,operator]
        return self.head(h)  # type: ignore[no-any-return]


def basics() -> dict[str, Any]:
    x = torch.randn(32, 5, 4)
    return {"model": Blocks(), "batch": x, "inputs": (x[:2],)}


def initialising() -> dict[str, Any]:
    masks = torch.arange(5).expand(32, 5) < torch.randint(1, 6, (32, 1))
    batches = [{"x": torch.randn(32, 5, 4), "attention_mask": masks} for _ in range(2)]
    return {
        "model": wn.apply_weight_norm(Blocks()),
        "loader": [torch.randn(n, 5, 4) for n in (9, 4)],
        "batches": batches,
    }


def monitoring() -> dict[str, Any]:
    model = wn.apply_weight_norm(Blocks())

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            net(torch.randn(3, 5, 4)).square().mean().backward()
            optimizer.step()

    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "train": train}


def sharding() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    return {"model": Blocks(), "fully_shard": fully_shard, "state": wn.apply_weight_norm(Blocks()).state_dict()}


# what the text around a block takes for granted, by a word of the block
TAKEN: dict[str, Callable[[], dict[str, Any]]] = {
    "look before you cut": basics,
    "weight_norm_param_groups": lambda: {"model": wn.apply_weight_norm(Blocks())},
    "fan_init": initialising,
    'mode="deferred"': basics,
    "fully_shard": sharding,
    "WeightNormMonitor": monitoring,
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("code", CODE, ids=lambda code: code.strip().splitlines()[0][:40])
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each block of Python runs; in one whose lines are alternatives, each line does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard())
    (make_names,) = [names for word, names in TAKEN.items() if word in code]
    if "fully_shard" in code:
        request.getfixturevalue("alone")
    parts = code.splitlines() if "before sharding, or" in code else [code]
    for part in parts:
        torch.manual_seed(0)
        names = {"wn": wn, "torch": torch, **make_names()}
        exec(compile(part, "README.md", "exec"), names)
        if "model" in names and "fold_weight_norm(model)" in code:
            assert not wn.is_weight_normed(names["model"])
        elif "model" in names and "fold_state" not in part:
            assert wn.is_weight_normed(names["model"]), part


def tensorboard() -> Any:
    """A stand-in for a package that is in no extra."""
    module: Any = types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    module.SummaryWriter = SummaryWriter
    return module


def test_code_of_the_answers() -> None:
    """Each block of Python on the page of answers runs with the names of the script that prints its numbers."""
    page = [text for language, text in BLOCK.findall(ANSWERS) if language == "python"]
    assert len(page) >= 7
    names = {name: getattr(answers(), name) for name in vars(answers())}
    for code in page:
        torch.manual_seed(0)
        model = wn.apply_weight_norm(names["net"]())
        g, v = names["pair"](model[0])
        exec(
            compile(code, "ANSWERS.md", "exec"),
            {**names, "model": model, "g": g, "v": v, "optimizer": names["sgd"](model)},
        )


def answers() -> Any:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("answers", ROOT / "examples" / "answers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
