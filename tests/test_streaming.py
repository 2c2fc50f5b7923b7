"""Files that go through one tensor at a time: the bytes torch.save would write, and nothing whole in memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import nn

from wnsurgery.checkpoint import AtOnce, fold_state, fold_with
from wnsurgery.errors import InputError, OutputError, OutputExistsError, PairError, VerificationError, WnsurgeryError
from wnsurgery.files import convert_checkpoint, fold_checkpoint
from wnsurgery.loading import load_tensors
from wnsurgery.manifest import tensor_digest
from wnsurgery.proof import ulps_apart
from wnsurgery.reparam import Axes, compose
from wnsurgery.states import every_tensor
from wnsurgery.stores import map_store, read_store
from wnsurgery.surgery import apply_weight_norm


def content() -> dict:
    """A checkpoint with ties, views, odd strides and types, and a pair."""
    torch.manual_seed(0)
    w = torch.randn(6, 5)
    return {
        "sd": {"c.weight_g": torch.rand(4, 1, 1), "c.weight_v": torch.randn(4, 3, 2), "c.bias": torch.ones(4)},
        "tied": w,
        "tied too": w,
        "inside": w[1:3, ::2],
        "parameter": nn.Parameter(torch.randn(3)),
        "none": torch.empty(0, 3),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "u16": torch.arange(4).to(torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch._neg_view(torch.randn(3)),
        "flag": torch.tensor(True),
        "epoch": 3,
    }


def test_a_streamed_archive_is_what_torch_save_writes(tmp_path: Path) -> None:
    """Folding through the file gives byte for byte what folding in memory and torch.save give."""
    torch.save(content(), tmp_path / "a.pt")
    fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    fold_state(whole)
    expected = io.BytesIO()
    torch.save(whole, expected)
    assert (tmp_path / "b.pt").read_bytes() == expected.getvalue()


@pytest.mark.parametrize("mmap", [False, True])
def test_streamed_archives_load(tmp_path: Path, mmap: bool) -> None:
    """Values, types, strides, ties and Parameters come back through torch.load, mapped or not."""
    before = content()
    torch.save(before, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", include="last", layout="legacy")
    after = torch.load(tmp_path / "b.pt", weights_only=True, mmap=mmap)
    for name in before.keys() - {"sd", "epoch", "last"}:
        assert torch.equal(
            after[name].view(torch.uint8) if name == "f8" else after[name],
            before[name].view(torch.uint8) if name == "f8" else before[name],
        ), name
        assert (after[name].stride(), type(after[name])) == (before[name].stride(), type(before[name]))
    assert after["tied"].data_ptr() == after["tied too"].data_ptr() == after["inside"].data_ptr() - 20
    assert torch.equal(after["last_v"], before["last"])
    assert after["last_v"].is_contiguous(memory_format=torch.channels_last)


def test_views_do_not_carry_their_storage(tmp_path: Path) -> None:
    """A small view of a large storage is written small, and memory that only a folded pair used is gone."""
    flat = torch.randn(100_000)
    torch.save({"x": flat[:10], "w_g": torch.ones(10, 1), "w_v": flat[10:90_010].view(10, 9_000)}, tmp_path / "a.pt")
    fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 4 * 90_010 + 4_000
    assert torch.equal(torch.load(tmp_path / "b.pt")["x"], flat[:10])


@pytest.mark.parametrize("span", [slice(1, 9), slice(3, 4), slice(1, 2), slice(6, 15), slice(0, 16)])
def test_views_of_several_types_keep_their_values(span: slice, tmp_path: Path) -> None:
    """Tensors of different item sizes that share memory keep their values wherever each begins."""
    b = torch.arange(16, dtype=torch.uint8)
    views = {"a": b[span], "b": b.view(torch.uint32)[1:3], "c": b[15:], "d": b[2:12].view(torch.uint16)[1:]}
    torch.save({**views, "w.weight_g": torch.ones(1, 1), "w.weight_v": torch.tensor([[3.0, 4.0]])}, tmp_path / "a.pt")
    fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    for found in (torch.load(tmp_path / "b.pt", weights_only=True), load_tensors(tmp_path / "b.pt")):
        assert all(torch.equal(found[name], view) for name, view in views.items())


def test_bytes_do_not_depend_on_path_or_threads(tmp_path: Path) -> None:
    """Same input, same bytes: wherever they go, with however many threads; the manifest too."""
    torch.save(content()["sd"], tmp_path / "a.pt")
    before = torch.get_num_threads()
    outputs = set()
    try:
        for threads, name in ((1, "x.pt"), (2, "longer name.pth")):
            torch.set_num_threads(threads)
            fold_checkpoint(tmp_path / "a.pt", tmp_path / name, manifest=tmp_path / f"{name}.json")
            outputs.add(((tmp_path / name).read_bytes(), (tmp_path / f"{name}.json").read_bytes()))
    finally:
        torch.set_num_threads(before)
    assert len(outputs) == 1


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_manifest_names_every_tensor(tmp_path: Path, suffix: str) -> None:
    """Each tensor of the output stands in the manifest with its action and the hash of its bytes."""
    state = content()["sd"]
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, tmp_path / f"a{suffix}")
    fold_checkpoint(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", manifest=tmp_path / "m.json")
    table = json.loads((tmp_path / "m.json").read_text())
    assert {row["name"]: row["action"] for row in table["tensors"]} == {"c.weight": "folded", "c.bias": "kept"}
    assert table["removed"] == ["c.weight_g", "c.weight_v"]
    bias = next(row for row in table["tensors"] if row["name"] == "c.bias")
    assert bias["sha256"] == hashlib.sha256(torch.ones(4).numpy().tobytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(table)


@pytest.mark.parametrize("there", ["out.pt", "sub/../out.pt", "link/out.pt"])
def test_a_manifest_is_not_the_output_in_another_spelling(there: str, tmp_path: Path) -> None:
    """Both would come to one place; nothing is written then."""
    torch.save(content(), tmp_path / "a.pt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="the manifest and the output are one file"):
        fold_checkpoint(tmp_path / "a.pt", tmp_path / "out.pt", manifest=tmp_path / there)
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "sub", "link"}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_one_element_of_a_wider_step_is_written(tmp_path: Path, suffix: str) -> None:
    """A tensor of a single element is written and stands in the manifest whatever its stride."""
    torch.save({"fc.weight": torch.ones(2, 2), "one": torch.arange(4.0)[::2][:1]}, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / f"b{suffix}", manifest=tmp_path / "m.json")
    assert load_tensors(tmp_path / f"b{suffix}")["one"].tolist() == [0.0]
    rows = json.loads((tmp_path / "m.json").read_text())["tensors"]
    assert next(r["sha256"] for r in rows if r["name"] == "one") == hashlib.sha256(bytes(4)).hexdigest()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_no_output_without_the_manifest_asked_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the manifest cannot be made, neither it nor the output is written, and an old output is intact."""

    def fail(*_: object) -> str:
        raise MemoryError

    source, target = (tmp_path / name if kind == "directory" else tmp_path / f"{name}.pt" for name in ("a", "b"))
    for path in (source, target):
        path.mkdir() if kind == "directory" else None
        torch.save(content()["sd"], path / "pytorch_model.bin" if kind == "directory" else path)
    file = target / "pytorch_model.bin" if kind == "directory" else target
    before = file.read_bytes()
    monkeypatch.setattr("wnsurgery.manifest.tensor_digest", fail)
    with pytest.raises(MemoryError):
        fold_checkpoint(source, target, force=True, manifest=tmp_path / "m.json")
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]


