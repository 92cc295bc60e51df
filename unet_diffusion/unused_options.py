"""Options without effect: one table of the cases, used to refuse such options with value, rule and fix.

Every dataclass of options checks itself, and the options of a command are checked once more together. Rules that depend
on the data or the network are checked when these are known, before training starts.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import signature
from typing import Any

MASKS = ("mask_column", "instances_column", "masks", "mask_suffix", "mask_prefix", "image_suffix", "masks_per_image")
MEANING = ("mask_encoding", "mask_colours", "num_classes", "class_names", "border_weights")
VARIATIONS = (
    *("elastic", "elastic_grid", "rotation", "scale"),  # flip and rotate90 are given by being switched off
    *("brightness", "contrast", "gamma", "noise", "invert", "colour"),
)


@dataclass(frozen=True)
class Unused:
    """A case in which options have no effect.

    An option that is off (0, False or None) states what happens anyway, so it is never refused.

    Attributes:
        options: the names of the options; giving any of them is refused.
        when: returns whether the options have no effect. Its parameters name the options and facts on which this
            depends; the case counts if all of these are known.
        rule: why they have no effect, with the parameters in braces.
        fix: what to do instead, with the parameters in braces, and `{option}` for the refused one.
        zero_is_off: False for options for which 0 is a value like any other.
        idle: False if the option has an effect, but none that a user can mean. Saved options keep it.
    """

    options: tuple[str, ...]
    when: Callable[..., bool]
    rule: str
    fix: str = "leave {option} out"
    zero_is_off: bool = True
    idle: bool = True

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Returns whether the options have no effect with these values of options and facts."""
        needed = tuple(signature(self.when).parameters)
        if not set(needed) <= set(values):
            return False
        try:
            return bool(self.when(*(values[name] for name in needed)))
        except TypeError:  # a value of a wrong type; other checks name it
            return False

    def message(self, option: str, values: Mapping[str, Any]) -> str:
        """Returns the error message that refuses an option."""
        rule, fix = (text.format(**{**values, "option": option}) for text in (self.rule, self.fix))
        return f"{option} is {values[option]!r}, but {rule}; {fix}."


