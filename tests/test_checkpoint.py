"""State dicts in memory: fold, convert and re-key without the model, everything else untouched."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from fractions import Fraction
from math import isqrt

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from wnsurgery.checkpoint import (
    ByName,
    StateDict,
    convert_state,
    flat_tensors,
    fold_state,
    plan_convert,
    plan_fold,
    state_dicts,
    translate,
)
from wnsurgery.errors import InputError, NonFiniteWeightError, PairError, SelectionError
from wnsurgery.surgery import fold_weight_norm


def legacy(module, name="weight", dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


def seeded(make):
    torch.manual_seed(0)
    return make()


def perturbed(sd):
    """The same state dict as after some training: g no longer the norm of v."""
    generator = torch.Generator().manual_seed(1)
    for tensor in sd.values():
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand(tensor.shape, generator=generator).to(tensor.dtype), alpha=0.1)
    return sd


def pair(g, v, layout="legacy", prefix="c", name="weight"):
    if layout == "legacy":
        return {f"{prefix}.{name}_g": g, f"{prefix}.{name}_v": v}
    return {f"{prefix}.parametrizations.{name}.original0": g, f"{prefix}.parametrizations.{name}.original1": v}


def exact_rows(g, v):
    """g * v / ||v|| over all axes but the first, in rational arithmetic and one correct square root."""
    rows = []
    for gi, row in zip(g.flatten().tolist(), v.reshape(len(v), -1).tolist(), strict=True):
        total = sum(Fraction(x) ** 2 for x in row)
        scale = 1 << 400
        root = Fraction(isqrt(int(total * scale * scale)), scale)
        rows.append([float(Fraction(gi) * Fraction(x) / root) for x in row])
    return torch.tensor(rows, dtype=torch.float64).reshape(v.shape)


# Folding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
def test_folding_gives_the_exact_product(layout):
    """w = g v / ||v|| within 1.5 units in the last place of rational arithmetic."""
    g, v = torch.tensor([[2.0], [0.5], [3.0]]), seeded(lambda: torch.randn(3, 7))
    sd = pair(g, v, layout)
    fold_state(sd)
    exact = exact_rows(g, v)
    spacing = torch.tensor([torch.finfo(torch.float32).eps]) * exact.abs()
    assert list(sd) == ["c.weight"]
    assert ((sd["c.weight"].double() - exact).abs() <= 1.5 * spacing).all()


MODULES = {
    "conv": lambda: nn.Conv1d(4, 6, 3),
    "linear": lambda: nn.Linear(5, 3),
    "one-row": lambda: nn.Linear(300, 1),
    "one-column": lambda: nn.Linear(1, 30),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "depthwise-transposed": lambda: nn.ConvTranspose1d(6, 6, 3, groups=6),
    "conv2d": lambda: nn.Conv2d(3, 4, 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("new", [False, True], ids=["legacy", "parametrized"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_state_dict_folds_to_the_bits_of_the_live_module(kind, new, dim, dtype):
    """Folding the file and folding the module give equal bits, for both of torch's weight norms and any dim."""
    module = seeded(MODULES[kind]).to(dtype)
    module = parametrizations.weight_norm(module, dim=dim) if new else legacy(module, dim=dim)
    perturbed(module.state_dict())
    sd = copy.copy(module.state_dict())
    fold_state(sd)
    fold_weight_norm(module)
    assert sorted(sd) == sorted(module.state_dict())
    assert torch.equal(sd["weight"], module.weight.detach())
    type(module).load_state_dict(seeded(MODULES[kind]).to(dtype), sd, strict=True)


