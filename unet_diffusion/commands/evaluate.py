"""The scores of a finished run on a labelled set, written as files."""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from unet_diffusion.commands.sample import best_device
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.masked.sets import load_labelled
from unet_diffusion.evaluation.masks import score_masks
from unet_diffusion.files import check_output, readable, write_json, write_text
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.saved_runs import check_run, load_pipeline


@dataclass
class Evaluate:
    """Score the masks of a trained run on images with masks, each at its own size."""

    data: MaskedOptions
    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    output: Path | None = None
    """Folder for `evaluation.json` and `evaluation.md`; by default the run's."""
    tile_size: int | None = None
    """Output pixels a side of a tile of large images; by default so that one takes about 64 MiB."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    boundary_tolerance: float = 2.0
    """Pixels by which a predicted boundary may miss the true one, in the boundary F1."""
    membrane: int | None = None
    """Class of the membrane between cells: score the cells, too, by adapted Rand error and variation of information.
    Instances are always scored where the set has them."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    overwrite: bool = False
    """Replace an evaluation that is there already."""


def evaluate(config: Evaluate) -> str:
    """Writes `evaluation.json`, with the scores of each image, and `evaluation.md`; returns the text of the latter.

    The classes, their names and colours and the range of values are those of the run.

    Raises:
        ValueError: an option that does not fit the run, a set that does not fit its network, or an evaluation that
            would be overwritten.
        ImportError: if a file needs a package that is not installed.
    """
    check_run(config.run)
    output = config.output or config.run
    check_output(output)
    for path in (output / "evaluation.json", output / "evaluation.md"):
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path} exists already; set overwrite, or choose another output.")
    pipe = load_pipeline(SegmentationPipeline, config.run).to(best_device(config.device))
    pipe.check_inputs(config.tile_size, num_draws=1, timesteps=None)
    dataset = load_labelled(
        config.data,
        num_classes=pipe.num_classes,
        channels=pipe.unet.config.in_channels,
        pixel_range=pipe.pixel_range,
        palette=pipe.palette,
    )
    with pipe.progress_bar(total=len(dataset)) as progress:

        def predict(image: Tensor) -> Tensor:
            (mask,) = pipe(
                image,
                tile_size=config.tile_size,
                augment=config.augment,
                output_type="pt",
                return_probabilities=False,
                return_dict=False,
            )[0]
            progress.update()
            return mask

        scores = score_masks(predict, dataset, boundary_tolerance=config.boundary_tolerance, membrane=config.membrane)
    facts = {"options": asdict(config), "fingerprint": dataset.fingerprint, "count": len(dataset)}
    write_json(output / "evaluation.json", {**facts, "masks": scores.to_dict(pipe.class_names)})
    text = f"""# {readable(config.run.name)} on {dataset.name}

{len(dataset)} images. Pooled scores count the pixels of all of them together; means are over the images in which a
score is defined; empty where none is.

{scores.to_table(pipe.class_names)}
"""
    write_text(output / "evaluation.md", text)
    return text