def test_tensors_stay_in_the_file_until_asked_for(tmp_path: Path) -> None:
    """Planning and opening read no tensor; a fetched one is a copy in memory of its own."""
    torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pt")
    stored = map_store(tmp_path / "a.pt")
    assert stored is not None
    assert stored.source is not None
    seen: list[int] = []
    stored.source.watch = seen.append
    fetched = stored.source.fetch(stored.content["w"])
    assert seen == [16]
    assert fetched.tolist() == [0, 1, 2, 3]
    assert fetched.data_ptr() != stored.content["w"].data_ptr()
    stored.source.close()


def test_damage_in_a_tensor_is_found_wherever_it_is(tmp_path: Path) -> None:
    """A flipped bit in a kept, a folded or an unused record is an input error, and no output appears."""
    torch.save(content()["sd"], tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        names = [e.filename for e in archive.infolist() if "/data/" in e.filename]
        payloads = [archive.read(name) for name in names]
    assert len(payloads) == 3
    for payload in payloads:
        at = data.index(payload) + 1
        (tmp_path / "bad.pt").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InputError, match="CRC"):
            fold_checkpoint(tmp_path / "bad.pt", tmp_path / "out.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "bad.pt"]


@pytest.mark.parametrize(("second", "told"), [(6, False), (5, True), (0, True)])
def test_memory_that_is_shared_is_told(second: int, told: bool, tmp_path: Path) -> None:
    """Two tensors of one storage share memory where they overlap, and lose nothing in two where they do not."""
    b = torch.randn(12)
    pair = {"w.weight_g": torch.ones(1, 1), "w.weight_v": torch.tensor([[3.0, 4.0]])}
    torch.save({"p": b[:6], "q": b[second:], **pair}, tmp_path / "a.pt")
    report = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.safetensors")
    expected = "p and q share memory; .safetensors holds them as two tensors"
    assert report.warnings == ((expected,) if told else ())


def test_no_space_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the output is known from the plan and compared with the room there is."""
    import shutil

    safetensors.torch.save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    for name in ("b.safetensors", "b.pt"):
        with pytest.raises(OutputError, match="no space"):
            fold_checkpoint(tmp_path / "a.safetensors", tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# Rows without direction, optimizers, warnings ------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("log", [False, True])
def test_a_row_without_direction_is_an_error_unless_told(tmp_path: Path, suffix: str, log: bool) -> None:
    """v = 0 with g != 0 has no direction: an error, or zeros, or NaN; with g = 0 it is a row of zeros."""
    g, v = torch.ones(3, 1), torch.ones(3, 4)
    v[1] = v[2] = 0
    g[2] = -1000 if log else 0
    save = torch.save if suffix == ".pt" else safetensors.torch.save_file
    save({"l.weight_g": g, "l.weight_v": v}, tmp_path / f"a{suffix}")
    source, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    magnitude = "log" if log else "linear"
    with pytest.raises(PairError, match=r"l\.weight: 1 of 3 rows"):
        fold_checkpoint(source, out, magnitude=magnitude)
    assert not out.exists()
    for choice in ("zero", "nan"):
        report = fold_checkpoint(source, out, zero_norm=choice, magnitude=magnitude, force=True)
        assert any("1 of 3 rows" in text for text in report.warnings)
        w = read_store(out).content["l.weight"]
        assert bool(w[1].isnan().all()) == (choice == "nan")
        assert w[2].tolist() == [0] * 4
    with pytest.raises(VerificationError):
        fold_checkpoint(source, tmp_path / f"c{suffix}", zero_norm="zero", magnitude=magnitude, strict=True)
    assert not (tmp_path / f"c{suffix}").exists()


def test_optimizer_state_of_folded_parameters_goes_and_the_rest_stays(tmp_path: Path) -> None:
    """Momentum belongs to a parameter: that of g and v is dropped, that of the bias kept, and it is said."""
    net = nn.Sequential(nn.Linear(3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    report = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    after = torch.load(tmp_path / "b.pt")["optimizer"]
    before = optimizer.state_dict()
    names = [name for name, _ in net.named_parameters()]
    kept = [i for i, name in enumerate(names) if "original" not in name]
    assert sorted(after["state"]) == after["param_groups"][0]["params"] == kept
    assert all(torch.equal(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in kept)
    assert any("optimizer" in text and "2 of 5" in text for text in report.warnings)


def test_optimizer_state_that_cannot_be_told_apart_goes_whole(tmp_path: Path) -> None:
    """Where shapes do not say which state is whose, none of it is kept: wrong momentum is worse than none."""
    state = {0: {"exp_avg": torch.ones(7)}, 1: {"exp_avg": torch.ones(8)}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save({"model": content()["sd"], "optimizer": optimizer}, tmp_path / "a.pt")
    report = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt")["optimizer"]["state"] == {}
    assert any("all of its state is dropped" in text for text in report.warnings)


@pytest.mark.parametrize("converted", [False, True])
def test_optimizer_state_of_other_parameters_survives_there_and_back(tmp_path: Path, converted: bool) -> None:
    """A second and a third surgery find the weights replaced before by the gaps in the optimizer's numbers."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    if converted:
        apply_weight_norm(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "0.pt")
    for i in range(3):
        job = fold_checkpoint if (i + converted) % 2 else convert_checkpoint
        warnings = job(tmp_path / f"{i}.pt", tmp_path / f"{i + 1}.pt").warnings
        assert len(warnings) == (i == 0)
    left = torch.load(tmp_path / "3.pt", weights_only=True)["optimizer"]
    names = [name for name, _ in model.named_parameters()]
    kept = [i for i, name in enumerate(names) if name.endswith("bias") or name == "1.weight"]
    assert left["param_groups"][0]["params"] == list(left["state"]) == kept
    for number, parameter in zip(kept, [list(model.parameters())[i] for i in kept], strict=True):
        assert torch.equal(left["state"][number]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def beside_a_net(optimizer: dict, **nets: dict) -> tuple[dict, tuple[str, ...]]:
    """What folding leaves of an optimizer's state dict in a checkpoint with these nets, and what it says."""
    pair = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 3)}
    whole = {**(nets or {"net": pair | {"a.bias": torch.ones(3)}}), "optimizer": optimizer}
    warnings = fold_state(whole).warnings
    return whole["optimizer"], warnings


