"""The plan: what is selected, what is not and why, and that nothing is missing from it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import dynamic as quantized
from torch.nn.utils import parametrizations, parametrize, prune

import wnsurgery as wn
from wnsurgery import layers
from wnsurgery.checkpoint import fold_state
from wnsurgery.walk import modules_of, slots

from nets import NETS, SameConvTwice, TiedLanguageModel, net


def chosen(model: nn.Module, **options: Any) -> list[str]:
    return [site.fqn for site in wn.plan_weight_norm(model, **options).sites]


def reason(model: nn.Module, name: str, **options: Any) -> str:
    return {s.name: s.reason for s in wn.plan_weight_norm(model, **options).skipped}[name]


@pytest.mark.parametrize("name", NETS)
def test_every_tensor_is_in_the_plan_once(name: str) -> None:
    """Each parameter and buffer of a model is a site or is skipped with a sentence, by one of its names."""
    model, _ = net(name)
    plan = wn.plan_weight_norm(model)
    sites = [owner.fqn for site in plan.sites for owner in site.owners]
    names = sites + [s.name for s in plan.skipped]
    assert len(names) == len(set(names))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    aliases = {n for site in plan.sites for owner in site.owners for n in owner.names}
    assert set(tensors) <= set(names) | aliases | {n for n in tensors if n.startswith("net.0.")}
    assert all(s.reason for s in plan.skipped)
    assert all(site.weight.ndim > 1 for site in plan.sites)
    assert str(len(plan.sites)) in str(plan)


@pytest.mark.parametrize("name", NETS)
def test_the_walker_without_plain_tensors(name: str) -> None:
    """Asked for what is parametrized, the walker finds that alone, as it does among everything else."""
    model, _ = net(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        legacy = nn.utils.weight_norm(nn.Linear(3, 4))
    model.extra = nn.ModuleList([parametrizations.weight_norm(nn.Linear(3, 4)), legacy])
    model.other = parametrizations.orthogonal(nn.Linear(3, 3))
    for _ in range(2):
        forms = ("ours", "torch", "legacy", "other")
        assert slots(model, plain=False) == [slot for slot in slots(model) if slot.form in forms]
        names = [n for n, _ in model.named_modules() if "parametrizations" not in n.split(".")]
        assert {id(m) for m in modules_of(model)} == {id(model.get_submodule(n)) for n in names}
        wn.apply_weight_norm(model)


def test_rows_of_the_table() -> None:
    """Kept axes per layer type are those of the design: one magnitude per output channel."""
    expected = {
        nn.Linear(3, 4): {"weight": (4, 1)},
        nn.Bilinear(2, 3, 4): {"weight": (4, 1, 1)},
        nn.Conv1d(4, 6, 3, groups=2): {"weight": (6, 1, 1)},
        nn.Conv3d(2, 3, 2): {"weight": (3, 1, 1, 1, 1)},
        nn.ConvTranspose1d(4, 6, 3): {"weight": (1, 6, 1)},
        nn.ConvTranspose2d(4, 6, 3, groups=2): {"weight": (2, 3, 1, 1)},
        nn.ConvTranspose3d(2, 3, 2): {"weight": (1, 3, 1, 1, 1)},
        nn.LSTM(3, 4, proj_size=2): {"weight_ih_l0": (16, 1), "weight_hh_l0": (16, 1), "weight_hr_l0": (2, 1)},
        nn.GRUCell(3, 4): {"weight_ih": (12, 1), "weight_hh": (12, 1)},
        nn.MultiheadAttention(4, 2): {"in_proj_weight": (12, 1), "out_proj.weight": (4, 1)},
        nn.MultiheadAttention(4, 2, kdim=3): {
            "q_proj_weight": (4, 1),
            "k_proj_weight": (4, 1),
            "v_proj_weight": (4, 1),
            "out_proj.weight": (4, 1),
        },
    }
    for module, magnitudes in expected.items():
        sites = wn.plan_weight_norm(module).sites
        assert {s.fqn: s.axes.magnitude_shape(s.weight.shape) for s in sites} == magnitudes, module


def test_transformers_rows_without_importing_transformers() -> None:
    """transformers' Conv1D keeps axis 1; 3-D expert weights keep experts and outputs, in either order."""
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(6, 3)
    (site,) = wn.plan_weight_norm(conv).sites
    assert site.axes.magnitude_shape(site.weight.shape) == (1, 6)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(vocab_size=9, intermediate_size=12, num_local_experts=3, **sizes)
    plan = wn.plan_weight_norm(transformers.MixtralForCausalLM(config))
    shapes = {
        s.fqn.rpartition(".")[2]: s.axes.magnitude_shape(s.weight.shape) for s in plan.sites if s.weight.ndim == 3
    }
    assert shapes == {"gate_up_proj": (3, 24, 1), "down_proj": (3, 8, 1)}
    config = transformers.GptOssConfig(vocab_size=9, intermediate_size=12, num_local_experts=3, head_dim=4, **sizes)
    plan = wn.plan_weight_norm(transformers.GptOssForCausalLM(config))
    shapes = {
        s.fqn.rpartition(".")[2]: s.axes.magnitude_shape(s.weight.shape) for s in plan.sites if s.weight.ndim == 3
    }
    assert shapes == {"gate_up_proj": (3, 1, 24), "down_proj": (3, 1, 8)}


