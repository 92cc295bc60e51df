"""Hostile files: nothing is unpickled, no code of a run is executed, nothing is written outside of the output."""

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from fault_checks import attacks
from fault_checks.attempts import Case, Place, in_one_line, save_models, try_case
from fault_checks.finding import Finding

from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.masks import decode_mask

PROMISE = "Hostile files"
PICKLED = "diffusion_pytorch_model.bin"
SAFE = "diffusion_pytorch_model.safetensors"
COMMANDS = ("sample", "segment", "evaluate", "export", "train-segmentation", "load_unet")
npz = partial(attacks.objects, save=np.savez)

# Names of `says` are what the refusal has to hold; without them the file is to be passed over, and the rest to work.
WEIGHTS = [
    Case(f"{command}: weights as {name}", attacks.weights(command, content, name, decoy), ("safetensors|no weights",))
    for command in COMMANDS
    for name, content, decoy in (
        (PICKLED, attacks.saved, False),
        (SAFE, attacks.raw, False),
        (PICKLED, attacks.saved, True),
        ("model.ckpt", attacks.raw, False),
    )
]
CODE = [
    Case(f"{command}: {key} of other code", attacks.named(key, entry, command), ("trust_remote_code|other code",))
    for command in ("sample", "segment", "evaluate", "export")
    for key, entry in (
        ("unet", ["hostile", "UNet"]),
        ("scheduler", ["hostile", "UNet"]),
        ("unet", ["antigravity", "UNet"]),
        ("_class_name", ["hostile", "Pipeline"]),
    )
] + [Case(f"{command}: auto_map to other code, passed over", attacks.auto_map(command)) for command in COMMANDS]
STATE = [
    Case(f"checkpoint: {name}", attacks.checkpoint(name), ("damaged",))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
] + [
    Case(f"cache: {name}", attacks.cache(name), ("cache .* is damaged", "delete that folder"))
    for name in ("labels.npy", "sizes.npy", "info.json")
]
IMAGES = [
    Case(f"{kind}: {name}", attacks.image(name, content, read), says)
    for kind, read in (("image", decode_image), ("mask", decode_mask))
    for name, content, says in (
        ("a.npy", attacks.objects, ("Python objects",)),
        ("a.png", attacks.raw, ("not an image",)),
        ("a.npz", npz, ("not an image",)),
    )
] + [
    Case("large image: .npy of objects", attacks.image("a.npy", attacks.objects, open_image), ("Python objects",)),
    Case("large image: pickle", attacks.image("a.npy", attacks.raw, open_image), ("damaged",)),
    Case("large image: .npz called .npy", attacks.image("a.npy", npz, open_image), ("damaged",)),
    Case("large image: Zarr 2 with pickled chunks", attacks.zarr(2), ("cannot be read",)),
    Case("large image: Zarr 3 with pickled chunks", attacks.zarr(3), ("cannot be read",)),
]
SETS = [
    Case(
        f"tar: .{suffix} member{', streamed' if streaming else ''}",
        attacks.tar_member(suffix, content, streaming),
        says,
    )
    for streaming in (False, True)
    for suffix, content, says in (
        ("pyd", attacks.raw, ()),
        ("pickle", attacks.raw, ()),
        ("pth", attacks.saved, ()),
        ("npy", attacks.objects, ("Object arrays",)),
        ("npz", npz, ("Object arrays",)),
    )
] + [
    Case("Parquet: pickles in its cells", attacks.table("cells"), ("no usable image", "not an image")),
    Case("Parquet: type with pickled parameters, passed over", attacks.table("type")),
    Case("save_to_disk folder: pickled state", attacks.saved_to_disk, ("damaged or incomplete",)),
    Case("folder with a script and pickles", attacks.script, ("scripts are no longer supported",)),
    Case("weights of the feature network", attacks.features, ("holds more than tensors",)),
]
NAMES = [
    Case("export: component ../../stray", attacks.traversal("../../stray"), ("no component",)),
    Case("export: component with an absolute name", attacks.traversal("/tmp/stray"), ("no component",)),
    Case("tar: members ../../ and absolute", attacks.tar_paths),
    Case("segment: one name in several folders, and ..", attacks.stray_names),
]
LIBRARY = [
    Case(f"{kind}.from_pretrained: weights as {PICKLED}", attacks.library(kind), ("safetensors",))
    for kind in ("UNet", "ImageGenerationPipeline", "SegmentationPipeline", "DDPMPipeline")
]
CASES: list[Case] = [*WEIGHTS, *LIBRARY, *CODE, *STATE, *IMAGES, *SETS, *NAMES]


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """A finding for every case, and one for the payload, which must work where a pickle is read."""
    models = save_models(work / "models")
    bare = Place(work / "payload", models)
    bare.folder.mkdir()
    pickle.loads(attacks.raw(bare))
    works = (bare.folder / attacks.MARKER).is_file()
    yield Finding(PROMISE, "the payload, unpickled on purpose", "writes its marker", works)
    for number, case in enumerate(CASES):
        place = Place(work / f"{number:02d}", models)
        place.folder.mkdir()
        outcome = try_case(case, place)
        ran = (place.folder / attacks.MARKER).exists()
        sentence = "THE PAYLOAD RAN" if ran else in_one_line(outcome.sentence).replace(str(work), "") or "passed over"
        yield Finding(PROMISE, case.given, sentence, outcome.held and not ran)