def moments(*shapes: tuple[int, ...]) -> dict:
    return {n: {"exp_avg": torch.ones(shape)} for n, shape in enumerate(shapes)}


@pytest.mark.parametrize("state", [None, {0: {"exp_avg": torch.ones(3, 1)}}], ids=["none", "some"])
@pytest.mark.parametrize("groups", [5, [{"params": [0, 1, 2]}, 3], [None]], ids=str)
def test_what_only_has_the_keys_of_an_optimizer_is_left_alone(state: object, groups: object) -> None:
    """Somebody else's entries called `state` and `param_groups` stay as they are, whatever they are."""
    given = {"state": state, "param_groups": groups}
    left, warnings = beside_a_net(dict(given))
    assert left == given
    assert warnings == ()


@pytest.mark.parametrize("numbers", [[0, 0, 1], [0, "a"], []], ids=str)
def test_numbers_that_are_none_tell_nothing(numbers: list) -> None:
    """Twice the same, a name among numbers, none at all: the state goes, where there is any, else nothing is said."""
    left, warnings = beside_a_net({"state": moments((3, 1), (3, 3), (3,)), "param_groups": [{"params": numbers}]})
    assert left["state"] == {}
    assert "all of its state is dropped" in warnings[0]
    assert beside_a_net({"state": {}, "param_groups": [{"params": numbers}]})[1] == ()