@pytest.fixture
def registry() -> Any:
    """Lets a test register layers and forgets them afterwards."""
    kept = dict(layers._by_type), dict(layers._by_name)
    yield
    for table, before in zip((layers._by_type, layers._by_name), kept, strict=True):
        table.clear()
        table.update(before)  # type: ignore[attr-defined]
    layers._row_named.cache_clear()


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel + self.shift


@pytest.mark.parametrize("key", [Mixer, f"{Mixer.__module__}.Mixer", "*.Mixer"])
def test_register_layer(registry: None, key: Any) -> None:
    """A user's class is unknown until registered, by type, dotted name or glob; then converts and initialises."""
    with pytest.raises(wn.SelectionError, match="no weight"):
        wn.plan_weight_norm(Mixer())
    wn.register_layer(key, {"kernel": 1}, bias="shift", output_axis=-1)
    model = wn.apply_weight_norm(Mixer())
    assert model.parametrizations.kernel.original0.shape == (1, 3)  # type: ignore[union-attr]
    x = torch.randn(200, 5)
    wn.data_dependent_init(model, x)
    assert torch.allclose(model(x).std(0, unbiased=False), torch.ones(3), atol=1e-4)
    with pytest.raises(TypeError):
        wn.register_layer(3)  # type: ignore[arg-type]
    with pytest.raises(wn.SelectionError):
        wn.register_layer(key, {})


@pytest.mark.parametrize(
    "row",
    [
        {"parameters": {"kernel": None}},
        {"parameters": {"kernel": "x"}},
        {"parameters": {"kernel": True}},
        {"parameters": {"kernel": (0, "a")}},
        {"parameters": {1: 0}},
        {"parameters": 3},
        {"bias": 3},
        {"output_axis": "x"},
        {"output_axis": True},
        {"output_axis": 1.0},
    ],
)
def test_rows_of_wrong_types_are_refused_at_registration(registry: None, row: dict[str, Any]) -> None:
    """What can be known of a row without a layer is told when it is registered, and nothing is registered then."""
    with pytest.raises(wn.SelectionError, match="register_layer"):
        wn.register_layer(Mixer, **{"parameters": {"kernel": 1}, **row})
    assert layers.layer_of(Mixer()) is None


