"""The public face: one sorted list, every name there, nothing heavy imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import wnsurgery


def test_names_are_sorted_and_resolve() -> None:
    """Every name in `__all__` exists, and the list is sorted."""
    names = wnsurgery.__all__[1:]
    assert names == sorted(names)
    for name in wnsurgery.__all__:
        assert getattr(wnsurgery, name) is not None
    assert set(wnsurgery.__all__) <= set(dir(wnsurgery))


def test_each_name_is_declared_where_it_is_defined() -> None:
    """A public name is in the `__all__` of the module that defines it."""
    for name, module in wnsurgery._NAMES.items():
        home = __import__(f"wnsurgery.{module}", fromlist=[name])
        assert name in home.__all__, name


def test_no_function_hides_behind_a_module_of_its_name() -> None:
    """Importing every submodule leaves the public functions callable."""
    for module in set(wnsurgery._NAMES.values()):
        __import__(f"wnsurgery.{module}")
    for name in ("inspect", "verify", "bench", "compose", "fan_init", "fold_weight_norm"):
        assert callable(getattr(wnsurgery, name)), name


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does in any module."""
    with pytest.raises(AttributeError, match="no attribute 'apply_weightnorm'"):
        _ = wnsurgery.apply_weightnorm


def test_importing_the_package_imports_no_torch() -> None:
    """`import wnsurgery` stays cheap until a name is used."""
    code = "import sys, wnsurgery; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
