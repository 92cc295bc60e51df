"""Exported runs in an environment that the package was never installed in."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.exports import assert_equal_to_the_runs, exports, outputs_elsewhere, runs  # noqa: F401  # two are fixtures


@pytest.mark.slow
def test_exported_runs_load_in_an_environment_without_the_package(runs, exports, tmp_path):  # noqa: F811
    """It has the libraries of this one, but not the hook that makes an editable install of the package importable."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # .pth files in there are not read
    absent = subprocess.run([python, "-I", "-c", "import unet_diffusion"], capture_output=True, text=True)
    assert "No module named 'unet_diffusion'" in absent.stderr
    assert Path(sys.prefix) != folder
    assert_equal_to_the_runs(outputs_elsewhere(python, "", exports, tmp_path), runs)