LAYOUT_ROWS = {
    "hifigan": ({"generator": 0}, "ups.0", "weight", (6, 3, 4), (6, 1, 1)),
    "vits": ({"model": 0, "iteration": 7, "learning_rate": 1e-4}, "dec.ups.0", "weight", (6, 3, 4), (6, 1, 1)),
    "rvc": ({"weight": 0, "config": [1, "v2"], "f0": 1}, "dec.conv_pre", "weight", (4, 3, 5), (4, 1, 1)),
    "lightning": ({"state_dict": 0, "epoch": 1}, "model_g.dec.ups.0", "weight", (6, 3, 4), (6, 1, 1)),
    "encodec": ({"best_state": 0}, "encoder.model.0.conv.conv", "weight", (4, 3, 5), (4, 1, 1)),
    "kokoro": ({"decoder": 0, "bert": {"x": 1}}, "module.pool", "weight", (6, 1, 3), (6, 1, 1)),
    "wav2vec2": ({"model": 0, "cfg": None}, "encoder.pos_conv_embed.conv", "weight", (8, 2, 5), (1, 1, 5)),
    "fairseq-tbc": ({"model": 0}, "encoder.convolutions.0", "weight", (3, 4, 8), (1, 1, 8)),
    "dino": ({"student": 0}, "module.head.last_layer", "weight", (9, 4), (9, 1)),
    "neus": ({"sdf_network_fine": 0, "iter_step": 5}, "lin0", "weight", (6, 4), (6, 1)),
    "tcn": ({}, "network.0.conv1", "weight", (4, 3, 2), (4, 1, 1)),
    "ban-vqa": ({"epoch": 1, "model_state": 0}, "logits", "h_mat", (1, 2, 1, 8), ()),
    "lstm": ({}, "rnn", "weight_hh_l0", (12, 3), (12, 1)),
}


@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
@pytest.mark.parametrize("row", LAYOUT_ROWS)
def test_every_layout_seen_in_the_wild_folds(row, layout):
    """Each nesting, key and g shape of known projects folds; all other entries are the same objects."""
    wrapper, prefix, name, v_shape, g_shape = LAYOUT_ROWS[row]
    g, v = seeded(lambda: (torch.rand(g_shape) + 0.5, torch.randn(v_shape)))
    inner = {"first": torch.ones(1), **pair(g, v, layout, prefix, name), "last": torch.ones(2)}
    where = next((k for k, value in wrapper.items() if value == 0), None)
    content = {k: inner if k == where else value for k, value in wrapper.items()} if wrapper else inner
    others = {k: value for k, value in content.items() if k != where} if wrapper else {}
    report = fold_state(content)
    found = content[where] if wrapper else content
    assert list(found) == ["first", f"{prefix}.{name}", "last"]
    axes = [d for d, (a, b) in enumerate(zip(g_shape, v_shape, strict=False)) if a == 1 != b] or list(
        range(len(v_shape))
    )
    if g_shape == ():
        axes = list(range(len(v_shape)))
    expected = v.double() * g.double() / v.double().square().sum(axes, keepdim=True).sqrt()
    assert torch.allclose(found[f"{prefix}.{name}"].double(), expected, rtol=3e-7, atol=0)
    assert all(content[k] is value for k, value in others.items())
    assert len(report.folded) == 1


def test_everything_else_in_the_file_stays():
    """Type, attributes, order and identity of containers, and every other entry, are as before."""
    sd = OrderedDict(
        a=torch.ones(1), **{"c.weight_v": torch.ones(2, 3), "b": torch.ones(2), "c.weight_g": torch.ones(2, 1)}
    )
    sd._metadata = OrderedDict({"": {"version": 1}})
    content = {
        "epoch": 3,
        "sd": sd,
        "same": sd,
        "lr": {"groups": [0.1]},
        "none": None,
        "list": [1, {"x": "y"}],
        5: "int",
    }
    before = copy.deepcopy({k: v for k, v in content.items() if k not in ("sd", "same")})
    report = fold_state(content)
    assert content["sd"] is sd
    assert content["same"] is sd
    assert list(sd) == ["a", "c.weight", "b"]
    assert sd._metadata == OrderedDict({"": {"version": 1}})
    assert str({k: v for k, v in content.items() if k not in ("sd", "same")}) == str(before)
    assert len(report.folded) == 1


def test_ties_stay_ties():
    """A convolution under two names folds to one tensor under two names, and converts back to one pair."""
    g, v = torch.rand(4, 1, 1), torch.randn(4, 3, 2)
    sd = {**pair(g, v, prefix="conv1"), **pair(g, v, prefix="net.0"), **pair(g.clone(), v.clone(), prefix="other")}
    fold_state(sd)
    assert sd["conv1.weight"].data_ptr() == sd["net.0.weight"].data_ptr() != sd["other.weight"].data_ptr()
    convert_state(sd)
    for half in ("original0", "original1"):
        key = f"parametrizations.weight.{half}"
        assert sd[f"conv1.{key}"].data_ptr() == sd[f"net.0.{key}"].data_ptr() != sd[f"other.{key}"].data_ptr()