TABLE = (
    # the steps of a training
    Unused(
        ("warmup_steps",),
        lambda warmup_steps, steps: warmup_steps > steps,
        "the run has {steps} steps, so the learning rate never reaches its peak",
        "set it to at most {steps}, or raise steps",
        idle=False,
    ),
    Unused(
        ("schedule",),
        lambda warmup_steps, steps: warmup_steps >= steps,
        "all {steps} steps of the run belong to the warm-up, and only the steps after it follow a schedule",
        "set warmup_steps below {steps}, or leave schedule out",
    ),
    # what is held out
    Unused(
        ("validate_every", "validation_images", "patience"),
        lambda held_out: not held_out,
        "no image is held out, so there are no validations",
        "hold images out by validation_fraction or name a validation set, or leave {option} out",
    ),
    Unused(
        ("patience",),
        lambda patience, validate_every, steps: patience is not None and (patience + 1) * validate_every >= steps,
        "with a validation every {validate_every} of {steps} steps, no run ends before its last step",
        "lower validate_every or patience, or leave patience out",
    ),
    Unused(
        ("validation_fraction", "group_column"),
        lambda validation_data, validation_split: validation_data is not None or validation_split is not None,
        "a validation set is named, so no other image is held out",
    ),
    Unused(
        ("group_column",),
        lambda validation_fraction: validation_fraction == 0,
        "validation_fraction is 0, so no image is held out by its group",
    ),
    Unused(
        ("validation_fraction", "group_column"),
        lambda streaming: streaming,
        "nothing of a stream is held out",
        "name a validation set by validation_data or validation_split, and leave {option} out",
    ),
    # images
    Unused(
        ("percentiles_of",),
        lambda percentiles: percentiles is None,
        "no percentiles are given",
        "give percentiles, such as 1 and 99.8, or leave percentiles_of out",
    ),
    Unused(
        ("shuffle_buffer",),
        lambda streaming: not streaming,
        "images that are not streamed are shuffled as a whole",
        "set streaming, or leave shuffle_buffer out",
    ),
    Unused(
        ("shuffle_buffer",),
        lambda indexed: indexed,
        "each image of this source can be read alone, so that all of them are shuffled",
    ),
    Unused(
        ("crop_size",),
        lambda crop_size, image_size: None not in (crop_size, image_size) and crop_size > image_size,
        "image_size makes the shorter side {image_size} pixels first, so every square would be filled up with its "
        "mirror image",
        "set crop_size to at most {image_size}, or leave image_size out",
        idle=False,
    ),
    Unused(
        ("label_column",),
        lambda class_conditional, label_column: not class_conditional and label_column != "label",
        "the network does not learn classes",
        "set class_conditional, or leave label_column out",
    ),
    # diffusion
    *(
        Unused((name,), differs, f"the recipe {{recipe!r}} has {{settings[{name}]!r}}", "leave one of them out")
        for name, differs in {
            "prediction_type": lambda settings, prediction_type: prediction_type != settings["prediction_type"],
            "min_snr_gamma": lambda settings, min_snr_gamma: min_snr_gamma != settings["min_snr_gamma"],
            "beta_schedule": lambda settings, beta_schedule: beta_schedule != settings["beta_schedule"],
        }.items()
    ),
    Unused(
        ("label_dropout",),
        lambda class_conditional: not class_conditional,
        "class_conditional is not set, so there is no label to drop",
        "set class_conditional, or leave label_dropout out",
    ),
    Unused(
        ("class_conditional",),
        lambda task: task == "super-resolution",
        "super-resolution starts from an image, which shows what it is of",
    ),
    Unused(
        ("scale", "condition_noise"),
        lambda task: task == "generation",
        "task is 'generation', which starts from noise alone",
        "set task to super-resolution, or leave {option} out",
    ),
    # masks
    Unused(
        ("image_column", "mask_column", "instances_column"),
        lambda masks, mask_suffix, mask_prefix, image_suffix: any(
            each is not None for each in (masks, mask_suffix, mask_prefix, image_suffix)
        ),
        "masks or an affix of names is given too, and images and masks that are files have no columns",
    ),
    Unused(
        ("mask_suffix", "mask_prefix", "image_suffix", "masks_per_image"),
        lambda masks_in_memory: masks_in_memory,
        "masks in memory have no names of files",
    ),
    Unused(
        ("instances_column",),
        lambda mask_encoding: mask_encoding == "instances",
        "mask_encoding is 'instances', so the masks are the instance maps",
    ),
    Unused(
        ("mask_threshold",),
        lambda mask_encoding: mask_encoding != "binary",
        "mask_encoding is {mask_encoding!r}, and only binary masks have a threshold",
        "set mask_encoding to 'binary', or leave mask_threshold out",
    ),
    Unused(
        ("mask_colours",),
        lambda mask_encoding: mask_encoding not in ("auto", "palette"),
        "mask_encoding is {mask_encoding!r}, and only a palette has colours",
        "set mask_encoding to 'palette', or leave mask_colours out",
    ),
    # segmentation
    Unused(
        ("balance_classes", "border_weights"),
        lambda loss: loss == "dice",
        "loss is 'dice', which takes no class or pixel weights",
        "set loss='both', or leave {option} out",
    ),
    Unused(
        ("trunk_rate",),
        lambda learn: learn in ("head", "pixel_classifier"),
        "learn={learn!r} freezes the trunk",
    ),
    Unused(
        ("instances",),
        lambda learn: learn == "pixel_classifier",
        "a pixel classifier gives classes alone",
        "set learn='everything', or leave instances out",
    ),
    Unused(
        ("timestep",),
        lambda learn: learn == "pixel_classifier",
        "a pixel classifier has timesteps of its own",
        "give timesteps, and leave timestep out",
        zero_is_off=False,
    ),
    Unused(
        ("timestep",),
        lambda takes_timesteps: not takes_timesteps,
        "the network takes none (time_embedding is None)",
        zero_is_off=False,
    ),
    Unused(
        ("timesteps", "stages", "hidden"),
        lambda learn: learn != "pixel_classifier",
        "learn is {learn!r}, which reads no features",
        "set learn='pixel_classifier', or leave {option} out",
    ),
    # tuning for a few steps
    Unused(
        ("stages",),
        lambda method: method != "consistency",
        "method is {method!r}, which has no stages",
        "set method='consistency', or leave stages out",
    ),
    # images without masks
    Unused(
        ("confidence",),
        lambda self_training_weight: self_training_weight == 0,
        "self_training_weight is 0, so the network does not learn from its own masks",
        "set self_training_weight above 0, or leave confidence out",
    ),
    Unused(
        ("unlabelled",),
        lambda denoising_weight, self_training_weight: denoising_weight == self_training_weight == 0,
        "denoising_weight and self_training_weight are 0, so nothing learns from these images",
        "set one of them above 0, or leave unlabelled out",
    ),
    Unused(
        ("denoising_weight", "self_training_weight"),
        lambda learn: learn == "pixel_classifier",
        "learn is 'pixel_classifier', whose trunk does not learn, so images without masks teach it nothing",
        "set learn='everything', or leave {option} out",
    ),
    Unused(
        ("self_training_weight",),
        lambda augment: not augment,
        "augment is off, and self-training learns from the difference that varying an image makes",
        "leave augment on, or set self_training_weight=0",
        idle=False,
    ),
    # variations of images with masks
    Unused(
        VARIATIONS,
        lambda augment: not augment,
        "augment is off, so no image is varied",
        "leave augment on, or leave {option} out",
    ),
    Unused(
        ("elastic_grid",),
        lambda elastic: elastic == 0,
        "elastic is 0, so nothing is deformed",
        "set elastic above 0, or leave elastic_grid out",
    ),
    Unused(
        ("colour",),
        lambda image_channels: image_channels == 1,
        "the images have one channel, and it varies channels independently",
    ),
    # other commands
    Unused(
        ("label_column",),
        lambda plain: not plain,
        "it is for images without masks",
        "add plain, or leave label_column out",
    ),
    Unused(
        (*MASKS, *MEANING),
        lambda plain: plain,
        "plain examines the images alone",
        "leave out plain, or {option}",
    ),
    Unused(
        ("flip",),
        lambda training_images: True,
        "real images are mirrored if the run learnt from mirrored ones",
    ),
    Unused(
        ("num_workers", "streaming"),
        lambda training_images: True,
        "the real images are compared all at once",
    ),
    Unused(
        ("label_column",),
        lambda training_images, label_column: label_column != "label",
        "images are compared whatever their classes",
    ),
    Unused(
        ("guidance_scale",),
        lambda class_labels, guidance_scale: not class_labels and guidance_scale != 1,
        "there is no class to guide to",
        "give class_labels, or leave guidance_scale out",
    ),
    Unused(
        ("num_draws", "seed"),
        lambda num_draws, timesteps: not timesteps,
        "noise is only added at timesteps",
        "give timesteps, or leave {option} out",
    ),
    Unused(
        ("min_area", "max_hole", "unit"),
        lambda instances: not instances,
        "objects are not asked for",
        "add instances, or leave {option} out",
    ),
    Unused(
        ("opacity",),
        lambda overlays: not overlays,
        "overlays are left out",
        zero_is_off=False,
    ),
    Unused(
        ("head",),
        lambda format: format not in ("onnx", "torch-export"),
        "{format!r} writes all of a run",
    ),
)


