"""The parts that our pipelines share: saved arguments, and checks of networks and images."""

import inspect
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from unet_diffusion.checks import is_count, plain, require
from unet_diffusion.diffusion.sampling import NOISE_SETTINGS, check_noise, noise_settings
from unet_diffusion.images.conversion import UNCHANGED, check_image, dtype_name, stored_images
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.saved_index import (
    GENERATES,
    KEPT_LABELS,
    LEFT_NOISE,
    OWN_PIPELINE,
    OWN_PIPELINES,
    STOCK_PIPELINE,
    TUNED,
    from_index,
    to_index,
)
from unet_diffusion.unet import UNet

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None  # one for all images, or one for each
OF_NOISE_HEAD = (GENERATES, KEPT_LABELS, LEFT_NOISE, TUNED)  # keys of runs for masks that also have a noise head


class PrivateArguments:
    """A mixin for pipelines whose plain arguments are saved under private keys (`_pixel_range` for `pixel_range`).

    Stock pipelines ignore private keys of `model_index.json`; public ones that they do not know make them warn.
    """

    config: Any
    unet: UNet
    scheduler: Any
    preparation = UNCHANGED  # of images other than tensors; commands set it to the options of the run

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline as `DiffusionPipeline.from_pretrained` does.

        A warning tells if the private arguments are missing, because a pipeline of diffusers saved the folder.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]  # beside this
        index = cls.load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
        if "_pixel_range" not in index and "pixel_range" not in kwargs:
            logging.getLogger(__name__).warning(
                "%s was saved by a pipeline of diffusers, which leaves out the range of pixel values, the names of "
                "classes and the settings of the training, so images of 8 bits are assumed; pass pixel_range and the "
                "others, or save runs with %s, or copy their folder",
                pretrained_model_name_or_path,
                cls.__name__,
            )
        kept = {key: from_index(index[key]) for key in OF_NOISE_HEAD if key in index and key not in pipe.config}
        pipe.register_to_config(**kept)  # so that they are saved again by a pipeline that does not take them
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Renames the arguments of `__init__` that are saved under private keys to their public names.

        Components that only another of our pipelines has, such as a classifier, are left out.
        """
        arguments = inspect.signature(cls.__init__).parameters
        private = {f"_{name}": name for name in arguments}
        if GENERATES in private and GENERATES not in config_dict:
            private[KEPT_LABELS] = private[GENERATES]
        renamed = {private.get(key, key): from_index(value) for key, value in config_dict.items()}
        known = {key: value for key, value in renamed.items() if key in arguments or key.startswith("_")}
        return super().extract_init_dict(known, **kwargs)  # type: ignore[misc]  # of the pipeline beside this mixin

    def to_json_string(self) -> str:
        """The content of `model_index.json`, without missing components except the scheduler, as in stock pipelines.

        A pipeline that generates images is saved under the name of the stock pipeline that does the same, which
        `DiffusionPipeline.from_pretrained` finds. The others are saved under their names with the module, since the
        error of that method shows this name.
        """
        index = json.loads(super().to_json_string())  # type: ignore[misc]  # of the pipeline beside this mixin
        named = {key: value for key, value in index.items() if value != [None, None] or key == "scheduler"}
        named = {key: to_index(key, value) for key, value in named.items()}
        kind = type(self)
        if GENERATES in named:
            named |= {"_class_name": STOCK_PIPELINE, OWN_PIPELINE: kind.__name__}
        elif kind.__module__.startswith(OWN_PIPELINES):
            named["_class_name"] = OWN_PIPELINES + kind.__name__
        return json.dumps(named, indent=2, sort_keys=True) + "\n"

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.in_channels

    @property
    def pixel_range(self) -> PixelRange:
        """The mapping of stored values to the network's [-1, 1]."""
        return saved_range(self.config["_pixel_range"])

    def check_noise_settings(self, left_out: Collection[str] = ()) -> None:
        """Raises a ValueError if the scheduler has other settings than the network was trained for.

        `left_out` names settings that do not matter.
        """
        check_noise(self.scheduler, self.config["_trained_with"], self.unet.config.get("prediction_type"), left_out)

    def check_image(self, image: Tensor) -> None:
        """Raises a ValueError unless a stored image (C, H, W) has the channels and data type of the training images."""
        check_image(self.channels, self.pixel_range, len(image), dtype_name(image))

    def read_images(self, image: Any) -> Iterator[Tensor]:
        """Yields the images that `stored_images` finds in `image`, each checked."""
        for stored in stored_images(image, self.channels, self.preparation):
            self.check_image(stored)
            yield stored


