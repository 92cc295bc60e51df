"""Images of any size to masks, with test-time augmentation and an uncertainty map."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.checks import is_count, is_number, plain, require, require_choice
from unet_diffusion.diffusion.sampling import forward_process
from unet_diffusion.images.conversion import check_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.palette import mask_image, overlay
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.network.tiling import Read, Tiling
from unet_diffusion.pipelines.base import (
    Generators,
    PrivateArguments,
    check_class_details,
    generators_for,
    saved_range,
    trained_settings,
)
from unet_diffusion.pipelines.large_files import ObjectOptions, stretched_reader, write_segmented
from unet_diffusion.segmentation.measurements import joined_tables, object_table
from unet_diffusion.segmentation.objects import find_objects
from unet_diffusion.segmentation.segmenter import (
    TURNS,
    Segmenter,
    check_evaluation_mode,
    check_levels,
    tiling_for_classifier,
)
from unet_diffusion.unet import UNet

OUTPUT_TYPES = ("pil", "np", "pt")
MAX_CLASSES = 255  # masks are stored in 8 bits, and 255 means "ignore"


@dataclass
class SegmentationOutput(BaseOutput):
    """The output of `SegmentationPipeline`: lists with one entry per image, since sizes may differ.

    Attributes:
        masks: class indices at the size of the image: PIL images of mode P, uint8 arrays or int64 tensors (H, W).
        probabilities: of each class, float32 arrays (tensors for "pt") (K, H, W), or None if not asked for.
        uncertainty: entropy of the probabilities divided by log K, in [0, 1], float32 (H, W), or None if not asked for.
        instances: the objects, int32 arrays (H, W), 0 for the background and 1..n for the objects of the image, or None
            if not asked for.
        objects: a pandas DataFrame with a row for each object of all images, or None if not asked for. Its columns are
            `image`, the place of the object's image in the list, and those of
            `unet_diffusion.segmentation.object_table`.
    """

    masks: list[Image.Image] | list[np.ndarray] | list[Tensor]
    probabilities: list[np.ndarray] | list[Tensor] | None
    uncertainty: list[np.ndarray] | list[Tensor] | None
    instances: list[np.ndarray] | None = None
    objects: Any = None


class SegmentationPipeline(PrivateArguments, DiffusionPipeline):
    """Segments images of any size; large ones window by window (`unet_diffusion.network.tiling`).

    Examples:
        >>> import numpy as np
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.pipelines import SegmentationPipeline

        >>> pipe = SegmentationPipeline(UNet.from_preset("tiny").to_segmentation(2))
        >>> image = np.zeros((40, 30), dtype=np.uint8)
        >>> mask = pipe(image).masks[0]
        >>> mask.mode, mask.size
        ('P', (30, 40))

    Args:
        unet: a network with a segmentation head or, if there is a classifier, a noise predictor.
        scheduler: adds noise to the image for a classifier, or if timesteps are asked for; not needed otherwise.
        pixel_range: how stored values map to [-1, 1], in the form of `PixelRange.to_dict`; None for 8-bit images.
        class_names: names of the classes, in the order of their indices.
        palette: red, green and blue of each class, 0 to 255; None for colours that colour-blind readers can tell apart.
        classifier: takes the place of a segmentation head; it reads the network's features of noisy images. The noise
            is the same for every image and in every call, so an image always gets the same mask.
        trained_with: settings of the scheduler that the network was trained with; schedulers with other settings are
            refused. None takes them from `scheduler`.

    Raises:
        ValueError: the network has no segmentation head; the classifier was made for another network or has no
            scheduler; the pixel range is invalid; or there is not one name or colour per class.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["scheduler", "classifier"]

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin | None = None,
        pixel_range: dict | None = None,
        class_names: list[str] | None = None,
        palette: list[list[int]] | None = None,
        classifier: PixelClassifier | None = None,
        trained_with: dict | None = None,
    ) -> None:
        super().__init__()
        if classifier is not None:
            classifier.check_trunk(unet, scheduler)
        classes = (unet if classifier is None else classifier).config.get("num_classes")
        if classes is None or classes > MAX_CLASSES:
            raise ValueError(
                f"the network has num_classes={classes}, but segmentation needs a head of 2 to {MAX_CLASSES} classes; "
                "call unet.to_segmentation(K) and train it, or give a classifier."
            )
        saved_range(pixel_range)
        check_class_details(classes, class_names, palette)
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(
            _pixel_range=plain(pixel_range),
            _class_names=None if class_names is None else plain(list(class_names)),
            _palette=None if palette is None else plain([list(entry) for entry in palette]),
            _trained_with=trained_settings(trained_with, scheduler),
        )

    @property
    def num_classes(self) -> int:
        """Number of classes of the masks, background included."""
        return (self.unet if self.classifier is None else self.classifier).config.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of the masks, in the order of their indices."""
        return self.config["_class_names"]

    @property
    def palette(self) -> list[list[int]] | None:
        """Red, green and blue of each class, or None for the default colours."""
        return self.config["_palette"]

    @property
    def object_min_area(self) -> int:
        """Area in pixels below which objects are left out by default; 0 if training found none."""
        if self.classifier is not None:  # whose classes are other objects than those of the network
            return 0
        return self.unet.config.get("object_min_area") or 0

    def check_inputs(
        self, tile_size: int | None, num_draws: int, timesteps: Sequence[int] | None, output_type: str = "pil"
    ) -> None:
        """Raises a ValueError that gives the value, the rule and the fix for the first argument that is wrong."""
        valid = tile_size is None or is_count(tile_size)
        require(valid, "tile_size", tile_size, "must be an integer of at least 1, or None")
        require_choice("output_type", output_type, OUTPUT_TYPES)
        if self.classifier is None:
            check_levels(self.unet, self.scheduler, num_draws, timesteps)
        elif timesteps is not None or num_draws != 1:
            raise ValueError(
                f"timesteps are {timesteps} and num_draws is {num_draws}, but the classifier has its own: one noisy "
                f"version at each of {list(self.classifier.config.timesteps)}; leave both out."
            )
        if self.classifier is not None or timesteps is not None:
            self.check_noise_settings(left_out=["prediction_type"])  # noise is only added
        check_evaluation_mode(self.unet)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        tile_size: int | None = None,
        num_draws: int = 1,
        timesteps: Sequence[int] | None = None,
        augment: bool = False,
        generator: Generators = None,
        output_type: str = "pil",
        return_probabilities: bool = True,
        return_dict: bool = True,
        mixed_precision: Precision = "no",
        instances: bool = False,
        min_area: int | None = None,
        max_hole: int = 0,
        pixel_size: tuple[float, float] | None = None,
    ) -> SegmentationOutput | tuple:
        """Segments one or more images, each at its own size.

        Args:
            image: a PIL image, a path, an array (H, W) or (H, W, C), or a tensor (C, H, W) or (B, C, H, W), with the
                values that are stored in files; or a list of these. An array is taken as (C, H, W) if only this order
                fits the network's channels.
            tile_size: output pixels a side of a tile; images that are not larger than a tile with its context run
                whole. None chooses it for about 64 MiB of memory in the network, and runs images that take at most
                512 MiB whole.
            num_draws: noisy versions of the image per timestep.
            timesteps: noise levels of noisy versions of the image, whose probabilities are averaged. None: the clean
                image at the timestep that the network was trained to segment at or, with a classifier, the timesteps
                that it was trained with.
            augment: average over the 8 flips and rotations of the image, at 8 times the cost.
            generator: source of the noise at `timesteps`, or a list or tuple with one per image; None for PyTorch's
                global one.
            output_type: "pil": PIL masks of mode P with the palette; "np": uint8 masks; "pt": int64 masks, on the CPU.
            return_probabilities: whether to return probabilities and uncertainty, 4 (K + 1) bytes per pixel.
            return_dict: whether to return a `SegmentationOutput`, or else a tuple.
            mixed_precision: the precision of the network: "no", "bf16" or "fp16"; "auto" is bf16 where the device has
                it, or what `accelerate launch` was told. Everything else stays in float32. "no" leaves a
                `torch.autocast` around the call as it is.
            instances: whether to find and measure the objects too (`unet_diffusion.segmentation.find_objects`), from
                the network's object maps if it has learnt them. The tuple then also has the objects and their table.
            min_area: objects of fewer pixels are left out. None takes `unet.config.object_min_area`, which training
                finds, or 0 if it is not known.
            max_hole: holes in objects of at most this many pixels are filled.
            pixel_size: height and width of the pixels of all images in micrometres, for columns of the table in
                micrometres; None for no such columns. `unet_diffusion.images.pixel_size.read_pixel_size` reads it from
                a file.

        Raises:
            ValueError: an image or an argument does not fit the network, or its scores are not finite; the message
                gives the fix.
        """
        tile_size, num_draws, timesteps, instances, min_area, max_hole, pixel_size = map(
            plain, (tile_size, num_draws, timesteps, instances, min_area, max_hole, pixel_size)
        )
        self.check_inputs(tile_size, num_draws, timesteps, output_type)
        check_object_options(instances, min_area, max_hole, pixel_size)
        images: Iterable[Tensor] = self.read_images(image)
        if generator is not None and not isinstance(generator, torch.Generator):  # one per image, so count them
            images = list(images)
            generator = generators_for(generator, len(images))
        segmenter = self._segmenter(tile_size, num_draws, timesteps, augment, mixed_precision)
        masks: list[Tensor] = []
        probabilities: list[Tensor] = []
        uncertainty: list[Tensor] = []
        objects: list[np.ndarray] = []
        tables: list[dict[str, np.ndarray]] = []
        for batch in segmenter.tiling.batches(images):
            count, (height, width) = len(batch), batch[0].shape[1:]
            own = generator
            if isinstance(generator, list):
                own, generator = generator[:count], generator[count:]

            ranged = [self.pixel_range.stretch(each) for each in batch]

            def read(rows: slice, columns: slice, ranged: list[Tensor] = ranged) -> Tensor:
                return torch.stack([each[:, rows, columns] for each in ranged])

            mask = torch.empty(count, height, width, dtype=torch.uint8)
            chances = torch.empty(count if return_probabilities or instances else 0, self.num_classes, height, width)
            entropy = torch.empty(count if return_probabilities else 0, height, width)
            maps: list[Tensor] = []
            for rows, columns, part, *parts in self._regions(segmenter, read, (height, width), count, own, instances):
                mask[:, rows, columns] = part.argmax(dim=1)
                if len(chances):
                    chances[..., rows, columns] = part
                if return_probabilities:
                    entropy[:, rows, columns] = torch.special.entr(part).sum(dim=1) / math.log(part.shape[1])
                maps = maps or [torch.empty(count, height, width) for _ in parts]
                for whole, values in zip(maps, parts):
                    whole[:, rows, columns] = values
            masks.extend(mask)
            probabilities.extend(chances if return_probabilities else [])
            uncertainty.extend(entropy)
            for i in range(count if instances else 0):
                own_maps = (each[i].numpy() for each in maps)
                diameter, least = self._object_sizes(min_area)
                found = find_objects(
                    chances[i].numpy(), *own_maps, diameter=diameter, min_area=least, max_hole=max_hole
                )
                values = batch[i].cpu()
                stored = (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
                tables.append(object_table(found, stored, chances[i].numpy(), self.class_names, pixel_size))
                objects.append(found)
        self.maybe_free_model_hooks()

        def arrays(maps: list[Tensor]) -> Any:
            return maps if output_type == "pt" else [each.numpy() for each in maps]

        output = SegmentationOutput(
            masks=[self._mask(mask, output_type) for mask in masks],
            probabilities=arrays(probabilities) if return_probabilities else None,
            uncertainty=arrays(uncertainty) if return_probabilities else None,
            instances=objects if instances else None,
            objects=joined_tables(tables) if instances else None,
        )
        of_objects = (output.instances, output.objects) if instances else ()
        return output if return_dict else (output.masks, output.probabilities, output.uncertainty, *of_objects)

    def for_prepared_images(self) -> "SegmentationPipeline":
        """Returns a pipeline with the same networks for images of a data set, which are stretched already.

        Such images may have been cut or resized since, so their own percentiles would be other values.
        """
        if self.pixel_range.percentiles is None:
            return self
        pixel_range = replace(self.pixel_range, percentiles=None).to_dict()
        own = (self.class_names, self.palette, self.classifier, self.config["_trained_with"])
        return SegmentationPipeline(self.unet, self.scheduler, pixel_range, *own)

    def predictor(self) -> Callable[[Tensor], Tensor]:
        """Returns a function from an image (C, H, W) of a data set to its mask, int64 (H, W) on the CPU.

        Images of a data set are those that `for_prepared_images` describes. No progress is shown.
        """
        pipe = copy.copy(self.for_prepared_images())  # so that this pipeline keeps its own progress bar
        pipe.set_progress_bar_config(disable=True)
        return lambda image: pipe(image, output_type="pt", return_probabilities=False, return_dict=False)[0][0]

    @torch.no_grad()
    def segment_file(
        self,
        source: Any,
        target: Any,
        tile_size: int | None = None,
        num_draws: int = 1,
        timesteps: Sequence[int] | None = None,
        augment: bool = False,
        generator: torch.Generator | None = None,
        mixed_precision: Precision = "no",
        instances: bool = False,
        min_area: int | None = None,
        max_hole: int = 0,
    ) -> None:
        """Segments an image that may be larger than memory; reads the image and writes its mask window by window.

        With `instances`, two files appear beside the mask `NAME.npy`: `NAME-objects.tif`, a label image (compressed
        TIFF in tiles, uint16, or uint32 for more than 65,535 objects), and `NAME-objects.csv`, the table of
        `unet_diffusion.segmentation.object_table`, also in micrometres if a TIFF states its pixel size. Objects and
        table are the same as those of `__call__`, for objects of any size and across windows
        (`unet_diffusion.segmentation.objects.ObjectSearch`). During the call, a folder beside the mask takes up to 4 K
        + 33 bytes a pixel for K classes, and 8 more if the network has learnt object maps. Memory use grows only with
        the number of objects. If only the objects fail, the mask stays, and a note on the error says so.

        Args:
            source: path of a `.npy`, `.tif` or `.zarr` image, or any array (H, W) or (H, W, C) that can be sliced.
            target: path of the mask, `.npy`, `.tif` or `.zarr`, which appears when it is complete; or any array (H, W)
                that windows of uint8 class indices can be assigned to.
            tile_size: as in `__call__`.
            num_draws: as in `__call__`.
            timesteps: as in `__call__`.
            augment: as in `__call__`.
            generator: as in `__call__`.
            mixed_precision: as in `__call__`.
            instances: whether to find the objects too; this needs a path as the target, and the extra `scientific`.
            min_area: as in `__call__`.
            max_hole: as in `__call__`.

        Raises:
            ValueError: an image or an argument does not fit the network, its scores are not finite, or a file that
                would be written exists. Or the image holds NaN or infinity, or is a TIFF that is to be shown turned or
                with other colours or values than it stores. Or objects are wanted, and the middle of a part of the mask
                is about 2,000 pixels from its edge.
            OSError: the disk has no room for the files; those that were there are as they were.
        """
        tile_size, num_draws, timesteps, instances, min_area, max_hole = map(
            plain, (tile_size, num_draws, timesteps, instances, min_area, max_hole)
        )
        self.check_inputs(tile_size, num_draws, timesteps)
        check_object_options(instances, min_area, max_hole)
        image = open_image(source, self.channels)
        size = image.shape[:2]
        check_image(self.channels, self.pixel_range, image.shape[2], image.dtype.name)
        segmenter = self._segmenter(tile_size, num_draws, timesteps, augment, mixed_precision)

        regions = self._regions(segmenter, stretched_reader(image, self.pixel_range), size, 1, generator, instances)
        options = (*self._object_sizes(min_area), max_hole, self.class_names, self.num_classes)
        write_segmented(image, regions, target, ObjectOptions(*options) if instances else None)
        self.maybe_free_model_hooks()

    def _object_sizes(self, min_area: int | None) -> tuple[float | None, int]:
        """Returns the usual diameter of objects, None if it is not known, and the smallest area of an object."""
        diameter = self.unet.config.get("object_diameter") if self.classifier is None else None
        return diameter, self.object_min_area if min_area is None else min_area

    def overlay(self, image: Any, mask: Any, opacity: float = 0.5, objects: np.ndarray | None = None) -> Image.Image:
        """Draws the classes of a mask in colour over its image, as RGB; class 0 stays transparent.

        Args:
            image: one image, as in `__call__`.
            mask: its mask as a PIL image, an array or a tensor (H, W).
            opacity: of the colours, from 0 to 1.
            objects: the objects' numbers, (H, W), to outline each object in the colour of its class; None for no
                outlines.

        Raises:
            ValueError: image and mask differ in size, there is more than one image, or the opacity is not from 0 to 1.
        """
        stored = list(self.read_images(image))
        labels = np.asarray(mask)
        if len(stored) != 1 or tuple(stored[0].shape[1:]) != labels.shape:
            sizes = [f"{each.shape[1]}x{each.shape[2]}" for each in stored]
            raise ValueError(
                f"the images are {sizes} and the mask has shape {labels.shape}; give one image and its mask."
            )
        require(0 <= opacity <= 1, "opacity", opacity, "must be from 0 to 1")
        pixels = self.pixel_range.to_model(self.pixel_range.stretch(stored[0]))
        shown = PixelRange.full("uint8").to_stored(pixels).permute(1, 2, 0).numpy()
        base = Image.fromarray(shown[..., :3] if shown.shape[2] >= 3 else shown[..., 0])
        return overlay(base, labels, opacity, self.palette, objects)

    def _mask(self, mask: Tensor, output_type: str) -> Any:
        """Converts a uint8 mask (H, W) to the form of `output_type`."""
        if output_type == "pt":
            return mask.long()
        return mask.numpy() if output_type == "np" else mask_image(mask.numpy(), self.palette)

    def _segmenter(
        self,
        tile_size: int | None,
        num_draws: int,
        timesteps: Sequence[int] | None,
        augment: bool,
        mixed_precision: Precision = "no",
    ) -> Segmenter:
        tiling = Tiling.of(self.unet, tile_size, symmetric=augment)
        levels = tuple(t for t in timesteps or () for _ in range(num_draws))
        if self.classifier is not None:
            levels = tuple(self.classifier.config.timesteps)
            tiling = tiling if tile_size is not None else tiling_for_classifier(tiling, self.classifier)
        turns, device = TURNS if augment else TURNS[:1], self._execution_device
        precision = settled_precision(mixed_precision, device)
        noise = forward_process(self.scheduler) if levels and self.scheduler is not None else None
        parts = (self.unet, self.pixel_range, tiling, device, turns, noise, levels, self.classifier)
        return Segmenter(*parts, precision)

    def _regions(
        self,
        segmenter: Segmenter,
        read: Read,
        size: tuple[int, int],
        count: int,
        generator: Generators,
        instances: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Yields from `Segmenter.regions`, with a progress bar if there are several windows.

        With `instances`, the boundary and distance of objects follow the probabilities, if the network has learnt them.
        """
        seeds = segmenter.seeds(count, generator)
        windows = segmenter.tiling.count(*size)
        with self.progress_bar(total=windows) if windows > 1 else nullcontext() as progress:
            regions = segmenter.regions_with_objects if instances and segmenter.has_objects else segmenter.regions
            yield from regions(read, size, seeds, progress.update if progress else lambda: None)


def check_object_options(
    instances: bool, min_area: int | None, max_hole: int, pixel_size: tuple[float, float] | None = None
) -> None:
    """Raises a ValueError for object options with an invalid value, or set although no objects are asked for."""
    if pixel_size is not None:
        valid = isinstance(pixel_size, (list, tuple)) and len(pixel_size) == 2
        valid = valid and all(is_number(each) and each > 0 for each in pixel_size)
        require(valid, "pixel_size", pixel_size, "must be height and width of a pixel in micrometres, or None")
        if not instances:
            raise ValueError(
                f"pixel_size is {pixel_size}, but objects are not asked for; set instances=True, or leave it out."
            )
    for name, value in (("min_area", min_area), ("max_hole", max_hole)):
        learnt = name == "min_area" and value is None
        require(learnt or is_count(value, 0), name, value, "must be a whole number of pixels, 0 or more")
        if value and not instances:
            raise ValueError(f"{name} is {value}, but objects are not asked for; set instances=True, or leave it out.")