def check_used(options: Any, **facts: Any) -> None:
    """Raises a ValueError for the first option that is given but has no effect.

    An option is given if it differs from the default of its dataclass.

    Args:
        options: a dataclass of options, perhaps with sections that are such dataclasses.
        facts: other known facts, such as `held_out`, whether images are held out. They may include values of options
            that are not in `options`.
    """
    given = {name: value for name, (value, default) in _flat(options).items() if _is_given(value, default)}
    values = {name: value for name, (value, _) in _flat(options).items()} | facts
    for case in TABLE:
        named = [name for name in case.options if name in given or (name in facts and _is_given(facts[name], False))]
        for name in named:
            if not (case.zero_is_off and _is_off(values[name])) and case.applies(values):
                raise ValueError(case.message(name, values))


def unused_among(values: Mapping[str, Any]) -> set[str]:
    """Returns the names of the options that have no effect, given saved values of options and facts."""
    return {name for case in TABLE if case.idle and case.applies(values) for name in case.options if name in values}


def without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns saved values of options without those that have no effect, which then get their defaults."""
    unused = unused_among(values)
    return {name: value for name, value in values.items() if name not in unused}


def _flat(options: Any) -> dict[str, tuple[Any, Any]]:
    """Returns value and default of each option by name, including those of sections; `MISSING` if there is none."""
    found: dict[str, tuple[Any, Any]] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        found |= _flat(value) if is_dataclass(value) else {each.name: (value, each.default)}
    return found


def _is_given(value: Any, default: Any) -> bool:
    return default is not MISSING and (tuple(value) if isinstance(value, list) else value) != default


def _is_off(value: Any) -> bool:
    return value is None or value == 0