def test_two_nets_that_a_state_fits_in_two_ways_tell_nothing() -> None:
    """Where by one net the first halves are replaced and by the other the last, shapes do not say which."""
    pair = {"w_g": torch.ones(3, 1), "w_v": torch.ones(3, 3)}
    plain = {"p": torch.ones(3, 1), "q": torch.ones(3, 3)}
    optimizer = {"state": moments((3, 1), (3, 3), (3, 1), (3, 3)), "param_groups": [{"params": [0, 1, 2, 3]}]}
    assert list(beside_a_net(dict(optimizer), net=pair | plain)[0]["state"]) == [2, 3]
    assert list(beside_a_net(dict(optimizer), net=pair | plain, average=plain | pair)[0]["state"]) == []


def test_buffers_of_batch_norm_are_no_parameters() -> None:
    """Running statistics between parameters of the same shapes do not keep numbers from being told."""
    net = {"c.weight_g": torch.ones(3, 1), "c.weight_v": torch.ones(3, 3), "bn.weight": torch.ones(3)}
    net |= {"bn.running_mean": torch.ones(3), "bn.running_var": torch.ones(3), "d.bias": torch.ones(3)}
    optimizer = {"state": moments((3, 1), (3, 3), (3,), (3,)), "param_groups": [{"params": [0, 1, 2, 3]}]}
    assert list(beside_a_net(optimizer, net=net)[0]["state"]) == [2, 3]


