"""Options are read without the libraries that make `--help` slow, and missing files are refused as early."""

import subprocess
import sys
from pathlib import Path

import pytest

import unet_diffusion
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions

SLOW = ("torch", "diffusers", "datasets", "accelerate", "skimage", "scipy", "pyarrow", "fsspec")
IMPORTS = """
import sys, types
package = types.ModuleType("unet_diffusion")  # without its __init__, which imports the networks
package.__path__ = [sys.argv[1]]
sys.modules["unet_diffusion"] = package
import unet_diffusion.data.folders, unet_diffusion.data.masked.config, unet_diffusion.commands.doctor.command
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_options_import_no_slow_library():
    command = [sys.executable, "-c", IMPORTS, str(Path(unet_diffusion.__file__).parent)]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "unet_diffusion" in imported
    assert not {*SLOW}.intersection(imported)


@pytest.mark.parametrize("name", ["./images", "~/absent", "a/b/c", "a.parquet", "a/*.tar", "user/data.png", "/absent"])
def test_a_missing_file_or_folder_is_named(name):
    with pytest.raises(ValueError, match="there is no such file or folder. Give 'mnist-5000'"):
        check_sources(DataConfig(data=name))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        check_sources(DataConfig(validation_data=name))


@pytest.mark.parametrize("name", ["mnist-5000", "mnist", "user/data", "user/data.v2"])
def test_names_on_the_hub_are_left_to_the_hub(name):
    check_sources(DataConfig(data=name))


def test_existing_paths_are_accepted_and_masks_need_folders(tmp_path):
    (tmp_path / "a.parquet").touch()
    for data in (tmp_path, tmp_path / "a.parquet", tmp_path / "*.parquet"):
        check_sources(DataConfig(data=str(data)))
    check_sources(MaskedDataConfig(data=str(tmp_path), masks=str(tmp_path)))
    with pytest.raises(ValueError, match="masks is /absent, which is not a folder"):
        check_sources(MaskedOptions(data=str(tmp_path), masks="/absent"))
    with pytest.raises(ValueError, match="data is user/data, which is not a folder; masks and mask_suffix are for"):
        check_sources(MaskedOptions(data="user/data", mask_suffix="_mask"))


@pytest.mark.parametrize("axes", ["WHC", "chw", 3])
def test_axes_have_two_orders(axes):
    with pytest.raises(ValueError, match="axes is .*, but must be 'HWC' or 'CHW', or not given"):
        DataConfig(axes=axes)
    assert MaskedOptions(data="a", axes="CHW").preparation.axes == "CHW"
    assert DataConfig(axes="HWC").preparation.axes == "HWC"
