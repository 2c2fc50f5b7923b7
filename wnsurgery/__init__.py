"""Weight-normalization surgery on neural networks (Salimans & Kingma 2016, arXiv 1602.07868).

    import wnsurgery as wn

    model = wn.apply_weight_norm(model)      # w = g * v / ||v||, bit for bit the same function
    wn.data_dependent_init(model, batch)     # the paper's initialisation
    ...                                      # train
    model = wn.fold_weight_norm(model)       # plain weights again
    wn.export_onnx(model, inputs, "model.onnx")

Questions people ask:

What is g for, and where does it come from? A neuron's weight vector has a length and a direction. g is the length, one
    number per output, and is learned like any other parameter. `apply_weight_norm` sets g = ||w||, which changes
    nothing; `data_dependent_init` sets g = 1 / std and b = -mean / std of the pre-activation over a batch (equation 6).

Is w the normalized weight? No: v / ||v|| is. w is that direction stretched to length |g|, whatever the length of v.

How does it work? The gradient of v is that of w, scaled by g / ||v|| and without its part along w (equation 3): steps
    of v only turn w, steps of g alone change its length.

Why would it converge faster? Steps of v are at right angles to v, so plain gradient descent only ever lengthens it.
    A step that is too large makes ||v|| grow and later turns smaller, so that a wide range of learning rates works
    (section 2.1; with momentum or Adam only roughly). What it wins is speed, not final error: alone, 8.46 % against
    8.43 % on CIFAR-10 in the paper.

How does it compare with an L2 penalty? The penalty pulls weights to zero and moves the optimum. Weight norm moves no
    optimum, only the path there. A penalty on v leaves the function as it is and raises the effective step; penalise g
    for smaller weights.

What if the magnitude is fixed? `apply_weight_norm(model, freeze_magnitude=True)`: rows keep their norm and only turn.

Can it have its own learning rate? g and v are parameters of their own, `original0` and `original1`;
    `weight_norm_param_groups(model, lr=1e-3, magnitude_lr=1e-2)` makes the groups for an optimizer. With
    `magnitude="log"` s is trained, g = e^s.

Every error that a function here raises on purpose is a `WnsurgeryError`, and the built-in error one would catch, too
(ValueError, RuntimeError, OSError, ImportError, AssertionError); `.exit_code` is what the command ends with, `.hint`
what to do. Names load on first use: `import wnsurgery` imports nothing heavy.
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