def test_rows_that_do_not_fit_their_layer_name_it(registry: None) -> None:
    """What only a layer can show is an error with its name, or a reason in the report of the initialisation."""
    model = nn.Sequential(nn.Linear(5, 5), Mixer())
    for row, words in (
        ({"parameters": {"kernel": 5}}, r"1\.kernel \(Mixer\): kept axes \(5,\)"),
        ({"parameters": {"kernel": lambda m: "x"}}, r"Mixer\.kernel: kept axes are"),
        ({"bias": "no_such"}, r"1\.kernel \(Mixer\): it has no 'no_such'"),
    ):
        wn.register_layer(Mixer, **{"parameters": {"kernel": 1}, **row})  # type: ignore[dict-item]
        with pytest.raises(wn.PairError, match=words):
            wn.apply_weight_norm(model)
        assert not wn.is_weight_normed(model)
    for axis in (7, -7):
        wn.register_layer(Mixer, {"kernel": lambda m: -1}, bias="shift", output_axis=axis)
        report = wn.data_dependent_init(wn.apply_weight_norm(model), torch.randn(30, 5))
        assert [layer.name for layer in report.initialised] == ["0.weight"]
        assert "not one value per output channel" in report.left[0].reason
        wn.fold_weight_norm(model)
    wn.register_layer(Mixer, {"kernel": -1}, bias="shift", output_axis=1)
    assert len(wn.data_dependent_init(wn.apply_weight_norm(model), torch.randn(30, 5)).initialised) == 2
    wn.register_layer(Mixer, {"kernel": 1}, bias="no_such", output_axis=1)
    with pytest.raises(wn.PairError, match=r"1\.kernel"):
        wn.data_dependent_init(model, torch.randn(30, 5))


def tower() -> nn.Module:
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(4, 4, 1))
    model.attention = nn.MultiheadAttention(4, 2)
    model.table = nn.Embedding(5, 4)
    model.head = nn.Linear(4, 2)
    return model


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {},
            [
                "encoder.0.weight",
                "encoder.2.weight",
                "attention.in_proj_weight",
                "attention.out_proj.weight",
                "head.weight",
            ],
        ),
        ({"include": nn.Linear}, ["encoder.0.weight", "attention.out_proj.weight", "head.weight"]),
        ({"include": nn.MultiheadAttention}, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ({"include": "encoder"}, ["encoder.0.weight", "encoder.2.weight"]),
        ({"include": "encoder.*", "exclude": nn.Conv1d}, ["encoder.0.weight"]),
        ({"include": "head.weight"}, ["head.weight"]),
        ({"include": "head"}, ["head.weight"]),
        ({"include": "table"}, ["table.weight"]),
        ({"include": "re:proj|^head"}, ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]),
        ({"include": lambda m, n: isinstance(m, nn.Linear) and n == "head"}, ["head.weight"]),
        ({"include": ["head", [nn.Conv1d]]}, ["encoder.2.weight", "head.weight"]),
        ({"exclude": ["encoder", "attention.*"]}, ["head.weight"]),
    ],
)
def test_selections(options: dict[str, Any], names: list[str]) -> None:
    """Types, containers, globs, regular expressions, predicates and sequences of them select as documented."""
    assert chosen(tower(), **options) == names


