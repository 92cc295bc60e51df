"""Images without masks beside those with masks: what they teach, and which they are."""

from dataclasses import dataclass, replace

from datasets import Dataset

from unet_diffusion.data.cache import cache_images
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import MaskedSets, open_part
from unet_diffusion.data.sets import ImageSets, labels_among, rows_without
from unet_diffusion.data.sources import open_source


@dataclass
class JointConfig:
    """What images without masks teach beside those with masks, and which they are."""

    denoising_weight: float = 0.0
    """Weight of the noise-prediction loss; above 0, every step also predicts the noise of as many images without
    masks, so that the network generates as well and learns from them."""
    self_training_weight: float | None = None
    """Weight of the loss of the network's own masks; above 0, after a tenth of the steps every one also learns from as
    many images without masks, wherever the network is sure of their classes. By default 1 for a network from a DDPM
    run where there are such images (unlabelled, or those beyond max_labels), else 0."""
    confidence: float = 0.9
    """Probability of a class from which on the network is sure of it, in self-training."""
    unlabelled: str | None = None
    """Images without masks, a source like `data`; by default all of `data`, those beyond max_labels too. What is held
    out for validation is left out of them."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("denoising_weight", "self_training_weight"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}, but is a probability above 0 and below 1.")
        if self.unlabelled is not None and self.self_training_weight is not None and not self.needs_images:
            raise ValueError(
                f"unlabelled is {self.unlabelled!r}, but denoising_weight and self_training_weight are 0, so that "
                "nothing learns from these images; set one above 0, or leave unlabelled out."
            )

    @property
    def needs_images(self) -> bool:
        """Whether anything learns from images without masks, once the weights are settled."""
        return max(self.denoising_weight, self.self_training_weight or 0) > 0


def load_unlabelled(
    config: JointConfig,
    options: MaskedDataConfig,
    data: MaskedSets,
    label_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> ImageSets:
    """The images without masks, read as those with masks are.

    Args:
        config: which images.
        options: how those with masks were read.
        data: those with masks. The ones that masks are validated on are what noise prediction is validated on; equal
            images are not trained on, wherever they come from.
        label_names: classes that the network can be conditioned on; others are taken for none.
        seed: of the run; it sets the crops.

    Raises:
        ValueError: a source that cannot be read; images of other channels, dtype or size; none that is not held out.
    """
    name = config.unlabelled
    if name is None:
        rows, _, name = open_part(replace(options, max_labels=None), "train")
        rows = rows.select_columns("image")
    else:
        rows = open_source(name, cache_dir=options.cache_dir)
    assert isinstance(rows, Dataset)
    cache = cache_images(rows, options.preparation, name, options.max_broken, options.cache_dir)
    found, expected = (cache.channels, cache.dtype), (data.train.channels, data.pixel_range.dtype)
    if found != expected:
        raise ValueError(
            f"unlabelled images of {name} have {found[0]} channels of {found[1]}, those with masks {expected[0]} of "
            f"{expected[1]}; they must agree. channels=1 or 3 converts both."
        )
    (height, width), size = cache.sizes[0], (data.train.height, data.train.width)
    if options.crop_size is None and (height, width) != size:
        raise ValueError(
            f"unlabelled images of {name} have {width}x{height} pixels, those with masks {size[1]}x{size[0]}; give "
            "crop_size to cut both, or image_size to resize them."
        )
    held_out = data.validation
    usable = rows_without(cache, held_out.cache.images, held_out.rows)
    if not len(usable):
        raise ValueError(f"all {len(cache)} unlabelled images of {name} are held out for validation; give others.")
    train = ImageDataset(
        cache,
        usable,
        size,
        data.pixel_range,
        name=name,
        class_names=label_names,
        labels=labels_among(label_names, cache)[usable],
        random=options.crop_size is not None,
        seed=seed,
    )
    return ImageSets(
        train, ImageDataset(held_out.cache.images, held_out.rows, size, data.pixel_range, name=held_out.name)
    )
