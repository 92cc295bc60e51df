"""What a user tries with files that are bad or hostile, and the sentence that comes of it."""

import contextlib
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

SIDE = 16  # pixels of the good images
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FOREIGN = re.compile(r"object at 0x|Traceback|_io\.|\[Errno")  # what no sentence for a user holds
NOBODY = 65534  # a user without rights


@dataclass
class Place:
    """An empty folder to try something in, with helpers that fill it.

    Attributes:
        folder: to write in.
        models: saved pipelines, shared by all places: `generation` and `segmentation`.
    """

    folder: Path
    models: Path

    def images(self, name: str = "data", count: int = 6) -> Path:
        """A folder with `images` and `masks`, 16x16 grey, each mask with a square of class 1."""
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
        """A copy of a saved pipeline, to be spoilt."""
        return Path(shutil.copytree(self.models / kind, self.folder / kind))

    def write(self, name: str, content: bytes | str) -> Path:
        """A file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def command(self, name: str, *arguments: Any) -> None:
        """Runs a command of the package as a user does."""
        run(name, [str(argument) for argument in arguments])

    def segment(self, *inputs: Path, model: Path | None = None) -> None:
        """`unet-diffusion segment`."""
        run = model or self.models / "segmentation"
        self.command("segment", "--run", run, "--output", self.folder / "out", "--inputs", *inputs)

    def sample(self, model: Path) -> None:
        """`unet-diffusion sample`, one image in one step."""
        self.command("sample", "--run", model, "--output", self.folder / "out", "--count", 1, "--steps", 1)

    def train(self, images: Path, *options: Any) -> None:
        """`unet-diffusion train-ddpm`, one step."""
        model = () if "--model" in options else ("--model", "tiny")
        self.command("train-ddpm", "--data", images, *model, *self._training(), *options)

    def train_masks(self, data: Path, *options: Any) -> None:
        """`unet-diffusion train-segmentation`, one step."""
        masks = ("--data", data / "images", "--masks", data / "masks")
        self.command("train-segmentation", *masks, "--model", "tiny", *self._training(), *options)

    def _training(self) -> tuple[Any, ...]:
        cache = self.folder / "cache"
        return ("--output", self.folder / "run", "--cache-dir", cache, "--steps", 1, "--batch-size", 2)


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        given: what is tried, in words.
        attempt: tries it; raises AssertionError where what comes of it is wrong.
        says: patterns of the refusal: the value, the rule and the fix; empty where it is to be accepted.
    """

    given: str
    attempt: Callable[[Place], Any]
    says: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        sentence: the refusal, or what went wrong; empty where it was accepted.
        held: whether it is what the case demands.
        warnings: what the package warned of.
    """

    sentence: str
    held: bool
    warnings: list[str] = field(default_factory=list)


def try_case(case: Case, place: Place) -> Outcome:
    """Tries a case and judges what came of it."""
    printed, warned = io.StringIO(), _Warnings()
    logging.getLogger("unet_diffusion").addHandler(warned)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            case.attempt(place)
    except SystemExit as error:
        sentence = error.code if isinstance(error.code, str) else in_one_line(printed.getvalue())
    except ValueError as error:
        sentence = str(error)
    except Exception as error:
        return Outcome(f"TRACEBACK: {type(error).__name__}: {error}", False, warned.texts)
    else:
        return Outcome("", not case.says, warned.texts)
    finally:
        logging.getLogger("unet_diffusion").removeHandler(warned)
    told = all(re.search(pattern, sentence, re.DOTALL) for pattern in case.says)
    return Outcome(sentence, bool(case.says) and told and not FOREIGN.search(sentence), warned.texts)


def save_models(folder: Path) -> Path:
    """Untrained pipelines of both kinds, which take 28x28 grey images; the segmenting one has 2 classes."""
    torch.manual_seed(0)
    ImageGenerationPipeline(UNet.from_preset("tiny"), DDPMScheduler()).save_pretrained(folder / "generation")
    unet = UNet.from_preset("tiny").to_segmentation(2)
    SegmentationPipeline(unet, DDPMScheduler()).save_pretrained(folder / "segmentation")
    return folder


def in_one_line(text: str) -> str:
    """Text without the frames that the command line draws, and without line breaks."""
    return " ".join(re.sub(r"[─│╭╮╰╯]+", " ", text).split())


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder to prepare, which `without_rights` then looks at as a user who is not its owner."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def without_rights(action: Callable[[], Any]) -> None:
    """Does something in a child process that has no special rights; raises the ValueError that it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            action()
            told = "accepted"
        except ValueError as error:
            told = f"refused{error}"
        except BaseException as error:
            told = f"raised{type(error).__name__}: {error}"
        os.write(write, told.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    if told.startswith("refused"):
        raise ValueError(told.removeprefix("refused"))
    if told != "accepted":
        raise RuntimeError(told)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