def test_folding_a_plain_file_does_nothing_and_says_so():
    """No pairs, no change: zero folded is a result, not an error."""
    sd = {"a.weight": torch.ones(2, 2)}
    report = fold_state(sd)
    assert report.steps == ()
    assert list(sd) == ["a.weight"]
    assert "0 weights" in str(report)


def test_an_error_changes_nothing():
    """A broken pair in the last state dict leaves the first one unfolded, too."""
    content = {"a": pair(torch.ones(2, 1), torch.ones(2, 3)), "b": {"c.weight_g": torch.ones(2, 1)}}
    keys = [list(content["a"]), list(content["b"])]
    with pytest.raises(PairError, match=r"^b: c\.weight_g: "):
        fold_state(content)
    assert [list(content["a"]), list(content["b"])] == keys


def test_folded_parameters_are_parameters():
    """A checkpoint of Parameters keeps Parameters, and frozen ones stay frozen."""
    g, v = nn.Parameter(torch.ones(2, 1), requires_grad=False), nn.Parameter(torch.ones(2, 3), requires_grad=False)
    sd = pair(g, v)
    fold_state(sd)
    assert isinstance(sd["c.weight"], nn.Parameter)
    assert not sd["c.weight"].requires_grad
    convert_state(sd)
    assert all(isinstance(t, nn.Parameter) and not t.requires_grad for t in sd.values())
    sd = pair(nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(2, 3)))
    fold_state(sd)
    assert sd["c.weight"].requires_grad
    assert sd["c.weight"].is_leaf


def test_values_that_are_not_finite_are_kept_and_named():
    """NaN in v gives NaN in that row of the folded weight, and a warning that names it."""
    v = torch.ones(2, 3)
    v[0, 1] = torch.nan
    sd = pair(torch.ones(2, 1), v)
    report = fold_state(sd)
    assert sd["c.weight"][0].isnan().any()
    assert sd["c.weight"][1].isfinite().all()
    assert any("c.weight" in w and "NaN" in w for w in report.warnings)


def test_pairs_of_unfit_types_are_errors():
    """A pair of integers or 8-bit floats cannot be folded in silence."""
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(PairError, match=r"c\.weight"):
            fold_state(pair(torch.ones(2, 1), torch.ones(2, 3).to(dtype)))


def test_cycles_and_bottomless_nesting_end():
    """A container that holds itself is walked once; absurd nesting is an input error, not a crash."""
    content = {"sd": pair(torch.ones(2, 1), torch.ones(2, 3))}
    content["self"] = content
    assert len(fold_state(content).folded) == 1
    deep = {"w": torch.ones(1)}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(InputError, match="nested"):
        fold_state(deep)


# Converting ----------------------------------------------------------------------------------------------


def bits(t):
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_convert_then_fold_restores_every_bit(dtype, layout, magnitude):
    """Converting keeps the function bit for bit, zero and extreme rows included, and folding undoes it."""
    w = seeded(lambda: torch.randn(6, 5)).to(dtype)
    w[0] = 0
    w[1] *= 1e-4
    w[2] *= 1e3
    sd = {"a.bias": torch.ones(6), "a.weight": w, "c.weight": w.reshape(6, 5, 1) + 1}
    before = copy.deepcopy(sd)
    report = convert_state(sd, layout=layout, magnitude=magnitude)
    assert [s.name for s in report.converted] == ["a.weight", "c.weight"]
    assert len(sd) == (5 if magnitude == "linear" else 7)
    fold_state(sd)
    assert list(sd) == list(before)
    assert all(torch.equal(bits(sd[k]), bits(before[k])) for k in sd)


def test_converted_state_dicts_load_into_torchs_own_models():
    """The keys and shapes are those torch's weight norm expects, in both layouts."""
    for layout, wrap in (("parametrized", parametrizations.weight_norm), ("legacy", legacy)):
        sd = dict(seeded(lambda: nn.Conv1d(4, 6, 3)).state_dict())
        convert_state(sd, layout=layout)
        wrap(nn.Conv1d(4, 6, 3)).load_state_dict(sd, strict=True)


