"""Pictures of any size to masks, with test-time augmentation and an uncertainty map."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from unet_diffusion.atomic import written_aside
from unet_diffusion.large_pictures import create_mask, open_picture
from unet_diffusion.palette import mask_picture, overlay
from unet_diffusion.pipeline_config import PrivateArguments
from unet_diffusion.pixels import PixelRange
from unet_diffusion.segmentation_inference import TURNS, Segmenter, random_seeds
from unet_diffusion.stored_pictures import dtype_name, stored_pictures
from unet_diffusion.tiling import Read, Tiling
from unet_diffusion.unet import UNet

OUTPUT_TYPES = ("pil", "np", "pt")
MAX_CLASSES = 255  # masks are stored in 8 bits, and 255 means "ignore"


@dataclass
class SegmentationOutput(BaseOutput):
    """What `SegmentationPipeline` returns: lists with one entry per picture, since sizes may differ.

    Attributes:
        masks: class indices at the size of the picture: PIL images of mode P, uint8 arrays or int64 tensors (H, W).
        probabilities: of each class, float32 arrays (tensors for "pt") (K, H, W), or None if not asked for.
        uncertainty: entropy of the probabilities divided by log K, in [0, 1], float32 (H, W), or None likewise.
    """

    masks: list[Image.Image] | list[np.ndarray] | list[Tensor]
    probabilities: list[np.ndarray] | list[Tensor] | None
    uncertainty: list[np.ndarray] | list[Tensor] | None


class SegmentationPipeline(PrivateArguments, DiffusionPipeline):
    """Segments pictures of any size; large ones window by window (`unet_diffusion.tiling`).

    Example:
        >>> import numpy as np
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.pipelines import SegmentationPipeline

        >>> pipe = SegmentationPipeline(UNet.from_preset("tiny").to_segmentation(2))
        >>> picture = np.zeros((40, 30), dtype=np.uint8)
        >>> mask = pipe(picture).masks[0]
        >>> mask.mode, mask.size
        ('P', (30, 40))

    Args:
        unet: a network with a segmentation head.
        scheduler: adds noise to the picture where timesteps are asked for; not needed otherwise.
        pixel_range: how stored values map to [-1, 1], as `PixelRange.to_dict` gives it; None: 8-bit pictures.
        class_names: names of the classes, in the order of their indices.
        palette: red, green and blue of each class, 0 to 255; None: colours that colour-blind readers can tell apart.

    Raises:
        ValueError: a network without a segmentation head, a bad pixel range, or not one name or colour per class.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["scheduler"]

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin | None = None,
        pixel_range: dict | None = None,
        class_names: list[str] | None = None,
        palette: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        classes = unet.config.get("num_classes")
        if classes is None or classes > MAX_CLASSES:
            raise ValueError(
                f"the network has num_classes={classes}, but segmentation needs a head of 2 to {MAX_CLASSES} classes; "
                "call unet.to_segmentation(K) and train it."
            )
        if pixel_range is not None:
            PixelRange.from_dict(pixel_range)
        for name, values in (("class_names", class_names), ("palette", palette)):
            if values is not None and len(values) != classes:
                raise ValueError(
                    f"{name} has {len(values)} entries, but the network has {classes} classes; give one each."
                )
        if palette is not None and not all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in palette):
            raise ValueError(f"palette is {palette}, but each entry must be red, green and blue from 0 to 255.")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            _pixel_range=pixel_range,
            _class_names=None if class_names is None else list(class_names),
            _palette=None if palette is None else [list(entry) for entry in palette],
        )

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of the masks, in the order of their indices."""
        return self.config["_class_names"]

    @property
    def palette(self) -> list[list[int]] | None:
        """Red, green and blue of each class, or None for the default colours."""
        return self.config["_palette"]

    def check_inputs(
        self,
        tile_size: int | None,
        num_draws: int,
        timesteps: Sequence[int] | None,
        output_type: str = "pil",
    ) -> None:
        """Raises a ValueError that names the value, the rule and the fix for the first argument that is wrong."""
        if tile_size is not None and (not isinstance(tile_size, int) or tile_size < 1):
            raise ValueError(f"tile_size is {tile_size!r}, but must be an integer of at least 1, or None.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"num_draws is {num_draws!r}, but must be an integer of at least 1.")
        if timesteps is None and num_draws > 1:
            raise ValueError(f"num_draws is {num_draws}, but the picture gets noise at timesteps only; pass timesteps.")
        if timesteps is not None:
            if not hasattr(self.scheduler, "add_noise"):
                raise ValueError(
                    "timesteps were given, but the pipeline has no scheduler that adds noise; "
                    "build it with the scheduler of the training, or leave timesteps out."
                )
            if self.unet.config.get("time_embedding", "sinusoidal") is None:
                raise ValueError(
                    "timesteps were given, but the network knows none (time_embedding is None); leave them out."
                )
            limit = self.scheduler.config.num_train_timesteps
            if not timesteps or not all(0 <= t < limit for t in timesteps):
                raise ValueError(f"timesteps are {list(timesteps)}, but must be one or more from 0 to {limit - 1}.")
        for module in self.unet.modules():
            if module.training and (
                isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.Dropout) and module.p > 0)
            ):
                raise ValueError(
                    f"the network is in training mode, where its {type(module).__name__} layers are random or learn; "
                    "call pipe.unet.eval() first."
                )

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        tile_size: int | None = None,
        num_draws: int = 1,
        timesteps: Sequence[int] | None = None,
        augment: bool = False,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_probabilities: bool = True,
        return_dict: bool = True,
    ) -> SegmentationOutput | tuple:
        """Segments one or more pictures, each at its own size.

        Args:
            image: a PIL image, a path, an array (H, W) or (H, W, C), or a tensor (C, H, W) or (B, C, H, W), with the
                values that are stored in files; or a list of those.
            tile_size: output pixels a side of a tile; None: chosen for about 1 GiB of memory in the network. Pictures
                not larger than a tile with its context are run whole.
            num_draws: noisy versions of the picture per timestep.
            timesteps: where noise is added to the picture before it is segmented; the probabilities are averaged. None:
                the clean picture at the timestep that the network was trained to segment at.
            augment: average over the 8 flips and rotations of the picture, at 8 times the cost.
            generator: where the noise comes from; None: PyTorch's global one.
            output_type: "pil": PIL masks of mode P with the palette; "np": uint8 masks; "pt": int64 masks, on the CPU.
            return_probabilities: whether to return probabilities and uncertainty, 4 (K + 1) bytes per pixel.
            return_dict: whether to return a `SegmentationOutput` rather than a tuple.

        Raises:
            ValueError: a picture or an argument that does not fit the network, named with the fix.
        """
        self.check_inputs(tile_size, num_draws, timesteps, output_type)
        segmenter = self._segmenter(tile_size, num_draws, timesteps, augment)
        masks: list[Tensor] = []
        probabilities: list[Tensor] = []
        uncertainty: list[Tensor] = []
        for batch in self._batches(stored_pictures(image), segmenter.tiling):
            count, (height, width) = len(batch), batch[0].shape[1:]

            def read(rows: slice, columns: slice, batch: list[Tensor] = batch) -> Tensor:
                return torch.stack([picture[:, rows, columns] for picture in batch])

            mask = torch.empty(count, height, width, dtype=torch.uint8)
            chances = torch.empty(count if return_probabilities else 0, self.unet.config.num_classes, height, width)
            entropy = torch.empty(len(chances), height, width)
            for rows, columns, part in self._regions(segmenter, read, (height, width), count, generator):
                mask[:, rows, columns] = part.argmax(dim=1)
                if return_probabilities:
                    chances[..., rows, columns] = part
                    entropy[:, rows, columns] = torch.special.entr(part).sum(dim=1) / math.log(part.shape[1])
            masks.extend(mask)
            probabilities.extend(chances)
            uncertainty.extend(entropy)
        self.maybe_free_model_hooks()

        def arrays(maps: list[Tensor]) -> Any:
            return maps if output_type == "pt" else [each.numpy() for each in maps]

        output = SegmentationOutput(
            masks=[self._mask(mask, output_type) for mask in masks],
            probabilities=arrays(probabilities) if return_probabilities else None,
            uncertainty=arrays(uncertainty) if return_probabilities else None,
        )
        return output if return_dict else (output.masks, output.probabilities, output.uncertainty)

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
    ) -> None:
        """Segments a picture that may be larger than memory: read in windows, the mask written in windows.

        Args:
            source: path of a `.npy`, `.tif` or `.zarr` picture, or any array (H, W) or (H, W, C) with slices.
            target: path of the mask to write, `.npy`, `.tif` or `.zarr`, which appears when it is complete; or any
                array (H, W) that windows of uint8 class indices can be assigned to.
            tile_size: as in `__call__`.
            num_draws: as in `__call__`.
            timesteps: as in `__call__`.
            augment: as in `__call__`.
            generator: as in `__call__`.

        Raises:
            ValueError: a picture or an argument that does not fit the network, or a target that exists.
        """
        self.check_inputs(tile_size, num_draws, timesteps)
        picture = open_picture(source)
        size = picture.shape[:2]
        self._check_picture(picture.shape[2], "float32" if picture.dtype.kind == "f" else picture.dtype.name)
        segmenter = self._segmenter(tile_size, num_draws, timesteps, augment)

        def read(rows: slice, columns: slice) -> Tensor:
            return torch.from_numpy(picture.read(rows, columns)).permute(2, 0, 1)[None]

        def fill(mask: Any) -> None:
            for rows, columns, part in self._regions(segmenter, read, size, 1, generator):
                mask[rows, columns] = part[0].argmax(dim=0).to("cpu", torch.uint8).numpy()

        if not isinstance(target, (str, Path)):
            if tuple(target.shape) != size:
                raise ValueError(f"target has shape {tuple(target.shape)}, but the picture is {size[0]}x{size[1]}.")
            fill(target)
        elif Path(target).exists():
            raise ValueError(f"{target} exists already; remove it, or choose another name.")
        else:
            with written_aside(Path(target)) as aside:
                fill(create_mask(aside, *size))
        self.maybe_free_model_hooks()

    def overlay(self, image: Any, mask: Any, opacity: float = 0.5) -> Image.Image:
        """The classes of a mask in colour over its picture, as RGB; class 0 stays clear.

        Args:
            image: one picture, as in `__call__`.
            mask: its mask as a PIL image, an array or a tensor (H, W).
            opacity: of the colours, from 0 to 1.

        Raises:
            ValueError: a picture and a mask of different sizes, more than one picture, or another opacity.
        """
        pictures = list(stored_pictures(image))
        labels = np.asarray(mask)
        if len(pictures) != 1 or tuple(pictures[0].shape[1:]) != labels.shape:
            sizes = [f"{picture.shape[1]}x{picture.shape[2]}" for picture in pictures]
            raise ValueError(
                f"the pictures are {sizes} and the mask has shape {labels.shape}; give one picture and its mask."
            )
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity is {opacity}, but must be from 0 to 1.")
        self._check_picture(len(pictures[0]), dtype_name(pictures[0]))
        shown = PixelRange.full("uint8").to_stored(self.pixel_range.to_model(pictures[0])).permute(1, 2, 0).numpy()
        base = Image.fromarray(shown[..., :3] if shown.shape[2] >= 3 else shown[..., 0])
        return overlay(base, labels, opacity, self.palette)

    def _mask(self, mask: Tensor, output_type: str) -> Any:
        """A uint8 mask (H, W) in the form that is asked for."""
        if output_type == "pt":
            return mask.long()
        return mask.numpy() if output_type == "np" else mask_picture(mask.numpy(), self.palette)

    def _segmenter(
        self, tile_size: int | None, num_draws: int, timesteps: Sequence[int] | None, augment: bool
    ) -> Segmenter:
        return Segmenter(
            unet=self.unet,
            pixel_range=self.pixel_range,
            tiling=Tiling.of(self.unet, tile_size, symmetric=augment),
            device=self._execution_device,
            turns=tuple(TURNS if augment else TURNS[:1]),
            scheduler=self.scheduler,
            levels=tuple(t for t in timesteps or () for _ in range(num_draws)),
        )

    def _regions(
        self,
        segmenter: Segmenter,
        read: Read,
        size: tuple[int, int],
        count: int,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """`Segmenter.regions` with a progress bar where there are several windows."""
        seeds = random_seeds(count, generator) if segmenter.levels else []
        windows = segmenter.tiling.count(*size)
        with self.progress_bar(total=windows) if windows > 1 else nullcontext() as progress:
            yield from segmenter.regions(read, size, seeds, progress.update if progress else lambda: None)

    def _batches(self, pictures: Iterable[Tensor], tiling: Tiling) -> Iterator[list[Tensor]]:
        """Neighbouring pictures of one size, as many as take the memory of one window; (C, H, W) each."""
        batch: list[Tensor] = []
        for picture in pictures:
            self._check_picture(len(picture), dtype_name(picture))
            if batch and (picture.shape != batch[0].shape or len(batch) >= tiling.batch_size(*picture.shape[1:])):
                yield batch
                batch = []
            batch.append(picture)
        if batch:
            yield batch

    def _check_picture(self, channels: int, dtype: str) -> None:
        """Raises a ValueErr."""
        wanted, stored = self.unet.config.in_channels, self.pixel_range.dtype
        if channels != wanted:
            modes = {1: "L", 3: "RGB", 4: "RGBA"}
            fix = f'image.convert("{modes[wanted]}")' if wanted in modes else f"a picture of {wanted} channels"
            raise ValueError(f"the picture has {channels} channels, but the network takes {wanted}; pass {fix}.")
        if dtype != stored:
            raise ValueError(
                f"the picture holds {dtype}, but the network was trained on {stored} in the range "
                f"{list(self.pixel_range.low)} to {list(self.pixel_range.high)}; pass stored values of that data type."
            )
