"""What is handed out: the wheel holds the package and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    """Every tracked file of the package, `py.typed` among them, and the metadata; nothing that runs leave behind."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    tracked = [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    litter = ["tests/__pycache__/test_old.cpython-311.pyc", "wnsurgery/__pycache__/old.cpython-311.pyc", "model.pt"]
    source, out = tmp_path / "source", tmp_path / "dist"
    for name in [*tracked, *litter]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name in litter:
            (source / name).write_bytes(b"")
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {name for name in tracked if name.startswith("wnsurgery/")}
    assert "wnsurgery/py.typed" in package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