def saved_range(saved: dict | None) -> PixelRange:
    """Reads a range that `PixelRange.to_dict` saved; None means 8-bit images. Raises a ValueError for a bad range."""
    return PixelRange.full("uint8") if saved is None else PixelRange.from_dict(saved)


def trained_settings(saved: dict | None, scheduler: SchedulerMixin | None) -> dict | None:
    """The settings of the scheduler that a network was trained with: those that are saved, or else the scheduler's.

    Raises:
        ValueError: the saved settings are not those of a scheduler.
    """
    if saved is None:
        return noise_settings(scheduler)
    if not isinstance(saved, dict) or not set(NOISE_SETTINGS) <= set(saved):
        raise ValueError(f"trained_with is {saved!r}, but must hold {', '.join(NOISE_SETTINGS)}; leave it out.")
    return saved


def generators_for(generator: Any, count: int) -> Generators:
    """The generator for `count` images, or a list with one for each; None for PyTorch's global one.

    Raises:
        ValueError: there are several generators, but not one for each image.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    rule = "must be a torch.Generator, or a list or tuple of them"
    require(all(isinstance(each, torch.Generator) for each in generators), "generator", generator, rule)
    if len(generators) != count:
        raise ValueError(
            f"there are {len(generators)} generators, but the number of images is {count}; pass one, or one for each "
            "image."
        )
    return generators


def check_tuned_steps(few_steps: Any) -> None:
    """Raises a ValueError unless `few_steps` is None or a number of steps that a network can be tuned for."""
    rule = "must be an integer of at least 1, or None for a network that was not tuned"
    require(few_steps is None or is_count(few_steps), "few_steps", few_steps, rule)


def check_noise_predictor(unet: UNet, images_in: int, rule: str) -> None:
    """Raises a ValueError unless the network is ours, is padded, takes timesteps, and predicts the noise of one image.

    It must take `images_in` images, joined in its input channels, as `rule` says in the message.
    """
    if isinstance(unet, UNet2DModel) and not isinstance(unet, UNet):
        raise ValueError(
            f"the network is a {type(unet).__name__}, but must have the heads of a UNet; make one of a UNet2DModel by "
            "UNet2DAdapter.from_stock, from unet_diffusion.adapters, or use a pipeline of diffusers."
        )
    config = unet.config
    time_embedding, padding = config.get("time_embedding", "sinusoidal"), config.get("padding", "same")
    fits = config.out_channels is not None and config.in_channels == images_in * config.out_channels
    if not fits or time_embedding is None or padding != "same":
        raise ValueError(
            f"the network has in_channels={config.in_channels}, out_channels={config.out_channels}, "
            f"time_embedding={time_embedding!r} and padding={padding!r}, but {rule}, a timestep embedding and "
            "padding='same'; train a network with these."
        )


def check_class_details(
    num_classes: int, class_names: Sequence[str] | None, palette: Sequence[Sequence[int]] | None
) -> None:
    """Raises a ValueError unless there is one name and one colour, integers from 0 to 255, per class, or None."""
    check_names("class_names", class_names, num_classes)
    if palette is None:
        return
    colours = plain(palette)
    valid = isinstance(colours, (list, tuple)) and all(map(is_colour, colours))
    require(valid, "palette", palette, "each entry must be red, green and blue, integers from 0 to 255")
    check_number_of_entries("palette", colours, num_classes)


def check_names(option: str, names: Any, num_classes: int | None) -> None:
    """Raises a ValueError unless there is one name per class, or None; `num_classes` None is any number."""
    if names is None:
        return
    values = plain(names)
    texts = isinstance(values, (list, tuple)) and all(isinstance(name, str) for name in values)
    require(texts, option, names, "must be a list of names, one for each class, or None")
    if num_classes is not None:
        check_number_of_entries(option, values, num_classes)


def check_label_names(names: Any, num_classes: int | None) -> None:
    """Raises a ValueError unless there is one name per class, by which it can be chosen, or None."""
    check_names("label_names", names, num_classes)
    values = list(plain(names) or ())
    twice = next((name for name in values if values.count(name) > 1), None)
    require(twice is None, "label_names", names, f"{twice!r} stands for more than one class; give each its own name")


def check_number_of_entries(option: str, values: Sequence[Any], num_classes: int) -> None:
    """Raises a ValueError unless there is one entry per class."""
    if len(values) != num_classes:
        raise ValueError(
            f"{option} has {len(values)} entries, but the network has {num_classes} classes; give one each."
        )


def is_colour(value: Any) -> bool:
    """Returns whether `value` is red, green and blue, integers from 0 to 255."""
    three = isinstance(value, (list, tuple)) and len(value) == 3
    return three and all(is_count(channel, 0) and channel <= 255 for channel in value)