@pytest.mark.parametrize("option", ["include", "exclude", "dim"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    """A misspelt pattern is an error that lists near names, never a silent no-op."""
    wish: Any = {"hed.weight": 0} if option == "dim" else "hed.weight"
    with pytest.raises(wn.SelectionError, match=r"hed\.weight") as caught:
        wn.apply_weight_norm(tower(), **{option: wish})
    assert "head.weight" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_nothing_to_convert_is_an_error() -> None:
    """A model without a weight to convert is an error that says why; one already converted is not."""
    for model in (nn.ReLU(), nn.Sequential(nn.LayerNorm((2, 2))), nn.Embedding(3, 2)):
        with pytest.raises(wn.SelectionError, match="no weight"):
            wn.apply_weight_norm(model)
    wn.apply_weight_norm(wn.apply_weight_norm(nn.Linear(2, 2)))


def test_bad_patterns_and_axes() -> None:
    """Selections and axes of the wrong kind are errors."""
    for options in (
        {"include": 3},
        {"include": "re:("},
        {"dim": "first"},
        {"dim": 7},
        {"dim": {"head.*": 5}},
        {"dim": 1.5},
        {"dim": {0: 1}},
        {"dim": (0, "a")},
        {"dim": True},
        {"dim": {"*": (True,)}},
    ):
        with pytest.raises(wn.SelectionError):
            wn.plan_weight_norm(tower(), **options)  # type: ignore[arg-type]
    for kind in ("float32", 1, torch.int8):
        with pytest.raises(wn.SelectionError, match="magnitude_dtype"):
            wn.apply_weight_norm(tower(), magnitude_dtype=kind)  # type: ignore[type-var,arg-type]


def test_dim_by_pattern() -> None:
    """A mapping sets kept axes for the weights it names and leaves the others to the table."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(6, 2))
    shapes = [s.axes.magnitude_shape(s.weight.shape) for s in wn.plan_weight_norm(model, dim={"0.*": 0}).sites]
    assert shapes == [(4, 1, 1), (2, 1)]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:torch.ao.quantization is deprecated")
def test_reasons() -> None:
    """Each kind of tensor that cannot or shall not be converted has its own sentence."""
    model = nn.Module()
    model.good = nn.Linear(2, 2)
    model.lazy = nn.LazyLinear(3)
    model.integer = nn.Linear(2, 2)
    model.integer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    model.sparse = nn.Linear(2, 2)
    model.sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    model.complex = nn.Linear(2, 2, dtype=torch.complex64)
    model.small = nn.Linear(2, 2)
    model.small.weight = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    model.spectral = parametrizations.spectral_norm(nn.Linear(2, 2))
    model.pruned = nn.Linear(2, 2)
    prune.l1_unstructured(model.pruned, "weight", 1)
    model.quantized = quantized.Linear(2, 2)
    model.bounded = nn.Embedding(3, 2, max_norm=1.0)
    model.scattered = nn.Embedding(3, 2, sparse=True)
    model.normed = parametrizations.weight_norm(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.old = nn.utils.weight_norm(nn.Linear(2, 2))
    model.ours = wn.apply_weight_norm(nn.Linear(2, 2))
    model.register_buffer("table", torch.ones(2, 2))
    model.view = nn.Linear(2, 2)
    model.view.weight = nn.Parameter(model.good.weight.data)
    everything = {"include": ["*"]}
    expected = {
        "lazy.weight": "lazy",
        "good.bias": "vector",
        "integer.weight": "int8",
        "sparse.weight": "sparse",
        "complex.weight": "complex",
        "small.weight": "float8",
        "spectral.weight": "_SpectralNorm",
        "pruned.weight_orig": "pruning",
        "quantized.weight": "quantized",
        "bounded.weight": "max_norm",
        "scattered.weight": "sparse=True",
        "normed.weight": "torch's weight norm",
        "old.weight": "legacy",
        "ours.weight": "already weight-normalized",
        "table": "buffer",
        "view.weight": "shares memory with good.weight",
    }
    for name, word in expected.items():
        assert word in reason(model, name, **everything), name
    assert chosen(model, exclude=["good", "view"], include="*") == []


def on_one_tensor(flat: torch.Tensor, **views: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.free = nn.Linear(2, 2)
    for name, view in views.items():
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = nn.Parameter(view)
        setattr(model, name, layer)
    return model


def test_weights_that_share_part_of_their_memory() -> None:
    """Weights that have an element in common with any other tensor of the model are left alone, wherever they start."""
    table = torch.randn(20, 8)
    for view in (table[:10], table[10:], table[3:5], table[:, 2:4], table.view(10, 16)[:, 15:], table.t()[4:]):
        model = on_one_tensor(table, whole=table, part=view)
        assert "shares memory with part.weight" in reason(model, "whole.weight")
        assert "shares memory with whole.weight" in reason(model, "part.weight")
        assert chosen(model) == ["free.weight"]
    model = on_one_tensor(table, a=table[:10], b=table[8:16], c=table[16:])
    model.register_buffer("seen", table[-1])
    assert chosen(model) == ["free.weight"]
    assert "shares memory with seen" in reason(model, "c.weight")
    columns = on_one_tensor(table, a=table[:, :6], b=table[:9, 6:], c=table[8:, 7:], d=table[9:11, 6:7])
    assert chosen(columns) == ["free.weight", "a.weight", "d.weight"]


def test_weights_side_by_side_in_one_storage() -> None:
    """Views of one tensor that have no element in common are converted as weights of their own."""
    flat = torch.randn(64)
    views = {"a": flat[:16].view(4, 4), "b": flat[16:32].view(4, 4), "c": flat[40:].view(2, 12)}
    assert chosen(on_one_tensor(flat, **views)) == ["free.weight", "a.weight", "b.weight", "c.weight"]
    model = on_one_tensor(flat, **views)
    model.flat = nn.Parameter(flat)
    assert chosen(model) == ["free.weight"]
    columns = on_one_tensor(flat, a=flat.view(8, 8)[:, :3], b=flat.view(8, 8)[:, 3:], c=torch.randn(1, 3).expand(5, 3))
    assert chosen(columns) == ["free.weight", "a.weight", "b.weight", "c.weight"]


class LowRank(nn.Module):
    """A weight plus the product of two thin matrices, the second of which a layer makes."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.a, self.inner = nn.Parameter(torch.randn(4, rank)), nn.Linear(rank, 4, bias=False)
        self.register_buffer("scale", torch.ones(1, 1))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w + self.scale * self.inner(self.a)


def test_tensors_inside_another_parametrization() -> None:
    """What somebody else's parametrization holds is in the plan, as a part of it, and a tie to it is left alone."""
    thin = nn.Linear(2, 4, bias=False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), thin, nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", LowRank())
    parametrizations.orthogonal(model[1][0])
    thin.weight = model[0].parametrizations.weight[0].inner.weight
    parts = ["0.parametrizations.weight.0.a", "0.parametrizations.weight.0.scale"]
    for name in (*parts, "0.parametrizations.weight.0.inner.weight"):
        assert reason(model, name, include="*") == "belongs to the parametrization of 0.weight"
    assert reason(model, "1.0.parametrizations.weight.0.base") == "belongs to the parametrization of 1.0.weight"
    assert "belongs to the parametrization of 0.weight" in reason(model, "2.weight")
    assert {id(t) for t in (*model.parameters(), *model.buffers())} <= {id(slot.tensor) for slot in slots(model)}
    assert chosen(model) == ["3.weight"]
    with pytest.raises(wn.SelectionError, match="no weight"):
        wn.plan_weight_norm(parametrize.register_parametrization(nn.Linear(4, 4), "weight", LowRank()))
    wn.fold_weight_norm(wn.apply_weight_norm(model))
    assert "0.parametrizations.weight.0.a" in model.state_dict()


def test_something_else_named_parametrizations() -> None:
    """Layers that a user keeps under that name are ordinary layers; a layer with such an attribute is left alone."""
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(3, 3), "b": nn.Sequential(nn.Conv1d(2, 2, 1))})
    model._tied_weights_keys = {"parametrizations.weight.weight": "weight"}
    names = ["parametrizations.weight.weight", "parametrizations.b.0.weight"]
    assert chosen(model) == names
    assert len(modules_of(model)) == len(list(model.modules()))
    keys = list(model.state_dict())
    wn.apply_weight_norm(model)
    assert "parametrizations.weight.parametrizations.weight.original0" in model.state_dict()
    assert list(wn.fold_weight_norm(model).state_dict()) == keys
    for own in (nn.ModuleDict(), nn.ModuleDict({"extra": nn.Linear(3, 3)}), nn.Linear(3, 3), "a word", None):
        layer = nn.Linear(3, 3)
        layer.parametrizations = own
        both = nn.Sequential(nn.Linear(3, 3), layer)
        assert "`parametrizations` of its own" in reason(both, "1.weight")
        wn.fold_weight_norm(wn.apply_weight_norm(both))
        assert both[1].parametrizations is own


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_is_no_module_or_cannot_change() -> None:
    """TorchScript modules are left alone with a sentence; what is no module is a TypeError."""
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    assert "TorchScript" in reason(model, "1.weight")
    assert chosen(wn.apply_weight_norm(model), include="*") == []
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    functions: tuple[Any, ...] = (wn.apply_weight_norm, wn.fold_weight_norm, wn.plan_weight_norm, wn.is_weight_normed)
    functions += (wn.plan_batch_norm, lambda m: wn.stale_parameters(m, optimizer))
    for function in functions:
        with pytest.raises(TypeError, match="str"):
            function("model.pt")


