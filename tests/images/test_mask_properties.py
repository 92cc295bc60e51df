"""Masks: every encoding returns the classes that were written, including ignored pixels."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.data.masked.encoding import find_encoding, parse_colours
from unet_diffusion.images.masks import decode_instances, decode_mask
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.palette import mask_image
from unet_diffusion.randomness import keyed_generator, keyed_permutation, keyed_seed
from unet_diffusion.segmentation.metrics import SegmentationMetrics

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def file_of(save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    return file_of(lambda file: image.save(file, "PNG"))


INDEX_FILES: dict[str, Callable[[np.ndarray], object]] = {
    "array": lambda mask: mask,
    "channel": lambda mask: mask[:, :, None],
    "int64": lambda mask: mask.astype(np.int64),
    "float": lambda mask: mask.astype(np.float64),
    "PIL": Image.fromarray,
    "PNG": lambda mask: png(Image.fromarray(mask)),
    "16-bit PNG": lambda mask: png(Image.fromarray(mask.astype(np.uint16))),
    "palette PNG": lambda mask: png(mask_image(mask)),
    "grey RGB": lambda mask: png(Image.fromarray(mask).convert("RGB")),
    "BMP": lambda mask: file_of(lambda file: Image.fromarray(mask).save(file, "BMP")),
    "TIFF": lambda mask: file_of(lambda file: tifffile.imwrite(file, mask)),
    "npy": lambda mask: file_of(lambda file: np.save(file, mask)),
}


@st.composite
def masks(draw: st.DrawFn, most: int = 254) -> tuple[np.ndarray, int]:
    """A mask uint8 (H, W) of class indices and ignored pixels, and the number of classes."""
    classes = draw(st.integers(2, most))
    labels = st.integers(0, classes - 1) | st.just(IGNORE_INDEX)
    return draw(hnp.arrays(np.uint8, draw(SIZES), elements=labels)), classes


def classes_of(source: object, **options) -> np.ndarray:
    """The classes of a set of one mask, as a data set finds them."""
    decoded = decode_mask(source, reading="colours" if "colours" in options else "values")
    keys, places = np.unique(decoded.keys, return_inverse=True)
    encoding = find_encoding(keys.tolist(), palette=decoded.palette, **options)
    return encoding.table(keys.tolist())[places].reshape(decoded.keys.shape)


@PROPERTY
@given(mask=masks(), kind=st.sampled_from(sorted(INDEX_FILES)))
def test_indices_come_back_from_every_file(mask, kind):
    labels, classes = mask
    assert np.array_equal(classes_of(INDEX_FILES[kind](labels), encoding="indices", num_classes=classes), labels)


@PROPERTY
@given(
    mask=masks(most=20),
    colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=21, max_size=21, unique=True),
    alpha=st.booleans(),
)
def test_stated_colours_come_back_with_those_to_ignore(mask, colours, alpha):
    labels, classes = mask
    table = np.array([*colours[:classes], *[(0, 0, 0)] * (IGNORE_INDEX - classes), colours[20]], dtype=np.uint8)
    meaning = {"#{:02x}{:02x}{:02x}".format(*colour): label for label, colour in enumerate(colours[:classes])}
    meaning["#{:02x}{:02x}{:02x}".format(*colours[20])] = IGNORE_INDEX
    image = Image.fromarray(table[labels])
    if alpha:
        image.putalpha(255)
    found = classes_of(png(image), encoding="palette", colours=parse_colours(meaning))
    assert np.array_equal(found, labels)


@PROPERTY
@given(
    colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=64, unique=True).map(sorted),
    data=st.data(),
)
def test_found_colours_are_classes_in_ascending_order(colours, data):
    labels = np.array(data.draw(st.permutations([*range(len(colours))])))[None]
    source = Image.fromarray(np.array(colours, dtype=np.uint8)[labels])
    assert np.array_equal(classes_of(png(source), encoding="palette"), labels)


@PROPERTY
@given(
    mask=hnp.arrays(np.bool_, SIZES).filter(lambda mask: mask.any() and not mask.all()),
    values=st.lists(st.integers(0, 65535), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_of_two_values_the_higher_is_class_1(mask, values):
    source = np.where(mask, values[1], values[0]).astype(np.uint16)
    assert np.array_equal(classes_of(source, encoding="binary"), mask)
    assert np.array_equal(classes_of(mask), mask)
    assert np.array_equal(classes_of(png(Image.fromarray(mask))), mask)


@PROPERTY
@given(instances=hnp.arrays(np.uint16, SIZES), kind=st.sampled_from(["array", "int64", "float", "npy", "TIFF"]))
def test_instance_numbers_come_back(instances, kind):
    assert np.array_equal(decode_instances(INDEX_FILES[kind](instances)), instances)


@PROPERTY
@given(mask=masks(most=9), channels=st.integers(2, 9), dtype=st.sampled_from([np.uint8, np.uint16, np.float32]))
def test_a_channel_for_each_class_is_refused_rather_than_misread(mask, channels, dtype):
    labels = mask[0] % channels
    one_hot = (np.arange(channels) == labels[:, :, None]).astype(dtype)
    with pytest.raises(ValueError, match="a channel for each class"):
        decode_mask(one_hot, axes="HWC")


# --- image and mask together ---


@PROPERTY
@given(
    size=SIZES,
    block=st.integers(4, 9),
    seed=st.integers(0, 99),
    parts=st.fixed_dictionaries(
        {
            "elastic": st.sampled_from([0.0, 2.0]),
            "rotation": st.sampled_from([0.0, 20.0]),
            "scale": st.sampled_from([(1.0, 1.0), (0.8, 1.25)]),
            "flip": st.booleans(),
            "rotate90": st.booleans(),
        }
    ),
)
def test_an_image_that_shows_its_mask_still_does_after_augmentation(size, block, seed, parts):
    """Where a pixel of the bicubic image has nearly one pure colour, the nearest pixel had that colour."""
    generator = keyed_generator(seed, "blocks")
    blocks = torch.randint(2, (2, *size), generator=generator)
    masks = blocks.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    images = 2.0 * masks[:, None] - 1
    config = AugmentationConfig(**parts, brightness=0, contrast=0, gamma=0, noise=0)
    out = augment(images, masks, config, [keyed_generator(seed, index) for index in range(2)])
    assert out.images.shape == images.shape and out.masks.shape == masks.shape
    assert set(out.masks.unique().tolist()) <= {0, 1, IGNORE_INDEX}
    pure = (out.images[:, 0].abs() > 0.9) & (out.masks != IGNORE_INDEX)
    assert torch.equal(out.masks[pure], (out.images[:, 0][pure] > 0).long())
    if not parts["elastic"] and not parts["rotation"] and parts["scale"] == (1.0, 1.0):
        assert torch.equal(2.0 * out.masks[:, None] - 1, out.images)


# --- scores ---


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Predicted classes and masks, int64 (B, H, W), and the number of classes."""
    classes, shape = draw(st.integers(2, 5)), (draw(st.integers(1, 4)), *draw(SIZES))
    predicted = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, classes - 1)))
    labels = st.integers(0, classes - 1) | st.just(IGNORE_INDEX)
    return torch.from_numpy(predicted), torch.from_numpy(draw(hnp.arrays(np.int64, shape, elements=labels))), classes


