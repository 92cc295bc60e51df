"""A folder in which a command of the package is given bad or hostile files, and the sentence that refuses them."""

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

SIDE = 16  # pixels of the good images
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FOREIGN = re.compile(r"object at 0x|Traceback|_io\.|\[Errno")  # must not occur in a message for a user
NOBODY = 65534  # a user without rights


@dataclass
class Sandbox:
    """An empty folder for an attempt, with helpers that fill it and run commands.

    Attributes:
        folder: to write in.
        models: saved pipelines, shared by all sandboxes: `generation` and `segmentation`.
    """

    folder: Path
    models: Path

    def images(self, name: str = "data", count: int = 6) -> Path:
        """Makes a folder with `images` and `masks`, 16x16 grey, each mask with a square of class 1."""
        random = np.random.default_rng(0)
        data = self.folder / name
        for part in ("images", "masks"):
            (data / part).mkdir(parents=True)
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[4:12, 4:12] = 1
        for i in range(count):
            image = random.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(image).save(data / "images" / f"{i}.png")
            Image.fromarray(mask).save(data / "masks" / f"{i}.png")
        return data

    def model(self, kind: str) -> Path:
        """Copies a saved pipeline, to be damaged."""
        return Path(shutil.copytree(self.models / kind, self.folder / kind))

    def trained(self) -> Path:
        """Copies a run of one step and its images; returns the folder of these."""
        whole = Sandbox(self.models / "trained", self.models)
        if not whole.folder.exists():
            whole.train(whole.images() / "images")
        shutil.copytree(whole.folder, self.folder, dirs_exist_ok=True)
        return self.folder / "data" / "images"

    def write(self, name: str, content: bytes | str) -> Path:
        """Writes a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def command(self, name: str, *arguments: Any) -> None:
        """Runs a command of the package as a user does."""
        run(name, [str(argument) for argument in arguments])

    def segment(self, *inputs: Path, model: Path | None = None) -> None:
        """Runs `unet-diffusion segment`."""
        run = model or self.models / "segmentation"
        self.command("segment", "--run", run, "--output", self.folder / "out", "--inputs", *inputs)

    def sample(self, model: Path) -> None:
        """Runs `unet-diffusion sample`, for one image in one step."""
        self.command("sample", "--run", model, "--output", self.folder / "out", "--count", 1, "--steps", 1)

    def train(self, images: Path, *options: Any) -> None:
        """Runs `unet-diffusion train-ddpm`, for one step."""
        model = () if "--model" in options else ("--model", "tiny")
        self.command("train-ddpm", "--data", images, *model, *self._training(), *options)

    def train_masks(self, data: Path, *options: Any) -> None:
        """Runs `unet-diffusion train-segmentation`, for one step."""
        masks = ("--data", data / "images", "--masks", data / "masks")
        self.command("train-segmentation", *masks, "--model", "tiny", *self._training(), *options)

    def _training(self) -> tuple[Any, ...]:
        cache = self.folder / "cache"
        return ("--output", self.folder / "run", "--cache-dir", cache, "--steps", 1, "--batch-size", 2)

    def sentence(self, attempt: Callable[["Sandbox"], Any]) -> str:
        """Tries something; returns the sentence that refuses it, or nothing where it is accepted."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                attempt(self)
        except SystemExit as error:
            return error.code if isinstance(error.code, str) else in_one_line(printed.getvalue())
        except ValueError as error:
            return str(error)
        return ""

    def refusal(self, attempt: Callable[["Sandbox"], Any], *says: str) -> str:
        """Tries something that must be refused.

        Args:
            attempt: tries it.
            says: patterns of what the sentence must say: the value, the rule and the fix.

        Returns:
            The sentence, in one line, with paths from the sandbox on.
        """
        sentence = self.sentence(attempt)
        assert sentence, "accepted"
        for pattern in says:
            assert re.search(pattern, sentence, re.DOTALL), f"{pattern!r} is missing in {sentence!r}"
        assert not FOREIGN.search(sentence), sentence
        folders = "|".join([str(self.folder), str(self.models), rf"{tempfile.gettempdir()}/tmp\w+"])  # of `as_nobody`
        return re.sub(folders, ".", re.sub(f"({folders})/", "", in_one_line(sentence)))


Attempt = Callable[[Sandbox], Any]


def cases(rows: list[tuple]) -> list[Any]:
    """Returns the parameters of a test, from rows of a name, an attempt, and what its refusal must say."""
    return [pytest.param(attempt, says, id=name) for name, attempt, *says in rows]


def encoded(kind: str, side: int = SIDE, mode: str = "L") -> bytes:
    """Returns a square image of one value as the content of a file."""
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 7 if mode == "L" else 0).save(buffer, kind)
    return buffer.getvalue()


def save_models(folder: Path) -> Path:
    """Saves untrained pipelines of both kinds for grey images of 28x28; the one for segmentation has 2 classes."""
    torch.manual_seed(0)
    ImageGenerationPipeline(UNet.from_preset("tiny"), DDPMScheduler()).save_pretrained(folder / "generation")
    unet = UNet.from_preset("tiny").to_segmentation(2)
    SegmentationPipeline(unet, DDPMScheduler()).save_pretrained(folder / "segmentation")
    return folder


def in_one_line(text: str) -> str:
    """Returns text without line breaks and the frames that the command line draws."""
    return " ".join(re.sub(r"[─│╭╮╰╯]+|-{5,}", " ", text).split())


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """Yields a folder to prepare, which `without_rights` then uses as a user who does not own it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def without_rights(action: Callable[[], Any]) -> None:
    """Does something in a child process without special rights; raises the ValueError that it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            action()
            answer = "accepted"
        except ValueError as error:
            answer = f"refused{error}"
        except BaseException as error:
            answer = f"raised{type(error).__name__}: {error}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    if answer.startswith("refused"):
        raise ValueError(answer.removeprefix("refused"))
    if answer != "accepted":
        raise RuntimeError(answer)
