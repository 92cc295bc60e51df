"""Masks of many image files with a trained run, written as files."""

import csv
import glob
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unet_diffusion.commands.sample import best_device
from unet_diffusion.data.folders import IMAGE_SUFFIXES
from unet_diffusion.files import check_output, readable, write_text
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.figures import save_image
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import check_run, load_pipeline

COLUMNS = ("file", "mask", "class", "pixels", "share")

logger = logging.getLogger(__name__)


@dataclass
class Segment:
    """Segment image files with a trained run. A file that cannot be segmented is reported, and the others go on."""

    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    inputs: tuple[str, ...] = ()
    """Image files, folders (with their subfolders) and globs."""
    output: Path | None = None
    """Folder for the masks; by default `masks` in the run's folder."""
    tile_size: int | None = None
    """Output pixels a side of a tile of large images; by default so that one takes about 64 MiB."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    timesteps: tuple[int, ...] = ()
    """Timesteps at which noise is added and the masks are averaged; by default the clean image."""
    num_draws: int = 1
    """Noisy versions per timestep."""
    opacity: float = 0.5
    """Of the colours in the overlays, from 0 to 1."""
    seed: int = 0
    """The noise follows from it."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    overwrite: bool = False
    """Replace masks that are there already."""

    def __post_init__(self) -> None:
        """Checks what the pipeline does not check before the first image."""
        if not self.inputs:
            raise ValueError("inputs is empty; give image files, folders or globs.")
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity is {self.opacity}, but must be from 0 to 1.")


def segment(config: Segment) -> Path:
    """Writes `NAME.png` (class indices, with the palette), `NAME-overlay.png` and `areas.csv`; returns their folder.

    NAME is the file's name without its suffix, and a number where several files have it.

    Raises:
        ValueError: an option that does not fit the run, no image at all, or an `areas.csv` that would be overwritten.
        RuntimeError: after the last image, if some failed; it names them. An output that would be overwritten counts.
    """
    check_run(config.run)
    output = config.output or config.run / "masks"
    check_output(output)
    if (output / "areas.csv").exists() and not config.overwrite:
        raise ValueError(f"{output} holds results already; set overwrite, or choose another output.")
    found = find_images(config.inputs, output)
    if not any(found.values()):
        raise ValueError(f"inputs are {', '.join(config.inputs)}, but there is no image outside of {output}.")
    failures = [f"{given}: no such file, and no image in it" for given, paths in found.items() if not paths]
    paths = list(dict.fromkeys(path for matches in found.values() for path in matches))
    pipe = load_pipeline(SegmentationPipeline, config.run).to(best_device(config.device))
    pipe.check_inputs(config.tile_size, config.num_draws, config.timesteps or None)

    names = output_names(paths)
    rows: list[tuple] = []
    for path in pipe.progress_bar(paths):
        try:
            rows += _segment_image(pipe, config, path, output, names[path])
        except (ValueError, OSError, ImportError, MemoryError) as error:
            failures.append(readable(f"{path}: {error}"))
            logger.warning("%s", failures[-1])
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(output / "areas.csv", table.getvalue())
    if failures:
        listed = "\n".join(failures)
        raise RuntimeError(f"{len(failures)} of {len(paths)} inputs failed, the others are in {output}:\n{listed}")
    return output


def find_images(inputs: Iterable[str], output: Path) -> dict[str, list[Path]]:
    """The image files of each input, as absolute paths in order; files of the output folder are left out.

    A file that is named is taken whatever its suffix; of a folder, the files with an image's suffix.
    """
    found = {}
    for given in inputs:
        path = Path(given).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = []
        for match in matches:
            if match.is_dir():
                inside = sorted(file for file in match.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
                files += [file for file in inside if file.is_file() and not file.name.startswith(".")]
            else:
                files.append(match)
        absolute = [file.absolute() for file in files]
        found[given] = [file for file in absolute if file.resolve().parent != output.resolve()]
    return found


def output_names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for the outputs of each image: no two of `NAME.png` and `NAME-overlay.png` are equal, in any case."""
    taken: set[str] = set()
    names = {}
    for path in paths:
        number, name = 1, path.stem
        while not taken.isdisjoint(_lower_case(name)):
            number += 1
            name = f"{path.stem}-{number}"
        taken.update(_lower_case(name))
        names[path] = name
    return names


def _lower_case(name: str) -> set[str]:
    return {name.casefold(), f"{name}-overlay".casefold()}


def _segment_image(pipe: SegmentationPipeline, config: Segment, path: Path, output: Path, name: str) -> list[tuple]:
    """Writes the mask and the overlay of one image; returns its lines of the table."""
    mask_path, overlay_path = output / f"{name}.png", output / f"{name}-overlay.png"
    for target in (mask_path, overlay_path):
        if target.exists() and not config.overwrite:
            raise ValueError(f"{target} exists already; set overwrite, or choose another output.")
    pixels = decode_image(path)
    (mask,) = pipe(
        pixels,
        tile_size=config.tile_size,
        augment=config.augment,
        timesteps=config.timesteps or None,
        num_draws=config.num_draws,
        generator=keyed_generator(config.seed, "segment", name),
        return_probabilities=False,
        return_dict=False,
    )[0]
    save_image(mask, mask_path)
    save_image(pipe.overlay(pixels, mask, config.opacity), overlay_path)
    classes = pipe.class_names or [str(label) for label in range(pipe.num_classes)]
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(classes))
    return [
        (readable(str(path)), readable(mask_path.name), label, int(count), f"{count / counts.sum():.6f}")
        for label, count in zip(classes, counts)
    ]
