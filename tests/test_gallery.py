"""Real architectures, one after the other: nothing forgotten, no bit changed, everything trains, loads and exports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import wnsurgery as wn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
gallery = pytest.importorskip("gallery")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are tiny
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", gallery.NETS)
def test_net(name: str) -> None:
    """Every tensor is planned, converting and folding change no bit, pairs train, state dicts load, removal agrees."""
    row = gallery.measure(name)
    assert row.converted
    assert row.missed == ()
    assert (row.convert_bits, row.fold_bits) == (0, 0)
    assert row.still == ()
    assert row.trained
    assert row.loads
    assert row.removal is None or row.removal.ok
    assert row.ok


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["hifi-gan", "gpt2", "wav2vec2"])
def test_onnx(name: str) -> None:
    """Where the plain net exports, the trained one does, with the largest difference as a number."""
    row = gallery.measure(name, onnx=True)
    assert row.ok
    assert float(row.onnx) < 1e-4


# family -> tensors that must be converted, with their kept axes, and tensors that must not be
_WANTED: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "mixtral": ({"gate.weight": (0,), "experts.gate_up_proj": (0, 1)}, ("embed_tokens.weight",)),
    "gpt-oss": ({"router.weight": (0,), "experts.down_proj": (0, 2)}, ("gate_up_proj_bias",)),
    "llama4": ({"router.weight": (0,), "experts.gate_up_proj": (0, 2)}, ()),
    "jetmoe": ({"input_linear.weight": (0, 1), "router.layer.weight": (0,)}, ()),
    "convbert": ({"intermediate.dense.weight": (0, 2)}, ("position_embeddings.weight",)),
    "recurrent-gemma": ({"input_gate_weight": (0, 2), "conv_1d.weight": (0,)}, ("recurrent_gate_bias",)),
    "gpt2": ({"c_attn.weight": (1,), "wte.weight": (0,)}, ("wpe.weight",)),
    "mamba": ({"conv1d.weight": (0,), "x_proj.weight": (0,)}, ("A_log",)),
    "swin": ({"reduction.weight": (0,)}, ("relative_position_bias_table",)),
    "torch-recurrent": ({"lstm.weight_ih_l0": (0,), "cell.weight_hh": (0,)}, ()),
    "hifi-gan": ({"ups.0.weight": (1,)}, ()),
}


@pytest.mark.parametrize("name", _WANTED)
def test_the_default_selection(name: str) -> None:
    """Linear maps are converted wherever they are stacked or routed, one norm per output; tables and scales are not."""
    converted, left = _WANTED[name]
    plan = wn.plan_weight_norm(wn.fold_weight_norm(gallery.make(name)[0]))
    for end, kept in converted.items():
        found = [site for site in plan.sites if site.fqn.endswith(end)]
        assert found, end
        assert {site.axes.kept for site in found} == {kept}, end
    for end in left:
        assert any(skip.name.endswith(end) for skip in plan.skipped), end


def test_a_broken_promise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that loses the last bits, and a pair that does not train, show in the row."""
    convert = wn.apply_weight_norm

    def rough(model: torch.nn.Module) -> torch.nn.Module:
        convert(model)
        model.get_parameter("mlp.0.parametrizations.weight.original0").data.mul_(1 + 1e-6)
        model.get_parameter("mlp.2.parametrizations.weight.original1").requires_grad_(False)
        return model

    monkeypatch.setattr(wn, "apply_weight_norm", rough)
    row = gallery.measure("dino-head")
    assert row.convert_bits > 0
    assert row.still == ("mlp.2.weight",)
    assert not row.ok


def test_the_command() -> None:
    """The command prints a row for each net that fits and leaves with 0; with 2 and the names where none does."""
    command = [sys.executable, str(ROOT / "examples" / "gallery.py"), "--only"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "160", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "dino*"], capture_output=True, text=True, check=False, env=environment, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "dino-head" in done.stdout
    assert "dinov2" in done.stdout
    assert "2 nets" in done.stdout
    none = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False, env=environment)
    assert none.returncode == 2
    assert "tcn" in none.stdout