def test_frozen_and_meta_weights_are_converted() -> None:
    """A frozen weight converts and stays frozen, and says so; a meta weight converts by shape."""
    model, _ = net("frozen")
    assert "frozen" in str(wn.plan_weight_norm(model))
    wn.apply_weight_norm(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("0."))
    with torch.device("meta"):
        assert chosen(nn.Linear(2, 3)) == ["weight"]


def test_ties_follow_each_other() -> None:
    """A tie is converted, excluded and refused as one; conflicting axes leave it alone and say so."""
    model = TiedLanguageModel()
    (tied,) = [s for s in wn.plan_weight_norm(model).sites if s.ties]
    assert [o.fqn for o in tied.owners] == ["embed.weight", "head.weight"]
    assert "excluded" in reason(model, "embed.weight", exclude="head")
    assert chosen(model, include="embed") == ["embed.weight"]
    both = nn.Module()
    both.a, both.b = nn.Linear(4, 4, bias=False), nn.ConvTranspose1d(4, 4, 1, bias=False)
    both.a.weight = nn.Parameter(torch.randn(4, 4, 1))
    both.b.weight = both.a.weight
    both.c = nn.Linear(2, 2)
    assert "different kept axes" in reason(both, "a.weight")


def test_shared_modules_are_done_once_under_all_names() -> None:
    """One module under two names is one site that both names select, and its conversion serves both."""
    model = SameConvTwice()
    for options in ({}, {"include": ["net.0", "net.2"]}, {"include": ["conv1", "net.2"]}):
        assert chosen(model, **options) == ["conv1.weight", "net.2.weight"]
    wn.apply_weight_norm(model)
    assert model.net[0] is model.conv1
    assert "net.0.parametrizations.weight.original0" in model.state_dict()