@pytest.mark.parametrize(("start", "end"), [("legacy", "parametrized"), ("parametrized", "legacy")])
def test_pairs_are_rekeyed_not_recomputed(start, end):
    """Converting what is under weight norm renames its halves; the tensors are the same objects."""
    g, v = torch.rand(2, 1), torch.randn(2, 3)
    sd = {"x": torch.ones(1), **pair(g, v, start), "y": torch.ones(1)}
    report = convert_state(sd, layout=end)
    assert sd == {"x": sd["x"], **pair(g, v, end), "y": sd["y"]}
    assert list(sd)[1:3] == list(pair(g, v, end))
    assert [s.name for s in report.rekeyed] == ["c.weight"]
    assert report.assumptions == ()
    again = convert_state(sd, layout=end)
    assert again.steps == ()
    assert "already" in again.skipped[0].reason


def zoo():
    return {
        "conv.weight": torch.randn(4, 3, 2),
        "conv.bias": torch.randn(4),
        "emb.weight": torch.randn(9, 4),
        "pos_conv_embed.conv.weight": torch.randn(4, 3, 2),
        "bn.weight": torch.randn(4),
        "rnn.weight_ih_l0": torch.randn(12, 4),
        "rnn.weight_hr_l1_reverse": torch.randn(3, 4),
        "attn.in_proj_weight": torch.randn(12, 4),
        "attn.q_proj_weight": torch.randn(4, 4),
        "logits.h_mat": torch.randn(1, 2, 1, 4),
        "q.weight": torch.ones(2, 2, dtype=torch.int8),
        "f8.weight": torch.ones(2, 2).to(torch.float8_e5m2),
        "z.weight": torch.ones(2, 2, dtype=torch.complex64),
        "pos": torch.randn(1, 9, 4),
    }


def test_default_selection_and_reasons():
    """Weights are taken by torch's names; every other tensor of 2 or more dimensions is listed with a reason."""
    sd = zoo()
    report = convert_state(sd)
    assert [s.name for s in report.converted] == [
        "conv.weight", "pos_conv_embed.conv.weight", "rnn.weight_ih_l0", "rnn.weight_hr_l1_reverse",
        "attn.in_proj_weight", "attn.q_proj_weight",
    ]  # fmt: skip
    reasons = {s.name: s.reason for s in report.skipped}
    assert set(reasons) == {"emb.weight", "logits.h_mat", "q.weight", "f8.weight", "z.weight", "pos"}
    assert "lookup" in reasons["emb.weight"]
    assert "int8" in reasons["q.weight"]
    assert all(reasons.values())
    assert any("ConvTranspose" in a for a in report.assumptions)
    assert any("Embedding" in a for a in report.assumptions)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("conv*", None, ["conv.weight"]),
        ("logits", None, ["logits.h_mat"]),
        ("emb.weight", None, ["emb.weight"]),
        (["re:^rnn", "attn.q*"], "re:hr", ["rnn.weight_ih_l0", "attn.q_proj_weight"]),
        (None, ["rnn", "attn", "pos_conv*"], ["conv.weight"]),
        ("model.conv", None, ["conv.weight"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    """Globs, dotted beginnings and re: patterns select, with or without the path in the file."""
    report = convert_state({"model": zoo()}, include=include, exclude=exclude)
    assert [s.name for s in report.converted] == [f"model.{name}" for name in expected]


@pytest.mark.parametrize(
    ("dim", "kept", "shape"),
    [
        ("auto", (0,), (4, 1, 1)),
        (1, (1,), (1, 3, 1)),
        (-1, (2,), (1, 1, 2)),
        ((0, 2), (0, 2), (4, 1, 2)),
        (None, (), ()),
    ],
)
def test_dim(dim, kept, shape):
    """The kept axes can be set for all weights, or per pattern, and g has the shape they say."""
    for option in (dim, {"conv*": dim}):
        sd = {"conv.weight": torch.randn(4, 3, 2), "lin.weight": torch.randn(3, 3)}
        report = convert_state(sd, include=None if isinstance(option, dict) else "conv*", dim=option)
        assert report.converted[0].axes.kept == kept
        assert sd["conv.parametrizations.weight.original0"].shape == shape
    assert report.converted[1].axes.kept == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {"include": "cnov*"},
        {"exclude": "nothing"},
        {"dim": {"nothing.*": 1}},
        {"dim": {"conv*": 7}},
        {"dim": "rows"},
        {"include": "re:("},
        {"include": [nn.Linear]},
    ],
)
def test_options_that_fit_nothing_are_selection_errors(options):
    """A pattern without a match, an axis that is not there and nonsense are usage errors, and change nothing."""
    sd = zoo()
    before = list(sd)
    with pytest.raises(SelectionError):
        convert_state(sd, **options)
    assert list(sd) == before


