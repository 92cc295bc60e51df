"""Scores the masks of a finished run on a labelled set, and writes the scores as files."""

from dataclasses import asdict

from torch import Tensor

from unet_diffusion.checks import class_index
from unet_diffusion.commands.options.evaluate import Evaluate
from unet_diffusion.evaluation.mask_scores import labelled_for, score_masks
from unet_diffusion.files import readable, write_json, write_text
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.saved_runs import best_device, load_pipeline


def evaluate(options: Evaluate) -> str:
    """Writes `evaluation.json`, with the scores of each image, and `evaluation.md`; returns the text of the latter.

    The classes, their names and colours and the range of values are those of the run.

    Raises:
        ValueError: an option that does not fit the run, a set that does not fit its network, or an evaluation that
            would be overwritten.
        ImportError: if a file needs a package that is not installed.
    """
    options.check_paths()
    scores_file, text_file = options.files
    pipe = load_pipeline(SegmentationPipeline, options.run).to(best_device(options.device))
    pipe.check_inputs(options.tile_size, num_draws=1, timesteps=None)
    membrane = None if options.membrane is None else class_index(options.membrane, pipe.class_names, "membrane")
    dataset = labelled_for(
        pipe,
        options.data,
    )
    with pipe.progress_bar(total=len(dataset)) as progress:

        def predict(image: Tensor) -> Tensor:
            (mask,) = pipe(
                image,
                tile_size=options.tile_size,
                augment=options.augment,
                output_type="pt",
                return_probabilities=False,
                return_dict=False,
            )[0]
            progress.update()
            return mask

        scores = score_masks(predict, dataset, boundary_tolerance=options.boundary_tolerance, membrane=membrane)
    facts = {"options": asdict(options), "fingerprint": dataset.fingerprint, "count": len(dataset)}
    write_json(scores_file, {**facts, "masks": scores.to_dict(pipe.class_names)})
    text = f"""# {readable(options.run.name)} on {dataset.name}

{len(dataset)} images. Pooled scores count the pixels of all images together. Means are over the images in which a
score is defined; a cell is empty where there is none.

{scores.to_table(pipe.class_names)}
"""
    write_text(text_file, text)
    return text
