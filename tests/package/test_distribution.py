"""The files of an installed copy, and the class names in a saved pipeline."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import unet_diffusion
from unet_diffusion import UNet

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (".py", ".pyi", ".json", ".md", ".png", ".ipynb")  # the files of the folders that a source archive contains


def test_a_saved_pipeline_names_the_class_by_its_module():  # this path is part of the checkpoint format
    assert DDPMPipeline(UNet.from_preset("tiny"), DDPMScheduler()).config["unet"] == ("unet_diffusion.unet", "UNet")


@pytest.mark.slow
def test_importing_the_package_is_enough_to_load_a_pipeline_without_a_warning(tmp_path):
    DDPMPipeline(UNet.from_preset("tiny"), DDPMScheduler()).save_pretrained(tmp_path)
    code = f"import unet_diffusion, diffusers; diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if line.strip() and "Loading pipeline components" not in line]
    assert lines == []


def test_version_is_stated_once():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert metadata["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "unet_diffusion.version.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(unet_diffusion.__version__)}\]", changelog, re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [unet_diffusion.__version__]


def test_everything_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(line).name) for line in wanted}
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("unet_diffusion/**/*.py")]
    nodes = list(chain.from_iterable(map(ast.walk, trees)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    distributions = packages_distributions()
    for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"unet_diffusion"}:
        if module in distributions:  # otherwise an extra that is not installed here
            assert declared & set(map(canonicalize_name, distributions[module])), f"{module} is not declared"


def test_no_link_is_tracked_since_a_checkout_on_windows_may_have_none():
    tracked = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in tracked.stdout.splitlines() if line.startswith("120000")] == []


@pytest.mark.slow
def test_the_wheel_holds_everything_that_is_imported(tmp_path):
    """Built from the source archive, installed without the checkout, every module imported and every preset read."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(build, check=True, capture_output=True, text=True)
    assert "would be ignored" not in built.stdout + built.stderr  # setuptools would warn of a folder without a package
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        held = {name.partition("/")[2] for name in members.getnames()}
    tracked = [str(p.relative_to(source)) for p in source.glob("*/**/*") if p.suffix in SHIPPED and p.is_file()]
    assert [name for name in tracked if name not in held] == []
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "environment", with_pip=True, system_site_packages=False)
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("unet_diffusion/**/[a-z]*.py")
    ]
    modules += [f"unet_diffusion.pipelines.{path.stem}" for path in (ROOT / "pipelines").glob("[a-z]*.py")]
    faces = [".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("unet_diffusion/**/__init__.pyi")]
    assert len(faces) > 8
    code = (
        f"import sys; sys.path.append({next(p for p in sys.path if p.endswith('site-packages'))!r})\n"  # dependencies
        "import importlib, unet_diffusion\n"
        f"assert 'environment' in unet_diffusion.__file__, unet_diffusion.__file__\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
        f"for name in {sorted(faces)!r}:\n"
        "    face = importlib.import_module(name)\n"
        "    assert face.__all__ and all(hasattr(face, public) for public in face.__all__), name\n"
        f"for name in {sorted(p.stem for p in (ROOT / 'unet_diffusion' / 'presets').glob('*.json'))!r}:\n"
        "    unet_diffusion.UNet.from_preset(name, channels=(16, 32), attention=(False, False))\n"
    )
    subprocess.run([python, "-I", "-c", code], check=True, cwd=tmp_path)
