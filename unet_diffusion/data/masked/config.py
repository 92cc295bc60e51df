"""The options that say which images with masks a run uses, and how the masks are read."""

from dataclasses import dataclass

from unet_diffusion.data.config import ImageOptions, SourceOptions
from unet_diffusion.data.masked.encoding import check_encoding, parse_colours
from unet_diffusion.images.labels import IGNORE_INDEX
from unet_diffusion.images.masks import Colour
from unet_diffusion.images.resizing import Preparation


@dataclass
class MaskedOptions(SourceOptions):
    """Which images with masks, and how the masks are read."""

    mask_column: str | None = None
    """Column of the masks; by default `mask`, or the only other one of type Image."""
    instances_column: str | None = None
    """Column of instance maps, 0 being the background. In training, masks get background where two instances touch."""
    masks: str | None = None
    """Folder of masks, named like their images but for the ending; `data` is then a folder of images."""
    mask_suffix: str | None = None
    """What the names of masks have in addition before the ending, such as "_mask"; without `masks`, they lie beside
    their images."""
    mask_encoding: str = "auto"
    """What mask values mean: "indices" of classes (255: ignored), "binary" (two values), "palette" (each colour or
    value a class, black first), "instances" (0: background, above: class 1). "auto" takes colours for a palette,
    exactly 0 and 255 for binary, and the rest for indices."""
    mask_colours: dict[str, int] | None = None
    """Class of each colour, such as "#000000" 0 "#ff0000" 1; 255 ignores. By default the colours that are found, or
    those that a trained run knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_suffix == "" or (self.mask_suffix is not None and "/" in self.mask_suffix):
            raise ValueError(f"mask_suffix is {self.mask_suffix!r}; it is a part of a name, such as '_mask'.")
        if self.mask_encoding == "instances" and self.instances_column is not None:
            raise ValueError(
                "mask_encoding is 'instances', so that the masks are the instance maps; leave out instances_column."
            )
        check_encoding(self.mask_encoding, self.colours)

    @property
    def colours(self) -> dict[Colour, int] | None:
        """`mask_colours` as red, green and blue."""
        return None if self.mask_colours is None else parse_colours(self.mask_colours)

    @property
    def mask_reading(self) -> str:
        """How mask files are read: `mask_encoding`, or "palette" where colours are given."""
        return self.mask_encoding if self.mask_colours is None else "palette"

    @property
    def preparation(self) -> Preparation:
        """What is done to every image and mask before they are stored; nothing is cut off."""
        return Preparation(self.image_size, "random", self.channels)


@dataclass
class MaskedDataConfig(MaskedOptions, ImageOptions):
    """Which images with masks, and what is done to both before they reach the network."""

    validation_fraction: float = 0.1
    """Share of the images held out, at least one, if no validation set is named."""
    image_size: int | None = None
    """Images are resized (Lanczos; masks by nearest neighbour) until the shorter side has so many pixels, and without
    crop_size cut to the square in the middle; by default they keep their size, which without crop_size must then be the
    same for all that are trained on."""
    crop_size: int | None = None
    """Train on squares of so many pixels a side, cut at another place in every epoch; smaller images are mirrored
    beyond their border, which is then ignored. Validation images stay whole."""
    validation_masks: str | None = None
    """Folder of the masks of `validation_data`."""
    num_classes: int | None = None
    """Classes, background included; by default as many as the training masks show."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their indices."""
    max_labels: int | None = None
    """Train on the first so many rows only, as if the others had no masks."""
    border_weights: bool = False
    """Give the weight map of the 2015 paper with each training image, which presses for the background between
    neighbouring instances (connected components where there are no instance maps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_validation and self.validation_fraction == 0:
            raise ValueError(
                "there is nothing to validate on, and the best weights are chosen by validation; give "
                "validation_split, validation_data, or a validation_fraction above 0."
            )
        for name in ("crop_size", "max_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed.")
        if self.num_classes is not None and not 2 <= self.num_classes <= IGNORE_INDEX:
            raise ValueError(f"num_classes is {self.num_classes}; it is from 2 to {IGNORE_INDEX}, background included.")
        if self.class_names is not None:
            if self.num_classes not in (None, len(self.class_names)):
                raise ValueError(
                    f"class_names has {len(self.class_names)} entries, but num_classes is {self.num_classes}; give one "
                    "name each."
                )
            if len(self.class_names) < 2:
                raise ValueError(f"class_names are {self.class_names}; name 2 classes or more, the background first.")
        if (self.validation_masks is not None) != (self.masks is not None and self.validation_data is not None):
            raise ValueError(
                f"validation_masks is {self.validation_masks}; it is given if, and only if, masks and validation_data "
                "are: each names a folder of its own."
            )

    @property
    def known_classes(self) -> int | None:
        """The number of classes, where the user states it or their names."""
        return self.num_classes if self.class_names is None else len(self.class_names)

    @property
    def preparation(self) -> Preparation:
        """What is done to every image and mask before they are stored."""
        return Preparation(self.image_size, "center" if self.crop_size is None else "random", self.channels)
