"""No pickle is read, no code of a run is executed, and nothing is written outside of the output folder."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import unet_diffusion
from tests.reliability import attacks
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.masks import decode_mask

PROMISE = "Hostile files"
PACKAGE = Path(unet_diffusion.__file__).parent
PICKLED = "diffusion_pytorch_model.bin"
SAFE = "diffusion_pytorch_model.safetensors"
COMMANDS = ("sample", "segment", "evaluate", "export", "train-segmentation", "load_unet")
npz = partial(attacks.objects, save=np.savez)

# By fault, each case: its name, the attempt, and what the refusal must say. Without the last, the file must be passed
# over, and the rest must work.
CASES = {
    "weights: .bin, .ckpt, a pickle called .safetensors, .bin beside safetensors; by six commands and functions": [
        (f"{command}: weights as {name}{' beside others' * decoy}", attack, "safetensors|no weights")
        for command in COMMANDS
        for name, content, decoy in (
            (PICKLED, attacks.saved, False),
            (SAFE, attacks.raw, False),
            (PICKLED, attacks.saved, True),
            ("model.ckpt", attacks.raw, False),
        )
        for attack in [attacks.weights(command, content, name, decoy)]
    ],
    "weights as .bin, by from_pretrained of four classes": [
        (f"{kind}.from_pretrained: weights as {PICKLED}", attacks.library(kind), "Unable to load weights")
        for kind in ("UNet", "ImageGenerationPipeline", "SegmentationPipeline", "DDPMPipeline")
    ],
    "a component of other code, or an installed library that runs on import, in model_index.json": [
        (f"{command}: {key} of {entry[0]}", attacks.named(key, entry, command), "trust_remote_code|other code")
        for command in ("sample", "segment", "evaluate", "export")
        for key, entry in (
            ("unet", ["hostile", "UNet"]),
            ("scheduler", ["hostile", "UNet"]),
            ("unet", ["antigravity", "UNet"]),
            ("_class_name", ["hostile", "Pipeline"]),
        )
    ],
    "auto_map to a file beside the weights": [
        (f"{command}: auto_map to other code", attacks.auto_map(command)) for command in COMMANDS
    ],
    "a pickle as a file of a checkpoint, with the right checksum": [
        (f"checkpoint: {name}", attacks.checkpoint(name), "damaged")
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
    ],
    "a pickle as a file of a cache": [
        (f"cache: {name}", attacks.cache(name), "cache .* is damaged", "delete that folder")
        for name in ("labels.npy", "sizes.npy", "info.json")
    ],
    "images and masks: .npy and .npz of objects, a pickle called .png": [
        (f"{kind}: {name}", attacks.image(name, content, read), says)
        for kind, read in (("image", decode_image), ("mask", decode_mask))
        for name, content, says in (
            ("a.npy", attacks.objects, "Python objects"),
            ("a.png", attacks.raw, "not an image"),
            ("a.npz", npz, "not an image"),
        )
    ],
    "PostScript called .png, or opened by Pillow, where Ghostscript is installed": [
        (f"PostScript: {kind}", attacks.with_ghostscript(attempt), says)
        for kind, attempt, says in (
            ("image", attacks.image("a.png", attacks.postscript, decode_image), "it is PostScript"),
            ("mask", attacks.image("a.png", attacks.postscript, decode_mask), "it is PostScript"),
            ("input of segment", attacks.input_file, "it is PostScript"),
            ("images to train on", attacks.image_folder, "it is PostScript"),
            ("Parquet cells", attacks.table("cells", attacks.postscript), "it is PostScript"),
            ("opened by Pillow", attacks.opened, r"EPS, .* give image\.convert"),
        )
    ],
    "large images: .npy of objects, pickles called .npy, pickled chunks in both versions of Zarr": [
        ("large image: .npy of objects", attacks.image("a.npy", attacks.objects, open_image), "Python objects"),
        ("large image: pickle", attacks.image("a.npy", attacks.raw, open_image), "damaged"),
        ("large image: .npz called .npy", attacks.image("a.npy", npz, open_image), "damaged"),
        ("large image: Zarr 2 with pickled chunks", attacks.zarr(2), "cannot be read"),
        ("large image: Zarr 3 with pickled chunks", attacks.zarr(3), "cannot be read"),
    ],
    "members of a WebDataset that its library would unpickle, mapped and streamed": [
        (f"tar: .{suffix} member{', streamed' * streaming}", attacks.tar_member(suffix, content, streaming), *says)
        for streaming in (False, True)
        for suffix, content, says in (
            ("pyd", attacks.raw, ()),
            ("pickle", attacks.raw, ()),
            ("pth", attacks.saved, ()),
            ("npy", attacks.objects, ("Object arrays",)),
            ("npz", npz, ("Object arrays",)),
        )
    ],
    "Parquet cells and type parameters, state of save_to_disk, a data set script": [
        ("Parquet: pickles in its cells", attacks.table("cells"), "no usable image", "not an image"),
        ("Parquet: type with pickled parameters", attacks.table("type")),
        ("save_to_disk folder: pickled state", attacks.saved_to_disk, "damaged or incomplete"),
        ("folder with a script and pickles", attacks.script, "scripts are no longer supported"),
    ],
    "weights of the feature network": [
        ("weights of the feature network", attacks.features, "holds more than tensors"),
    ],
    "names of components and of archive members with ../ and absolute ones": [
        ("export: component ../../stray", attacks.traversal("../../stray"), "not a component"),
        ("export: component with an absolute name", attacks.traversal("/tmp/stray"), "not a component"),
        ("tar: members ../../ and absolute", attacks.tar_paths),
    ],
    "inputs of one name in several folders, and with ..": [
        ("segment: one name in several folders, and ..", attacks.stray_names),
    ],
}


@pytest.mark.parametrize(
    ("fault", "attempt", "says"),
    [pytest.param(fault, attempt, says, id=name) for fault, cases in CASES.items() for name, attempt, *says in cases],
)
def test_hostile_file(fault, attempt, says, sandbox, record_property):
    record_property("fault", fault)
    try:
        if says:
            sandbox.refusal(attempt, *says)
        else:
            attempt(sandbox)
    finally:
        assert not (sandbox.folder / attacks.MARKER).exists(), "THE PAYLOAD RAN"
    record_property("figure", "refused" if says else "harmless")


def test_the_package_calls_nothing_that_unpickles_or_runs_text():
    """Except `torch.load` for the weights that come with a package, which reads only tensors.

    And Pillow is told which formats to open, since it would run PostScript.
    """
    pattern = re.compile(
        r"pickle\.load|allow_pickle=True|joblib|yaml\.|(?<![\w.])(eval|exec)\("
        r"|torch\.load\((?!.*weights_only=True)|Image\.open\((?!.*formats=)"
    )
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "pipelines").glob("*.py")]
    assert len(files) > 50
    lines = [f"{path.name}: {line.strip()}" for path in files for line in path.read_text().splitlines()]
    assert [line for line in lines if pattern.search(line)] == []
