"""Weight-normalization surgery on neural networks (Salimans & Kingma 2016, arXiv 1602.07868).

    import wnsurgery as wn

    model = wn.apply_weight_norm(model)      # w = g * v / ||v||, bit for bit the same function
    wn.data_dependent_init(model, batch)     # the paper's initialisation
    ...                                      # train
    model = wn.fold_weight_norm(model)       # plain weights again
    wn.export_onnx(model, inputs, "model.onnx")

Names load on first use: `import wnsurgery` imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_NAMES = {
    "Axes": "reparam",
    "BatchNormPlan": "batchnorm",
    "ExportError": "errors",
    "GraphLimits": "onnx_guard",
    "InputError": "errors",
    "InputMissingError": "errors",
    "MeanOnlyBatchNorm1d": "mean_only",
    "MeanOnlyBatchNorm2d": "mean_only",
    "MeanOnlyBatchNorm3d": "mean_only",
    "MissingPackageError": "errors",
    "ModeError": "errors",
    "NonFiniteWeightError": "errors",
    "OutputError": "errors",
    "OutputExistsError": "errors",
    "PairError": "errors",
    "Plan": "plan",
    "ProviderError": "errors",
    "RenormReport": "renormalize",
    "SelectionError": "errors",
    "StaleReport": "param_groups",
    "UnsafeFileError": "errors",
    "VerificationError": "errors",
    "WeightNorm": "reparam",
    "WeightNormMonitor": "monitor",
    "WnsurgeryError": "errors",
    "apply_weight_norm": "surgery",
    "bench": "benchmark",
    "bench_deployment": "deployment",
    "bench_suite": "suite",
    "clamp_magnitude_": "magnitudes",
    "compare_weight_norm": "turning",
    "compose": "reparam",
    "convert_checkpoint": "files",
    "convert_state": "checkpoint",
    "data_dependent_init": "data_init",
    "decompose": "reparam",
    "export_onnx": "export",
    "first_difference": "bisection",
    "fan_init": "fans",
    "fold_checkpoint": "files",
    "fold_onnx": "graph",
    "fold_state": "checkpoint",
    "fold_weight_norm": "surgery",
    "freeze_magnitude": "magnitudes",
    "inspect": "inspection",
    "is_weight_normed": "surgery",
    "keep_magnitude_within": "magnitudes",
    "keep_unit_norm": "renormalize",
    "load_model": "files",
    "load_tensors": "files",
    "open_session": "parity",
    "plan_batch_norm": "batchnorm",
    "plan_weight_norm": "plan",
    "register_layer": "layers",
    "run_folder": "folder",
    "renormalize_": "renormalize",
    "run_onnx": "parity",
    "save_model": "files",
    "set_weight_norm_mode": "modes",
    "stale_parameters": "param_groups",
    "unfreeze_magnitude": "magnitudes",
    "verify": "verification",
    "weight_norm_param_groups": "param_groups",
}

__all__ = ["__version__", *sorted(_NAMES)]  # noqa: PLE0604 - the table above holds strings


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
