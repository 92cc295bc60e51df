"""Late imports, and imports under former names."""

import subprocess
import sys
import warnings
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

import unet_diffusion
from unet_diffusion import importing

ROOT = Path(__file__).resolve().parents[1]
FACES = ("network", "images", "diffusion", "segmentation", "data", "data.masked", "training", "evaluation", "tasks")


def in_a_new_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    assert in_a_new_process("import sys, unet_diffusion; print({'torch', 'diffusers'} & set(sys.modules))") == "set()"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import torch, diffusers"])
def test_threads_that_start_at_once_get_the_classes_of_the_modules_whatever_was_imported_first(first):
    """While torch is imported, it inspects all imported modules, also those that have not run yet.

    The package can then be reloaded, and lists its names.
    """
    code = f"""
{first}
import threading, unet_diffusion, torch, diffusers
found = []
threads = [threading.Thread(target=lambda: found.append(unet_diffusion.UNet)) for _ in range(8)]
for step in (threading.Thread.start, threading.Thread.join):
    for thread in threads:
        step(thread)
assert len(found) == 8 and set(found) == {{unet_diffusion.UNet}}
import unet_diffusion.stock_unet as module
assert "UNet2DAdapter" in vars(module) and type(module).__name__ == "module"
from unet_diffusion.adapters import *
print(unet_diffusion.UNet.__module__, unet_diffusion.UNet2DAdapter.__module__, PixelClassifier.__module__)

import importlib, pickle, sys
UNet = unet_diffusion.UNet
importlib.reload(unet_diffusion)
assert unet_diffusion.UNet is UNet and pickle.loads(pickle.dumps(UNet)) is UNet
from unet_diffusion.pipelines import SegmentationPipeline
assert sum(type(finder).__name__ == "FormerNames" for finder in sys.meta_path) == 1
assert set(unet_diffusion.__all__) <= set(dir(unet_diffusion))
"""
    assert in_a_new_process(code) == "unet_diffusion.unet unet_diffusion.stock_unet unet_diffusion.adapters"


def test_a_late_module_that_fails_says_so_each_time(tmp_path, monkeypatch):
    (tmp_path / "late_and_broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importing.import_late("late_and_broken")
    monkeypatch.delitem(sys.modules, "late_and_broken")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            module.value  # noqa: B018


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Unet'"):
        unet_diffusion.Unet  # noqa: B018


@pytest.mark.parametrize("name", importing.MOVED)
def test_a_documented_module_is_importable_under_its_former_name(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"unet_diffusion.{name}", raising=False)
    places = [f"unet_diffusion.{place}" for place in importing.MOVED[name].split()]
    with pytest.warns(DeprecationWarning, match=places[0]):
        former = import_module(f"unet_diffusion.{name}")
    for place in places:
        module = import_module(place)
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == place]
        assert all(getattr(former, key) is getattr(module, key) for key in own)


def test_former_imports_of_documents_and_model_cards_work():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from unet_diffusion.classifier import PictureClassifier
        from unet_diffusion.palette import mask_picture
        from unet_diffusion.sampling import sampler
        from unet_diffusion.single_file import load_single_file  # noqa: F401
    from unet_diffusion.diffusion.sampling import sampler as current
    from unet_diffusion.evaluation.classifier import ImageClassifier
    from unet_diffusion.images.palette import mask_image

    assert (sampler, PictureClassifier, mask_picture) == (current, ImageClassifier, mask_image)


@pytest.mark.parametrize("folder", FACES)
def test_each_folder_hands_on_its_public_names(folder):
    face = import_module(f"unet_diffusion.{folder}")
    assert face.__all__
    for name in face.__all__:
        value = getattr(face, name)
        assert value.__module__.startswith(f"unet_diffusion.{folder}"), name


def test_each_folder_says_in_a_sentence_what_it_is_for():
    for path in chain(ROOT.glob("unet_diffusion/**/__init__.py"), [ROOT / "pipelines" / "__init__.py"]):
        module = ".".join(path.parent.relative_to(ROOT).parts).replace("pipelines", "unet_diffusion.pipelines")
        text = import_module(module).__doc__
        assert text and text.strip().splitlines()[0].endswith("."), module
