"""Every case of the table: it refuses, accepts what decides something, and knows the options of earlier versions."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion.commands.options.doctor import Doctor
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration, RealData
from unet_diffusion.commands.options.export import Export
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import (
    DiffusionConfig,
    FewStepsConfig,
    FrozenFeaturesConfig,
    JointConfig,
    SegmentationConfig,
    SuperResolutionConfig,
)
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.run_folder import claim
from unet_diffusion.unused_options import (
    MASKS,
    MEANING,
    TABLE,
    VARIATIONS,
    Unused,
    check_used,
    unused_among,
    without_unused,
)

SECTIONS = {  # of the commands that have some
    TrainDDPM: {
        "data": DataConfig,
        "diffusion": DiffusionConfig,
        "super_resolution": SuperResolutionConfig,
        "training": TrainingConfig,
    },
    TrainSegmentation: {
        "data": MaskedDataConfig,
        "segmentation": SegmentationConfig,
        "frozen_features": FrozenFeaturesConfig,
        "joint": JointConfig,
        "augmentation": AugmentationConfig,
        "training": TrainingConfig,
    },
    TrainClassifier: {"data": DataConfig, "training": TrainingConfig},
    EvaluateGeneration: {"data": RealData},
}


@dataclass
class ForNetworkWithoutTimesteps:
    """Stands for a `SegmentationTask` on such a network, whose fact it gives."""

    segmentation: SegmentationConfig
    takes_timesteps: bool = False


@dataclass
class ForStream:
    """Stands for a stream, of which it tells whether each row can be read alone."""

    data: DataConfig
    indexed: bool


def built(kind: type, values: dict[str, Any]) -> Any:
    """Returns the options of a command, each value in the section that has an option of its name."""
    sections: dict[str, Any] = {}
    rest = dict(values)
    for name, section in SECTIONS.get(kind, {}).items():
        own = {each.name: rest.pop(each.name) for each in fields(section) if each.name in rest}
        if own:
            sections[name] = section(**own)
    options = kind(**sections, **rest)
    check_used(options)
    return options


PIXELS = [np.zeros((4, 4), dtype=np.uint8)]
MASKED = {"data": "x"}
REAL = {"data": "x"}
VALUES: dict[str, Any] = {
    "mask_column": "m",
    "instances_column": "i",
    "masks": "m",
    "mask_suffix": "_m",
    "mask_prefix": "m_",
    "image_suffix": "_i",
    "masks_per_image": "objects",
    "mask_encoding": "binary",
    "mask_colours": {"#000000": 0, "#ffffff": 1},
    "num_classes": 3,
    "class_names": ("a", "b"),
    "border_weights": True,
    "scale": (0.5, 2.0),
    "elastic_grid": 4,
    "invert": 1.0,
}
# the option, the options of which one decides nothing beside the change, and that change; without it all are accepted
EXAMPLES: list[tuple[str, type, dict[str, Any], dict[str, Any]]] = [
    ("warmup_steps", TrainDDPM, {"steps": 30, "warmup_steps": 30}, {"steps": 29}),
    ("warmup_steps", TrainClassifier, {"steps": 30, "warmup_steps": 30}, {"steps": 29}),
    ("schedule", TrainDDPM, {"steps": 40, "warmup_steps": 39, "schedule": "constant"}, {"warmup_steps": 40}),
    (
        "patience",
        TrainSegmentation,
        {"data": "x", "patience": 2, "validate_every": 10, "steps": 31, "warmup_steps": 1},
        {"steps": 30},
    ),
    (
        "percentiles_of",
        TrainDDPM,
        {"percentiles": (1.0, 99.0), "percentiles_of": "image", "image_size": 8},
        {"percentiles": None},
    ),
    ("validate_every", TrainDDPM, {"validate_every": 7}, {"validation_fraction": 0}),
    ("validate_every", TrainClassifier, {"validate_every": 7}, {"validation_fraction": 0}),
    ("validation_images", TrainDDPM, {"validation_images": 7}, {"validation_fraction": 0}),
    ("validation_images", TrainDDPM, {"validation_images": 7, "crop_size": 8}, {"streaming": True}),
    ("patience", TrainSegmentation, {**MASKED, "patience": 7}, {"validation_fraction": 0}),
    ("validation_fraction", TrainDDPM, {"validation_fraction": 0.3}, {"validation_split": "test"}),
    ("validation_fraction", TrainSegmentation, {**MASKED, "validation_fraction": 0.3}, {"validation_data": "y"}),
    ("group_column", TrainDDPM, {"group_column": "g"}, {"validation_data": "y"}),
    ("group_column", TrainSegmentation, {**MASKED, "group_column": "g"}, {"validation_fraction": 0}),
    ("validation_fraction", TrainDDPM, {"validation_fraction": 0.3, "crop_size": 8}, {"streaming": True}),
    ("group_column", TrainDDPM, {"group_column": "g", "crop_size": 8}, {"streaming": True}),
    ("shuffle_buffer", TrainDDPM, {"shuffle_buffer": 7, "streaming": True, "crop_size": 8}, {"streaming": False}),
    (
        "shuffle_buffer",
        ForStream,
        {"data": DataConfig(shuffle_buffer=7, streaming=True, crop_size=8), "indexed": False},
        {"indexed": True},
    ),
    ("crop_size", TrainDDPM, {"crop_size": 8, "image_size": 8}, {"image_size": 7}),
    ("crop_size", TrainSegmentation, {**MASKED, "crop_size": 8, "image_size": 8}, {"image_size": 7}),
    ("label_column", TrainDDPM, {"label_column": "kind", "class_conditional": True}, {"class_conditional": False}),
    ("prediction_type", TrainDDPM, {"prediction_type": "v_prediction"}, {"recipe": "ddpm"}),
    ("min_snr_gamma", TrainDDPM, {"min_snr_gamma": 5.0}, {"recipe": "ddpm"}),
    ("beta_schedule", TrainDDPM, {"beta_schedule": "squaredcos_cap_v2"}, {"recipe": "ddpm"}),
    ("label_dropout", TrainDDPM, {"label_dropout": 0.2, "class_conditional": True}, {"class_conditional": False}),
    ("class_conditional", TrainDDPM, {"class_conditional": True}, {"task": "super-resolution", "scale": 2}),
    ("scale", TrainDDPM, {"scale": 2, "task": "super-resolution"}, {"task": "generation"}),
    (
        "condition_noise",
        TrainDDPM,
        {"scale": 2, "condition_noise": 0.2, "task": "super-resolution"},
        {"task": "generation", "scale": None},
    ),
    ("image_column", TrainSegmentation, {**MASKED, "image_column": "i"}, {"masks": "m"}),
    ("mask_column", TrainSegmentation, {**MASKED, "mask_column": "m"}, {"mask_suffix": "_m"}),
    ("instances_column", TrainSegmentation, {**MASKED, "instances_column": "i"}, {"image_suffix": "_i"}),
    *(
        (name, TrainSegmentation, {"data": "x", "masks": "m", name: VALUES[name]}, {"data": PIXELS, "masks": PIXELS})
        for name in ("mask_suffix", "mask_prefix", "image_suffix", "masks_per_image")
    ),
    ("instances_column", TrainSegmentation, {**MASKED, "instances_column": "i"}, {"mask_encoding": "instances"}),
    (
        "mask_threshold",
        TrainSegmentation,
        {**MASKED, "mask_threshold": 3, "mask_encoding": "binary"},
        {"mask_encoding": "auto"},
    ),
    ("mask_colours", Doctor, {**MASKED, "mask_colours": VALUES["mask_colours"]}, {"mask_encoding": "binary"}),
    ("balance_classes", TrainSegmentation, {**MASKED, "balance_classes": True, "loss": "both"}, {"loss": "dice"}),
    ("border_weights", TrainSegmentation, {**MASKED, "border_weights": True, "loss": "both"}, {"loss": "dice"}),
    ("trunk_rate", TrainSegmentation, {**MASKED, "trunk_rate": 0.5, "learn": "decoder"}, {"learn": "head"}),
    ("instances", TrainSegmentation, {**MASKED, "instances": True}, {"learn": "pixel_classifier"}),
    ("timestep", TrainSegmentation, {**MASKED, "timestep": 0}, {"learn": "pixel_classifier"}),
    (
        "timestep",
        ForNetworkWithoutTimesteps,
        {"segmentation": SegmentationConfig(timestep=0), "takes_timesteps": True},
        {"takes_timesteps": False},
    ),
    *(
        (name, TrainSegmentation, {**MASKED, name: (1,), "learn": "pixel_classifier"}, {"learn": "everything"})
        for name in ("timesteps", "stages", "hidden")
    ),
    ("stages", FewStepsConfig, {"stages": 4, "method": "consistency"}, {"method": "distillation"}),
    (
        "confidence",
        TrainSegmentation,
        {**MASKED, "confidence": 0.8, "self_training_weight": 1},
        {"self_training_weight": 0},
    ),
    ("unlabelled", TrainSegmentation, {**MASKED, "unlabelled": "u"}, {"self_training_weight": 0}),
    ("denoising_weight", TrainSegmentation, {**MASKED, "denoising_weight": 1}, {"learn": "pixel_classifier"}),
    ("self_training_weight", TrainSegmentation, {**MASKED, "self_training_weight": 1}, {"learn": "pixel_classifier"}),
    ("self_training_weight", TrainSegmentation, {**MASKED, "self_training_weight": 1}, {"augment": False}),
    *((name, TrainSegmentation, {**MASKED, name: VALUES.get(name, 0.5)}, {"augment": False}) for name in VARIATIONS),
    ("elastic_grid", TrainSegmentation, {**MASKED, "elastic_grid": 5}, {"elastic": 0}),
    ("colour", TrainSegmentation, {**MASKED, "colour": 0.3, "channels": 3}, {"channels": 1}),
    ("label_column", Doctor, {**MASKED, "label_column": "kind", "plain": True}, {"plain": False}),
    *((name, Doctor, {**MASKED, name: VALUES[name]}, {"plain": True}) for name in (*MASKS, *MEANING)),
    ("flip", EvaluateGeneration, {**REAL}, {"flip": True}),
    ("num_workers", EvaluateGeneration, {**REAL}, {"num_workers": 1}),
    ("streaming", EvaluateGeneration, {**REAL, "crop_size": 8}, {"streaming": True}),
    ("label_column", EvaluateGeneration, {**REAL, "label_column": "label"}, {"label_column": "kind"}),
    ("guidance_scale", EvaluateGeneration, {"guidance_scale": 2, "class_labels": ("1",)}, {"class_labels": ()}),
    ("guidance_scale", Sample, {"guidance_scale": 2, "class_labels": ("1",)}, {"class_labels": ()}),
    ("num_draws", Segment, {"inputs": ("x",), "num_draws": 2, "timesteps": (5,)}, {"timesteps": ()}),
    ("seed", Segment, {"inputs": ("x",), "seed": 2, "timesteps": (5,)}, {"timesteps": ()}),
    ("min_area", Segment, {"inputs": ("x",), "min_area": 5, "instances": True}, {"instances": False}),
    ("max_hole", Segment, {"inputs": ("x",), "max_hole": 5, "instances": True}, {"instances": False}),
    ("unit", Segment, {"inputs": ("x",), "unit": "micrometre", "instances": True}, {"instances": False}),
    ("opacity", Segment, {"inputs": ("x",), "opacity": 0.3}, {"overlays": False}),
    ("head", Export, {"run": "x", "target": "y", "head": "noise", "format": "onnx"}, {"format": "self-contained"}),
]


@pytest.mark.parametrize(("option", "kind", "accepted", "change"), EXAMPLES)
def test_an_option_that_decides_nothing_is_refused_and_beside_others_accepted(option, kind, accepted, change):
    built(kind, accepted)
    with pytest.raises(ValueError, match=rf"^{option} is .*, but .*; .*\.$"):
        built(kind, accepted | change)


def pattern(case: Unused, option: str) -> str:
    """A regular expression for the message of a case, in which any value may stand."""
    text = f"{option} is {{}}, but {case.rule}; {case.fix}."
    return "".join(
        re.escape(literal) + ("" if name is None else ".*") for literal, name, _, _ in Formatter().parse(text)
    )


def test_every_case_of_the_table_has_an_example_and_builds_its_message():
    refused = set()
    for option, kind, accepted, change in EXAMPLES:
        with pytest.raises(ValueError) as error:
            built(kind, accepted | change)
        matching = [
            case for case in TABLE if option in case.options and re.fullmatch(pattern(case, option), str(error.value))
        ]
        refused |= {(option, case.rule) for case in matching}
    assert refused == {(option, case.rule) for case in TABLE for option in case.options}


def test_the_documents_name_every_option_of_the_table_and_no_other():
    text = (Path(__file__).parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    section = text.split("### Options that decide nothing")[1].split("\n## ")[0]
    options = {option for case in TABLE for option in case.options}
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall("`(.*?)`", " ".join(rows))) <= options <= set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize(
    ("kind", "values", "option"),
    [
        (TrainingConfig, {"steps": 9, "warmup_steps": 10}, "warmup_steps"),
        (DataConfig, {"shuffle_buffer": 7}, "shuffle_buffer"),
        (DataConfig, {"image_size": 8, "crop_size": 9}, "crop_size"),
        (MaskedDataConfig, {"data": "x", "mask_threshold": 3}, "mask_threshold"),
        (DiffusionConfig, {"label_dropout": 0.2}, "label_dropout"),
        (DiffusionConfig, {"recipe": "ddpm", "prediction_type": "v_prediction"}, "prediction_type"),
        (SegmentationConfig, {"loss": "dice", "balance_classes": True}, "balance_classes"),
        (JointConfig, {"self_training_weight": 0, "confidence": 0.8}, "confidence"),
        (AugmentationConfig, {"elastic": 0, "elastic_grid": 4}, "elastic_grid"),
    ],
)
def test_each_dataclass_refuses_by_itself(kind, values, option):
    with pytest.raises(ValueError, match=f"^{option} is "):
        kind(**values)


@pytest.mark.parametrize("steps", [1, 50, 100, 150])
def test_defaults_are_never_refused(steps):
    """The defaults of the warm-up are longer than some of these runs, and the commands have other ones."""
    for kind, section in ((TrainDDPM, TrainingConfig), (TrainSegmentation, None), (TrainClassifier, None)):
        data = {"data": MaskedDataConfig("x")} if kind is TrainSegmentation else {}
        default = kind(**data)
        check_used(kind(**data, training=replace(default.training, steps=steps)))
        assert section in (None, type(default.training))
    check_used(TrainDDPM(data=DataConfig(validation_fraction=0)))
    check_used(TrainDDPM(data=DataConfig(streaming=True, crop_size=8)), held_out=False)
    check_used(TrainSegmentation(MaskedDataConfig("x", channels=1), augment=False), held_out=False, image_channels=1)


def test_an_option_that_is_off_says_what_happens_anyway():
    DataConfig(validation_split="test", validation_fraction=0)
    DataConfig(streaming=True, crop_size=8, validation_fraction=0)
    DiffusionConfig(label_dropout=0)
    DiffusionConfig(recipe="ddpm", prediction_type="epsilon", min_snr_gamma=None, beta_schedule="linear")
    segmentation = SegmentationConfig(learn="pixel_classifier")
    TrainSegmentation(MaskedDataConfig("x"), segmentation=segmentation, joint=JointConfig(self_training_weight=0))


def test_values_of_a_wrong_type_keep_their_own_message():
    with pytest.raises(ValueError, match="crop_size is '9', but must be at least 1"):
        DataConfig(image_size=8, crop_size="9")


# options of runs of earlier versions


IDLE = {
    "diffusion": {"class_conditional": False, "label_dropout": 0.3},
    "data": {"streaming": False, "shuffle_buffer": 7},
}


def changed(section: str, **values) -> dict[str, dict[str, Any]]:
    return {**IDLE, section: {**IDLE[section], **values}}


@pytest.mark.parametrize(
    ("section", "option", "value"), [("diffusion", "label_dropout", 0.1), ("data", "shuffle_buffer", 10_000)]
)
def test_a_run_resumes_without_the_options_that_decided_nothing(tmp_path, section, option, value):
    claim(tmp_path, IDLE)
    claim(tmp_path, changed(section, **{option: value}))


def test_an_option_that_decides_something_has_to_stay(tmp_path):
    claim(tmp_path, IDLE)
    with pytest.raises(ValueError, match="class_conditional is True"):
        claim(tmp_path, changed("diffusion", class_conditional=True, label_dropout=0.1))


def test_what_decides_something_after_all_is_kept_among_saved_options():
    saved = {"image_size": 8, "crop_size": 9, "steps": 5, "warmup_steps": 9, "streaming": False, "shuffle_buffer": 7}
    assert unused_among(saved) == {"shuffle_buffer"}
    assert without_unused(saved) == {name: value for name, value in saved.items() if name != "shuffle_buffer"}


# options that decide something


def batch(folder, **options) -> list[np.ndarray]:
    images = load_images(DataConfig(str(folder / "images"), cache_dir=str(folder / "cache"), **options)).train
    return [images[1, i]["image"].numpy() for i in range(len(images))]


@pytest.fixture
def folder(tmp_path):
    """Twelve images of 12 x 20 pixels, all different."""
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path


def test_image_size_and_crop_size_both_decide(folder):
    """The first is the scale, the second the size: a crop of resized images is none of the images as they are."""
    both, crop, resized = (
        batch(folder, **sizes) for sizes in ({"image_size": 8, "crop_size": 6}, {"crop_size": 6}, {"image_size": 8})
    )
    assert {each.shape for each in both} == {each.shape for each in crop} == {(1, 6, 6)}
    assert {each.shape for each in resized} == {(1, 8, 8)}
    assert not any(np.array_equal(*pair) for pair in zip(both, crop))
    equal = batch(folder, image_size=8, crop_size=8)  # of images that are not square, a crop is not the middle
    assert any(not np.array_equal(*pair) for pair in zip(equal, resized))


@pytest.mark.parametrize("change", [{name: VALUES.get(name, 0.5)} for name in VARIATIONS], ids=str)
def test_every_variation_decides_something(change):
    """On an image of three channels; beside it only elastic deformation is on, which elastic_grid needs."""
    off = {"flip": False, "rotate90": False, "rotation": 0, "scale": (1, 1), "brightness": 0, "contrast": 0, "gamma": 0}
    base = AugmentationConfig(elastic=2.0, noise=0, **off)
    image = torch.rand(1, 3, 16, 16, generator=keyed_generator(0, "image")) * 2 - 1
    mask = torch.zeros(1, 16, 16, dtype=torch.int64)
    results = [
        augment(image, mask, config, [keyed_generator(3, "augment")]).images
        for config in (base, replace(base, **change))
    ]
    assert not torch.equal(*results)


def test_a_recipe_decides_what_is_left_to_it():
    names = ("prediction_type", "min_snr_gamma", "beta_schedule")
    default, classic = (DiffusionConfig(recipe=recipe) for recipe in (None, "ddpm"))
    assert [getattr(default, name) for name in names] == ["v_prediction", 5.0, "squaredcos_cap_v2"]
    assert [getattr(classic, name) for name in names] == ["epsilon", None, "linear"]
