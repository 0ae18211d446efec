"""An installation brings two packages, and nothing else at the top level; `./kernels` alone brings one of them."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: a build leaves folders in its source tree, and two test processes may build at once.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("speedyzero", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    return build(source, out)


def test_the_kernels_install_alone_with_their_licence_and_what_they_import(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    archive = zipfile.ZipFile(build(tmp_path / "kernels", tmp_path / "dist"))
    names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"speedyzero_kernels"}
    modules = [f"speedyzero_kernels/{path.name}" for path in (ROOT / "kernels" / "speedyzero_kernels").glob("*.py")]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(modules)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    needs = {re.split(r"[^\w-]", line)[0] for line in re.findall(r"^Requires-Dist: (.*)", metadata, flags=re.MULTILINE)}
    imports = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(archive.read(name).decode() for name in modules), flags=re.MULTILINE))
    assert needs == imports - set(sys.stdlib_module_names)


def test_the_wheel_holds_the_two_packages_and_the_licence_and_nothing_named_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"speedyzero", "speedyzero_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "speedyzero/templates/report.html" in names
    for package, folder in (("speedyzero", "speedyzero"), ("speedyzero_kernels", "kernels/speedyzero_kernels")):
        modules = {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert modules <= set(names)


def test_both_packages_import_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import speedyzero.loop, speedyzero_kernels.sample; print(speedyzero.__file__, speedyzero_kernels.__file__)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / p / "__init__.py") for p in ("speedyzero", "speedyzero_kernels")]
