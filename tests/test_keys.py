"""Key algebra: which names are pairs, which only look like it, and which are broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wnsurgery.errors import PairError
from wnsurgery.keys import Pair, find_pairs, is_lookup_name, is_weight_name, pair_of


def fits(g, v):
    """The shapes torch's own weight_norm gives: keepdim over one axis, or a scalar."""
    return g == () or (len(g) == len(v) and all(a in (1, b) for a, b in zip(g, v, strict=True)))


def pairs(shapes):
    return [pair.plain_key for pair in find_pairs(shapes, fits).pairs]


def left(shapes):
    return [key for key, _ in find_pairs(shapes, fits).left]


PARAM = "parametrizations.weight.original"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        ".",
        "..",
        "conv.",
        "module.model_g.dec.ups.0.",
        "a.weight_v.b.",
        "with space.",
        "x\n.y.",
        ".a..b.",
    ],
)
@pytest.mark.parametrize("name", ["weight", "weight_hh_l0", "in_proj_weight", "h_mat", "weight_ih_l3_reverse"])
@pytest.mark.parametrize("layout", ["legacy", "parametrized"])
def test_any_tensor_name_and_prefix_pairs_up(prefix, name, layout):
    """A pair is found whatever the tensor is called and wherever it sits."""
    pair = Pair(prefix, name, layout)
    found = find_pairs({pair.v_key: (4, 3), pair.g_key: (4, 1), "other": (2,)}, fits)
    assert found.pairs == (pair,)
    assert found.left == ()
    assert pair.plain_key == prefix + name


def test_keys_are_spelled_as_torch_spells_them():
    """The three layouts are torch's own spellings, letter by letter."""
    pair = Pair("rnn.", "weight_hh_l0", "legacy")
    assert (pair.g_key, pair.v_key) == ("rnn.weight_hh_l0_g", "rnn.weight_hh_l0_v")
    new = pair.named("parametrized")
    assert new.g_key == "rnn.parametrizations.weight_hh_l0.original0"
    assert new.v_key == "rnn.parametrizations.weight_hh_l0.original1"
    assert pair_of("rnn.weight_hh_l0", "legacy") == pair
    assert pair_of("weight", "legacy").g_key == "weight_g"


@given(st.lists(st.text("a._gv\n", max_size=6) | st.sampled_from([".weight", "a.weight", "weight"]), unique=True))
def test_no_two_weights_get_the_same_keys(names):
    """Pairs of different weights have different keys, dots wherever they stand, and are read back as what they were."""
    for layout in ("legacy", "parametrized"):
        made = [pair_of(name, layout) for name in names]
        keys = [key for pair in made for key in pair.keys]
        assert len(set(keys)) == len(keys)
        assert [pair.plain_key for pair in made] == names
        for pair in made:
            assert find_pairs({pair.g_key: (4, 1), pair.v_key: (4, 3)}, fits).pairs == (pair,)


def test_both_layouts_mixed_come_in_file_order():
    """One dict may hold both layouts; pairs are listed where their first half stands."""
    shapes = {
        "b.weight_v": (4, 3),
        f"a.{PARAM}0": (4, 1),
        f"a.{PARAM}1": (4, 3),
        "b.weight_g": (4, 1),
        "c.weight_g": (),
        "c.weight_v": (2, 2),
    }
    assert pairs(shapes) == ["b.weight", "a.weight", "c.weight"]


@pytest.mark.parametrize(
    "shapes",
    [
        {"c.weight_orig": (4, 3), "c.weight_u": (4,), "c.weight_v": (3,)},
        {"c.weight_bar": (4, 3), "c.weight_u": (4,), "c.weight_v": (3,)},
        {f"c.parametrizations.weight.{k}": s for k, s in [("original", (4, 3)), ("0._u", (4,)), ("0._v", (3,))]},
        {f"c.{PARAM}0": (4, 1), f"c.{PARAM}1": (4, 3), f"c.{PARAM}2": (4, 3)},
        {f"c.{PARAM}0": (4, 1), f"c.{PARAM}1": (4, 3), "c.parametrizations.weight.1._u": (4,)},
        {f"c.{PARAM}0": (4, 2), f"c.{PARAM}1": (2, 3)},
        {f"c.{PARAM}0": (4, 3), f"c.{PARAM}1": (4, 3)},
        {"attn.weight_q": (4, 4), "attn.weight_k": (4, 4), "attn.weight_v": (4, 4)},
        {"cell.weight_i": (4, 4), "cell.weight_f": (4, 4), "cell.weight_g": (4, 4), "cell.weight_o": (4, 4)},
        {"attn.bias_k": (1, 1, 4), "attn.bias_v": (1, 1, 4)},
        {"mu_g": (4, 4), "mu_v": (4, 4)},
        {"to_g": (4, 4)},
        {"lambda_v": (4, 4), "lambda": (4,)},
        {"x.weight_v": (4, 4), "x.weight": (4, 4)},
    ],
    ids=[
        "spectral-hook", "spectral-bar", "spectral-parametrization", "three-originals", "stacked", "low-rank",
        "two-equal", "attention", "lstm-gates", "kv-bias", "two-matrices", "lone-g", "lone-v", "v-beside-plain",
    ],
)  # fmt: skip
def test_look_alikes_are_left_alone(shapes):
    """Spectral norm, other parametrizations and plain names that end in _g or _v are no pairs and no errors."""
    assert pairs(shapes) == []