def test_a_pattern_without_match_names_near_names():
    """The error lists what the pattern may have meant."""
    with pytest.raises(SelectionError) as caught:
        convert_state({"net": zoo()}, include="cnov")
    assert "net.conv.weight" in caught.value.hint
    with pytest.raises(SelectionError):
        convert_state(zoo(), layout="plain")
    with pytest.raises(SelectionError):
        fold_state(zoo(), magnitude="cubic")


def test_a_table_tied_to_a_converted_weight_goes_with_it():
    """Embedding and output layer that share a tensor share one pair; excluding one keeps both plain."""
    w = torch.randn(6, 4)
    sd = {"emb.weight": w, "head.weight": w}
    convert_state(sd)
    assert sd["emb.parametrizations.weight.original1"] is sd["head.parametrizations.weight.original1"]
    sd = {"emb.weight": w, "head.weight": w}
    report = convert_state(sd | {"x.weight": torch.randn(2, 2)}, exclude="emb*")
    assert {s.name: s.reason for s in report.skipped} == {
        "emb.weight": "excluded",
        "head.weight": "tied to emb.weight, which is excluded",
    }


def test_one_tensor_under_two_kept_axes_in_two_state_dicts():
    """What is tied from one state dict to another is made once for each rule, not with the axes that came first."""
    w = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    both = {"rows": {"fc.weight": w}, "columns": {"fc.weight": w}}
    convert_state(both, dim={"rows.*": 0, "columns.*": 1}, layout="legacy")
    assert both["rows"]["fc.weight_g"].tolist() == [[5.0], [5.0]]
    assert both["columns"]["fc.weight_g"].tolist() == [[3.0, 4.0, 5.0]]


def test_weights_that_are_not_finite_are_refused_by_name():
    """NaN would spread over the whole row: converting it is an error that names the weight."""
    sd = {"net": {"a.weight": torch.tensor([[1.0, torch.inf]])}}
    with pytest.raises(NonFiniteWeightError, match=r"^net\.a\.weight: "):
        convert_state(sd)
    assert list(sd["net"]) == ["a.weight"]


def test_new_keys_never_overwrite_others():
    """A key that is taken is an error, not a loss."""
    with pytest.raises(PairError, match="overwritten"):
        convert_state({"a.weight": torch.ones(2, 2), "a.weight_g": None}, layout="legacy")
    with pytest.raises(PairError, match="overwritten"):
        fold_state({**pair(torch.ones(2, 1), torch.ones(2, 3)), "c.weight": "text"})


def test_planning_needs_no_values():
    """Plans come from names, shapes and types alone, so a reader can plan before it reads a tensor."""
    meta = {
        "a.weight": torch.empty(4, 3, device="meta"),
        **pair(torch.empty(2, 1, device="meta"), torch.empty(2, 3, device="meta")),
    }
    steps, _ = plan_fold(StateDict("", meta))
    assert [s.targets for s in steps] == [("c.weight",)]
    steps, _ = plan_convert(StateDict("", meta), ByName(), "parametrized")
    assert [s.action for s in steps] == ["converted", "rekeyed"]


# Looking -------------------------------------------------------------------------------------------------


def test_state_dicts_are_found_at_any_depth_and_optimizers_are_not():
    """Dicts of tensors are found in dicts, lists and tuples; optimizer states are none."""
    t = torch.ones(2, 2)
    content = {"a": {"b": [({"w": t},)]}, "opt": {"state": {0: {"exp_avg": t}}, "param_groups": []}, "ema": {"w": t}}
    assert [s.path for s in state_dicts(content)] == ["a.b.0.0", "ema"]
    assert list(flat_tensors(content)) == ["a.b.0.0.w", "ema.w"]