def test_cycles_and_deep_sharing_end() -> None:
    """A child that points back to its parent, and diamonds of sharing, do not hang the walk."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["_modules"]["parent"] = model
    assert chosen(model) == ["0.weight"]
    inner: nn.Module = nn.Linear(2, 2)
    for _ in range(40):
        inner = nn.Sequential(inner, inner)
    assert len(chosen(inner)) == 1


def test_a_weight_whose_rows_would_have_one_element_each_is_left_alone() -> None:
    """Its g would have the shape of v: in a file nobody could tell that it is one."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 1, groups=4), nn.Conv1d(8, 2, 3), nn.Conv1d(4, 4, 1, groups=4))
    plan = wn.plan_weight_norm(model)
    assert [site.fqn for site in plan.sites] == ["1.weight", "2.weight"]  # the last has one axis, as torch's g has
    assert "a row of its own" in next(s.reason for s in plan.skipped if s.name == "0.weight")
    assert "a row of its own" in wn.plan_weight_norm(model, dim={"1": (0, 1, 2)}).skipped[2].reason
    state = wn.apply_weight_norm(model).state_dict()
    assert len(fold_state(state).folded) == 2
    assert sorted(state) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]
    with pytest.raises(wn.SelectionError):
        wn.apply_weight_norm(nn.Linear(3, 4), dim=(0, 1))