@pytest.mark.parametrize("numbers", [[1, 2, 3], [0, 2], [2, 3], [0, 1, 3, 4]])
def test_gaps_that_fit_no_earlier_surgery_tell_nothing(tmp_path: Path, numbers: list[int]) -> None:
    """Where numbers are too many or too few, or a gap would be a bias, the whole state goes."""
    state = {n: {"exp_avg": torch.ones(3)} for n in numbers}
    groups = [{"params": numbers, "lr": 0.1}]
    net = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 3), "a.bias": torch.ones(3)}
    torch.save({"net": net, "optimizer": {"state": state, "param_groups": groups}}, tmp_path / "a.pt")
    report = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    assert "all of its state is dropped" in report.warnings[0]


# The proof -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "axes"), [
    ((5, 7), Axes((0,))), ((4, 6, 3), Axes((1,))), ((4, 6, 3), Axes(())), ((4, 3, 2), Axes((1,), 2)),
    ((3, 70_000), Axes((0,))),
])  # fmt: skip
def test_the_recomputation_agrees_and_can_fail(dtype: torch.dtype, shape: tuple[int, ...], axes: Axes) -> None:
    """A folded weight is within 1.5 units of the independent value, and a changed element is counted."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.rand(axes.magnitude_shape(shape), generator=generator, dtype=torch.float64).to(dtype) + 0.5
    w = compose(g, v, axes)
    assert ulps_apart(w, g, v, axes) < 1.51
    w.view(-1)[3] *= 1.5
    assert ulps_apart(w, g, v, axes) > 20
    w.view(-1)[3] = float("nan")
    assert ulps_apart(w, g, v, axes) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_negated_pairs_in_memory_fold_and_are_judged(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tensors that torch negates lazily fold to what their values fold to, and the recomputation agrees."""
    g, v = torch.rand(4, 1, dtype=torch.float64).to(dtype), torch.randn(4, 3, dtype=torch.float64).to(dtype)
    torch.save({"w.weight_g": torch._neg_view(g), "w.weight_v": torch._neg_view(v)}, tmp_path / "a.pt")
    report = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", trust_pickle=True)
    assert report.proof.max_ulp < 1.51
    axes = Axes((0,))
    w = torch.load(tmp_path / "b.pt")["w.weight"]
    assert torch.equal(w, compose(-g, -v, axes))
    assert ulps_apart(torch._neg_view(-w), torch._neg_view(g), torch._neg_view(v), axes) == report.proof.max_ulp
    assert ulps_apart(torch._neg_view(w), torch._neg_view(g), torch._neg_view(v), axes) > 20