def scores(predicted: torch.Tensor, masks: torch.Tensor, classes: int, batch: int = 99) -> dict[str, float]:
    metrics = SegmentationMetrics(classes)
    for some, others in zip(predicted.split(batch), masks.split(batch)):
        metrics.update(some, others)
    return metrics.compute()


@PROPERTY
@given(case=predictions(), batch=st.integers(1, 3), order=st.randoms(use_true_random=False))
def test_scores_are_shares_that_depend_on_neither_batches_nor_order_nor_names(case, batch, order):
    predicted, masks, classes = case
    whole = scores(predicted, masks, classes)
    assert all(0 <= value <= 1 for value in whole.values() if value == value)
    for prefix in ("pooled", "per_image"):
        for k in range(classes):
            iou, dice = whole[f"{prefix}/iou_{k}"], whole[f"{prefix}/dice_{k}"]
            assert (iou != iou and dice != dice) or iou <= dice + 1e-12
    assert scores(predicted, masks, classes, batch) == pytest.approx(whole, nan_ok=True, abs=1e-12)
    places = order.sample(range(len(masks)), len(masks))
    assert scores(predicted[places], masks[places], classes) == pytest.approx(whole, nan_ok=True, abs=1e-12)
    names = order.sample(range(classes), classes)
    renamed = torch.tensor([*names, *[0] * (IGNORE_INDEX - classes), IGNORE_INDEX])
    other = scores(renamed[predicted], renamed[masks], classes)
    assert other["pooled/mean_iou"] == pytest.approx(whole["pooled/mean_iou"], nan_ok=True, abs=1e-12)
    for old, new in enumerate(names):
        assert other[f"pooled/iou_{new}"] == pytest.approx(whole[f"pooled/iou_{old}"], nan_ok=True)


@PROPERTY
@given(case=predictions())
def test_a_perfect_prediction_scores_1_and_one_that_is_never_right_0(case):
    predicted, masks, classes = case
    ignored = masks == IGNORE_INDEX
    perfect = scores(torch.where(ignored, predicted, masks), masks, classes)
    assert all(value == 1 for value in perfect.values() if value == value)
    wrong = scores(torch.where(ignored, predicted, (masks + 1) % classes), masks, classes)
    assert all(value == 0 for value in wrong.values() if value == value)
    assert (perfect["pooled/accuracy"] != perfect["pooled/accuracy"]) == bool(ignored.all())


# --- randomness ---

KEYS = st.lists(st.integers(-5, 5) | st.text(max_size=3), max_size=3).map(tuple)


@PROPERTY
@given(seeds=st.tuples(st.integers(0, 3), st.integers(0, 3)), keys=st.tuples(KEYS, KEYS), length=st.integers(0, 40))
def test_draws_depend_on_seed_and_key_alone(seeds, keys, length):
    def draw(which: int) -> list[float]:
        return torch.rand(4, generator=keyed_generator(seeds[which], *keys[which])).tolist()

    first, second = draw(0), draw(1)
    torch.rand(3)  # other draws change nothing
    assert (draw(1), draw(0)) == (second, first)
    same = (seeds[0], *keys[0]) == (seeds[1], *keys[1])
    assert (keyed_seed(seeds[0], *keys[0]) == keyed_seed(seeds[1], *keys[1])) == same
    assert (first == second) == same
    assert sorted(keyed_permutation(length, seeds[0], *keys[0]).tolist()) == [*range(length)]
