"""Scores the masks of a finished run on a labelled set, and writes the scores as files."""

import logging
from dataclasses import asdict

import numpy as np
from torch import Tensor

from unet_diffusion.checks import class_index
from unet_diffusion.commands.options.evaluate import Evaluate
from unet_diffusion.commands.run_data import held_out_masks, learnt_from, loading
from unet_diffusion.data.record import DataRecord
from unet_diffusion.evaluation.mask_scores import labelled_for, score_masks
from unet_diffusion.files import readable, write_json, write_text
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.saved_runs import best_device, load_pipeline

logger = logging.getLogger(__name__)


def evaluate(options: Evaluate) -> str:
    """Writes `evaluation.json`, with the scores of each image, and `evaluation.md`; returns the text of the latter.

    The classes, their names and colours, and the range of values are those of the run. Without `data`, the images that
    the run held out are scored. A warning gives the number of scored images that the run learnt from, wherever they
    lie.

    Raises:
        ValueError: an option does not fit the run, the set does not fit its network, an evaluation would be
            overwritten, or there are no data for a run that held out no image.
        ImportError: a file needs a package that is not installed.
    """
    options.check_paths()
    scores_file, text_file = options.files
    pipe = load_pipeline(SegmentationPipeline, options.run).to(best_device(options.device))
    pipe.check_inputs(options.tile_size, num_draws=1, timesteps=None)
    membrane = None if options.membrane is None else class_index(options.membrane, pipe.class_names, "membrane")
    own = options.data.data is None
    record = DataRecord.read(options.run)
    if own:
        dataset = held_out_masks(options.run, pipe.num_classes, loading(options.data))
    else:
        dataset = labelled_for(pipe, options.data, None if record is None else record.mask_encoding)
    trained = int(np.isin(dataset.ids(), () if record is None else record.trained).sum())
    unlabelled = int(learnt_from(dataset, record).sum()) - trained
    told = seen(trained, unlabelled, len(dataset), own)
    if trained or unlabelled:
        logger.warning(told)
    pipe = pipe.for_prepared_images()
    with pipe.progress_bar(total=len(dataset)) as progress:

        def predict(image: Tensor) -> Tensor | tuple[Tensor, np.ndarray]:
            (mask,), _, _, *objects = pipe(
                image,
                tile_size=options.tile_size,
                augment=options.augment,
                output_type="pt",
                return_probabilities=False,
                return_dict=False,
                mixed_precision=options.mixed_precision,
                instances=dataset.cache.has_instances,
            )
            progress.update()
            return (mask, objects[0][0]) if objects else mask

        scores = score_masks(predict, dataset, boundary_tolerance=options.boundary_tolerance, membrane=membrane)
    facts = {"options": asdict(options), "fingerprint": dataset.fingerprint, "count": len(dataset)}
    facts |= {"held_out": own, "trained_on": None if record is None else trained}
    facts |= {"learnt_without_masks": None if record is None else unlabelled}
    write_json(scores_file, {**facts, "masks": scores.to_dict(pipe.class_names)})
    text = f"""# {readable(options.run.name)} on {dataset.name}

{told or f"{len(dataset)} images."} Pooled scores count the pixels of all images together. Means are over the
images in which a score is defined; a cell is empty where there is none.

{scores.to_table(pipe.class_names)}
"""
    write_text(text_file, text)
    return text


def seen(trained: int, unlabelled: int, count: int, own: bool) -> str:
    """Says which images are scored; empty if they are not the run's own and it learnt from none of them.

    Args:
        trained: number of images that the run was trained on.
        unlabelled: number of further images that it learnt from without their masks.
        count: number of all images.
        own: whether the images are those that the run held out.
    """
    if trained or unlabelled:
        shares = [f"{trained} of the {count} images were trained on"] * bool(trained)
        more = f"{unlabelled} more" if trained else f"{unlabelled} of the {count} images"
        shares += [f"{more} were learnt from without their masks"] * bool(unlabelled)
        return f"{', and '.join(shares)}, so the scores do not show how the network does on new images."
    held_out = "The image" if count == 1 else f"The {count} images"
    return f"{held_out} that the run held out." if own else ""