def test_the_figures_stand_in_the_report(tmp_path: Path) -> None:
    """Pairs, axes, distance and sizes are what the file holds; a dry run has all but the output."""
    torch.save(content()["sd"], tmp_path / "a.pt")
    for dry in (True, False):
        proof = fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", dry_run=dry).proof
        assert proof is not None
        assert (proof.pairs, proof.left, proof.axes) == (1, 0, (("kept 0 of 3", 1),))
        assert proof.max_ulp is not None
        assert 0 < proof.max_ulp < 1.5
        assert proof.bytes_out == (0 if dry else (tmp_path / "b.pt").stat().st_size)
    maker = AtOnce(judge=True)
    fold_with(maker, content())
    assert maker.max_ulp == proof.max_ulp


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_large_weights_are_compared_while_they_are_written(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one, wherever the worst is, with the figures of a comparison afterwards; where comparing fails, nothing is
    written."""
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, rows in (("a", 600), ("b", 500), ("c", 3)):
        state[f"{name}.weight_v"] = torch.randn(rows, 700, generator=generator)
        state[f"{name}.weight_g"] = torch.rand(rows, 1, generator=generator)
        state[f"{name}.bias"] = torch.randn(700_000, generator=generator)
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, source)
    report = fold_checkpoint(source, out)
    folded = dict(every_tensor(read_store(out).content))
    worst = {
        n: ulps_apart(folded[f"{n}.weight"], state[f"{n}.weight_g"], state[f"{n}.weight_v"], Axes((0,))) for n in "abc"
    }
    assert report.proof is not None and report.proof.max_ulp == max(worst.values())
    assert report.proof.worst.removesuffix(".weight") == max(worst, key=lambda n: worst[n])
    before = out.read_bytes()

    def broken(*_: object, **__: object) -> float:
        raise RuntimeError("cannot compare")

    monkeypatch.setattr("wnsurgery.checkpoint.ulps_apart", broken)
    with pytest.raises(RuntimeError, match="cannot compare"):
        fold_checkpoint(source, out, force=True)
    assert out.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {source.name, out.name}


# Hostile files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each streamed kind."""
    folder = tmp_path_factory.mktemp("samples")
    torch.save(content(), folder / "a.pt")
    safetensors.torch.save_file(content()["sd"], folder / "a.safetensors")
    return {p.suffix: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_files_fold_or_raise_our_errors(samples, tmp_path_factory, kind, changes) -> None:
    """Whatever bytes are changed, folding returns or raises an error of ours, and a failure leaves nothing."""
    data = bytearray(samples[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    folder = tmp_path_factory.mktemp("mutated")
    (folder / f"a{kind}").write_bytes(data)
    try:
        fold_checkpoint(folder / f"a{kind}", folder / f"b{kind}")
    except WnsurgeryError:
        assert [p.name for p in folder.iterdir()] == [f"a{kind}"]


def test_the_old_serialisation_stays_in_its_file_too(tmp_path: Path) -> None:
    """A file from before torch 1.6 is read tensor by tensor, ties, views and odd strides as torch.load has them."""
    of_its_time = {k: t for k, t in content().items() if k not in ("f8", "u16")}  # torch cannot read its own here
    torch.save(of_its_time, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    stored, theirs = map_store(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    assert stored is not None
    assert stored.source is not None
    mine = dict(every_tensor(stored.content))
    for name, tensor in every_tensor(theirs):
        fetched = stored.source.fetch(mine[name])
        assert (fetched.dtype, fetched.stride()) == (tensor.dtype, tensor.stride())
        assert fetched.tolist() == tensor.tolist()
    stored.source.close()
    fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    torch.save(of_its_time, tmp_path / "c.pt")
    fold_checkpoint(tmp_path / "c.pt", tmp_path / "d.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_cut_file_of_the_old_serialisation_is_damaged(tmp_path: Path, cut: int) -> None:
    """Storages that end early are an input error before anything is written."""
    torch.save(content(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    os.truncate(tmp_path / "a.pt", (tmp_path / "a.pt").stat().st_size - cut)
    with pytest.raises(InputError):
        fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def negated(*shape: int) -> torch.Tensor:
    """A tensor whose values torch keeps as the negative of what lies in memory."""
    return torch.view_as_complex(torch.randn(*shape, 2)).conj().imag


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["o.pt", "o.safetensors"])
def test_negated_and_conjugated_tensors_keep_their_values(tmp_path: Path, old: bool, name: str) -> None:
    """What torch has yet to negate or conjugate is read, folded, converted and written with its sign."""
    torch.manual_seed(0)
    g, v, w = torch.rand(4, 1), negated(4, 3), torch._neg_view(torch.randn(5, 2).bfloat16()).t()
    z = torch.randn(3, dtype=torch.complex64).conj()
    source, output = tmp_path / "a.pt", tmp_path / name
    state = {"a.weight_g": g, "a.weight_v": v, "w.weight": w, "z": z, "c.bias": negated(4)}
    torch.save(state, source, _use_new_zipfile_serialization=not old)
    for convert in (False, True):
        if convert:
            convert_checkpoint(source, output, layout="legacy", force=True)
        else:
            fold_checkpoint(source, output)
        found = dict(every_tensor(read_store(output).content))
        if convert:
            fold_state(found)
            fold_checkpoint(output, tmp_path / f"again-{name}")
            again = dict(every_tensor(read_store(tmp_path / f"again-{name}").content))
            assert torch.equal(again["w.weight"], w)
        assert torch.equal(found["a.weight"], compose(g, v.resolve_neg().clone()))
        assert all(torch.equal(found[key], state[key]) for key in ("w.weight", "z", "c.bias"))


def test_a_negative_bit_that_a_type_cannot_have(tmp_path: Path) -> None:
    """A negated tensor of bool comes from no arithmetic; where its values are needed, that is the file's fault."""
    state = {"a.weight_g": torch.ones(2, 1), "a.weight_v": torch.ones(2, 2), "b": torch._neg_view(torch.ones(2).bool())}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match="marked as negated"):
        fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.safetensors")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_directories_keep_the_sign_of_negated_tensors(tmp_path: Path) -> None:
    """A Hugging Face directory and a distributed checkpoint fold to the same sign as the tensors have."""
    import torch.distributed.checkpoint as dcp

    state = {"a.weight_g": torch.rand(4, 1), "a.weight_v": negated(4, 3)}
    expected = compose(state["a.weight_g"], state["a.weight_v"].resolve_neg().clone())
    (tmp_path / "hub").mkdir()
    torch.save(state, tmp_path / "hub" / "pytorch_model.bin")
    dcp.save(dict(state), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for kind in ("hub", "dcp"):
        fold_checkpoint(tmp_path / kind, tmp_path / f"{kind}.pt")
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt", weights_only=True)["a.weight"], expected)


def damaged(source: Path, target: Path, values: bytes) -> None:
    """The same archive with one byte of some values turned, which their checksum tells."""
    whole = bytearray(source.read_bytes())
    assert whole.count(values) == 1
    whole[whole.find(values)] ^= 1
    target.write_bytes(whole)


@pytest.mark.parametrize("dry", [False, True])
def test_damage_in_what_is_only_kept_is_told(tmp_path: Path, dry: bool) -> None:
    """A wrong checksum is an error also where nothing computed needs the values, and where nothing is written."""
    bias = torch.tensor([1.5, 2.5, 3.25, 4.125])
    torch.save({"c.weight_g": torch.ones(4, 1), "c.weight_v": torch.randn(4, 3), "c.bias": bias}, tmp_path / "a.pt")
    damaged(tmp_path / "a.pt", tmp_path / "b.pt", bias.numpy().tobytes())
    with pytest.raises(InputError, match="damaged"):
        fold_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt", dry_run=dry)
    assert not (tmp_path / "c.pt").exists()


def test_a_manifest_never_takes_the_place_of_a_file_of_the_input(tmp_path: Path) -> None:
    """Not even where files may be replaced, and the input is a directory."""
    source = tmp_path / "model"
    source.mkdir()
    torch.save(content()["sd"], source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="this is the input"):
        fold_checkpoint(source, tmp_path / "out", manifest=source / "config.json", force=True)
    assert (source / "config.json").read_text() == "{}"
    assert not (tmp_path / "out").exists()


def test_a_manifest_holds_values_not_how_they_are_kept() -> None:
    """A tensor that is conjugated or negated without a copy has the hash of its values."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    for lazy, values in ((z.conj(), [1 - 2j, 3 + 4j]), (torch._neg_view(z), [-1 - 2j, -3 + 4j])):
        assert tensor_digest(lazy) == hashlib.sha256(np.array(values, np.complex64).tobytes()).hexdigest()


def test_the_worst_weight_is_named_wherever_it_stands() -> None:
    """The distance in the report is the largest, and that of a pair that stores log g, too, is one of rounding."""
    state = {}
    for name, v in (("a", [[3.0, 4.0]]), ("b", [[0.1, 0.7]]), ("c", [[3.0, 4.0]])):
        state |= {f"{name}.weight_g": torch.tensor([[10.0]]), f"{name}.weight_v": torch.tensor(v)}
    logs = {"weight_g": torch.tensor([[0.5]]), "weight_v": torch.tensor([[0.1, 0.7]])}
    for content_, worst in ((state, "b.weight"), (logs | {"weight_log_scale": torch.ones((), dtype=bool)}, "weight")):
        maker = AtOnce(judge=True)
        fold_with(maker, dict(content_))
        assert maker.worst == worst
        assert maker.max_ulp is not None
        assert 0 < maker.max_ulp < 1.5
