"""The promises of the default mode, by the same tests, in deferred mode."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import pytest
import torch

import wnsurgery as wn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

SAME = {
    "test_kept": [
        "test_an_evaluation_weight_is_never_stale",
    ],
    "test_mechanism": [
        "one_process_group",
        "test_classes_that_copy_pickle_or_set_attributes_their_own_way",
        "test_data_parallel_replicas",
        "test_fully_sharded_after_converting",
        "test_many_threads_read_one_model",
        "test_meta_then_empty_then_reset",
        "test_partial_writes_and_writes_after_a_step",
        "test_reset_parameters_that_replaces_parameters",
        "test_writing_nan_is_an_error_and_not_a_broken_layer",
    ],
    "test_modes": [
        "test_autocast",
        "test_evaluation_modes",
        "test_export",
        "test_functional_call",
        "test_parametrize_cached",
        "test_vmap_over_an_ensemble",
    ],
    "test_promises": [
        "test_an_error_in_the_middle_changes_nothing",
        "test_applying_twice_is_harmless",
        "test_attributes_on_parameters_survive",
        "test_averaged_model_is_a_copy",
        "test_copies_are_independent",
        "test_every_magnitude_is_used",
        "test_fold_leaves_parameters_in_any_grad_mode",
        "test_fold_takes_all_kinds_in_one_tree",
        "test_pickled_whole",
        "test_recurrent_reset_draws_plain_weights",
        "test_round_trip_changes_no_bit",
        "test_saved_whole_and_loaded_in_another_process",
        "test_state_dicts_cross_both_ways",
        "test_tied_weights_are_one_pair",
        "test_torch_removes_ours",
        "test_training_moves_g_and_v_and_folds_to_the_forward_weight",
    ],
}
for _file, _names in SAME.items():
    globals().update({name: getattr(import_module(_file), name) for name in _names})


@pytest.fixture(autouse=True)
def deferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every conversion enters deferred mode."""
    monkeypatch.setattr(wn, "apply_weight_norm", partial(wn.apply_weight_norm, mode="deferred"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of small weights, too, are written over the weight's, so that these tests are quick."""
    monkeypatch.setattr("wnsurgery.reparam._FRESH", 1 << 16)