def test_look_alikes_are_named_with_a_reason():
    """What was left alone although its name looked like a pair is a value with a sentence."""
    found = find_pairs({"c.weight_orig": (4, 3), "c.weight_u": (4,), "c.weight_v": (3,)}, fits)
    assert [key for key, _ in found.left] == ["c.weight_v"]
    assert "spectral" in found.left[0][1]
    assert left({f"c.{PARAM}0": (4, 2), f"c.{PARAM}1": (2, 3)}) == [f"c.{PARAM}0", f"c.{PARAM}1"]


@pytest.mark.parametrize(
    ("shapes", "key", "word"),
    [
        ({"c.weight_g": (4, 1), "c.bias": (4,)}, "c.weight_g", "missing"),
        ({"c.weight_v": (4, 3)}, "c.weight_v", "missing"),
        ({"r.weight_hh_l0_g": (4, 1)}, "r.weight_hh_l0_g", "missing"),
        ({f"c.{PARAM}0": (4, 1)}, f"c.{PARAM}0", "missing"),
        ({f"c.{PARAM}1": (4, 3)}, f"c.{PARAM}1", "missing"),
        ({"c.weight_g": (4, 3), "c.weight_v": (4, 1)}, "c.weight_g", "swapped"),
        ({f"c.{PARAM}0": (4, 3), f"c.{PARAM}1": (4, 1)}, f"c.{PARAM}0", "swapped"),
        ({"c.weight_g": (5, 1), "c.weight_v": (4, 3)}, "c.weight_g", "does not fit"),
        ({"c.weight_g": (4, 1, 1), "c.weight_v": (4, 3)}, "c.weight_g", "does not fit"),
        ({f"c.{PARAM}0": (5, 1), f"c.{PARAM}1": (4, 3)}, f"c.{PARAM}0", "does not fit"),
        ({"c.weight_g": (4, 1), "c.weight_v": (4, 3), "c.weight": (4, 3)}, "c.weight", "plain weight"),
        ({f"c.{PARAM}0": (4, 1), f"c.{PARAM}1": (4, 3), "c.weight": (4, 3)}, "c.weight", "plain weight"),
        (
            {"c.weight_g": (4, 1), "c.weight_v": (4, 3), f"c.{PARAM}0": (4, 1), f"c.{PARAM}1": (4, 3)},
            "c.weight_g",
            "another layout",
        ),
    ],
)
def test_broken_pairs_are_errors_that_name_the_key(shapes, key, word):
    """Half a pair, swapped or misshapen halves, a stale plain weight, and a weight in two layouts are errors."""
    with pytest.raises(PairError) as caught:
        find_pairs(shapes, fits)
    assert caught.value.message.startswith(f"{key}: ")
    assert word in caught.value.message


def test_one_element_norms_and_single_rows_are_pairs():
    """Ambiguous shapes (1,1), (n,1) with the same g, and 1-D biases still fold."""
    assert pairs({"a.weight_g": (1, 1), "a.weight_v": (1, 1)}) == ["a.weight"]
    assert pairs({"a.weight_g": (4, 1), "a.weight_v": (4, 1)}) == ["a.weight"]
    assert pairs({"a.bias_g": (4,), "a.bias_v": (4,)}) == ["a.bias"]


def test_control_characters_never_reach_a_message():
    """A key from a file is escaped in the error that names it."""
    with pytest.raises(PairError) as caught:
        find_pairs({"\x1b[2Jc.weight_g": (4, 1)}, fits)
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2Jc.weight_g" in str(caught.value)


@given(
    st.dictionaries(
        st.text(st.sampled_from("ab._gvweight012"), max_size=24), st.sampled_from([(), (2,), (2, 1), (2, 3)])
    )
)
def test_arbitrary_names_give_pairs_or_pair_errors_only(shapes):
    """No set of names raises anything else than PairError, and every pair found consists of names in the set."""
    try:
        found = find_pairs(shapes, fits)
    except PairError:
        return
    for pair in found.pairs:
        assert pair.g_key in shapes
        assert pair.v_key in shapes
        assert pair.plain_key not in shapes


def test_weight_and_lookup_names():
    """Names torch's layers give weights are known, and embeddings are told by theirs."""
    assert all(map(is_weight_name, ["weight", "a.weight", "r.weight_hr_l0_reverse", "m.q_proj_weight", "c.weight_ih"]))
    assert not any(map(is_weight_name, ["a.bias", "a.weight_g", "running_mean", "weights", "a.weight.b"]))
    assert all(
        map(is_lookup_name, ["emb.weight", "word_embeddings.weight", "transformer.wpe.weight", "Embedding_0.weight"])
    )
    assert not any(map(is_lookup_name, ["member.weight", "conv.weight", "stem.weight"]))