def test_the_report_is_plain_data_and_reads_as_a_table():
    """The report goes through JSON, and its text names what changed, what did not, and what was assumed."""
    report = convert_state(zoo())
    data = json.loads(json.dumps(report.to_json()))
    assert data["steps"][0]["name"] == "conv.weight"
    assert data["steps"][0]["axes"] == {"kept": [0], "groups": 1}
    text = str(report)
    assert text.startswith("6 converted")
    assert "6 left alone" in text
    assert "assumed: the kept axis is 0" in text
    assert "\x1b" not in str(fold_state(pair(torch.ones(2, 1), torch.ones(2, 3), prefix="\x1b[2J")))


@pytest.mark.parametrize("source", ["plain", "legacy", "parametrized"])
@pytest.mark.parametrize("target", ["plain", "legacy", "parametrized"])
def test_every_layout_translates_into_every_other(source, target):
    """A state dict in any layout loads strictly into a model in any layout and gives the same weight."""

    def model(layout):
        m = seeded(lambda: nn.Linear(5, 3))
        return {"plain": lambda x: x, "legacy": legacy, "parametrized": parametrizations.weight_norm}[layout](m)

    have, want = model(source), model(target)
    have.load_state_dict(perturbed(have.state_dict()))
    have(torch.zeros(1, 5))
    made = translate(StateDict("", dict(have.state_dict())), StateDict("", dict(want.state_dict())))
    want.load_state_dict(made, strict=True)
    want(torch.zeros(1, 5))
    assert torch.allclose(want.weight, have.weight, rtol=5e-7, atol=0)
    assert torch.equal(want.bias, have.bias)


# Log-scale -----------------------------------------------------------------------------------------------


def test_log_scale_is_told_by_the_file_in_both_layouts():
    """A pair that stores s = log g says so: it folds, re-keys and folds again without being told."""
    w = seeded(lambda: torch.randn(4, 3))
    sd = {"a.weight": w.clone()}
    convert_state(sd, magnitude="log")
    assert list(sd) == [
        "a.parametrizations.weight.original0",
        "a.parametrizations.weight.original1",
        "a.parametrizations.weight.0.log_scale",
    ]
    convert_state(sd, layout="legacy")
    assert list(sd) == ["a.weight_g", "a.weight_v", "a.weight_log_scale"]
    convert_state(sd, layout="parametrized")
    fold_state(sd)
    assert list(sd) == ["a.weight"] and torch.equal(bits(sd["a.weight"]), bits(w))


def test_unmarked_logarithms_are_folded_when_told():
    """A file of another program may store log g without a mark: `magnitude` says so, and re-keying adds the mark."""
    g, v = torch.tensor([[-1.0], [2.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    expected = g.exp() * v / v.norm(dim=1, keepdim=True)
    sd = {"weight_g": g, "weight_v": v}
    fold_state(sd, magnitude="log")
    assert torch.allclose(sd["weight"], expected, rtol=1e-6)
    sd = {"weight_g": g, "weight_v": v}
    convert_state(sd, magnitude="log")
    fold_state(sd)
    assert torch.allclose(sd["weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
def test_names_that_begin_with_a_dot_are_names_of_their_own(layout):
    """A weight called ".weight" is not the one called "weight": both are converted, folded, and neither is lost."""
    state = {name: torch.randn(2, 3) for name in ("weight", ".weight", "..weight", "a..weight")}
    before = dict(state)
    convert_state(state, layout=layout)
    assert len(state) == 8
    report = fold_state(state)
    assert len(report.folded) == 4
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("half", ["weight_g", "weight_v"])
def test_half_a_pair_without_values_is_an_error(half):
    """A pair of which one half is a meta tensor folds to nothing, and that is said."""
    state = {"a.weight_g": torch.ones(4, 1), "a.weight_v": torch.ones(4, 3)}
    state[f"a.{half}"] = state[f"a.{half}"].to("meta")
    with pytest.raises(PairError, match="meta tensor"):
        fold_state(state)


def test_an_axis_for_every_element_converts_nothing():
    """g with the shape of v would be no norm, and nobody could tell it from v."""
    state = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5, 1)}
    report = convert_state(state, dim=(0, 1))
    assert [step.name for step in report.converted] == ["b.weight"]
    assert [skip.name for skip in report.skipped if "a row of its own" in skip.reason] == ["a.weight"]
    assert [step.name for step in fold_state(state).folded] == ["b.weight"]
