"""What is handed out: the wheel holds the package and nothing else, the source distribution all that the tests need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in a wheel and in a source distribution, made of what is tracked, beside what runs leave behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    litter = ["tests/__pycache__/test_old.cpython-311.pyc", "wnsurgery/__pycache__/old.cpython-311.pyc", "model.pt"]
    for name in [*tracked, *litter]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name in litter:
            (source / name).write_bytes(b"")
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)
    assert done.returncode == 0, done.stderr
    ((wheel,), (archive,)) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z, tarfile.open(archive) as t:
        files = {member.name.partition("/")[2] for member in t.getmembers() if member.isfile()}
        return set(z.namelist()), files


def test_the_wheel_holds_the_package_alone(tracked: list[str], built: tuple[set[str], set[str]]) -> None:
    """Every tracked file of the package, `py.typed` among them, and the metadata."""
    wheel, _ = built
    package = {name for name in wheel if ".dist-info/" not in name}
    assert package == {name for name in tracked if name.startswith("wnsurgery/")}
    assert "wnsurgery/py.typed" in package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_source_distribution_holds_what_is_tracked(tracked: list[str], built: tuple[set[str], set[str]]) -> None:
    """With the helpers of the tests, so that the suite runs from it; what builds add to it is named here."""
    _, files = built
    added = {name for name in files if not name.startswith("wnsurgery.egg-info/")} - {"PKG-INFO", "setup.cfg"}
    assert added == set(tracked) - {".gitignore"}
