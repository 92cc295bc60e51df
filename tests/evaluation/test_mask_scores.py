"""Scores of masks over a set, the command that writes them, and labelled sets for a trained network."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unet_diffusion import UNet, cli
from unet_diffusion.checks import Question
from unet_diffusion.commands.evaluate import evaluate
from unet_diffusion.commands.options.evaluate import Evaluate
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.sets import load_labelled, load_masked
from unet_diffusion.data.record import make_record
from unet_diffusion.evaluation.mask_scores import known_objects, score_masks
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import SegmentationPipeline

datasets.disable_progress_bars()

GREEN, RED = (0, 200, 0), (255, 0, 0)


def save(folder: Path, images, masks) -> dict[str, str]:
    """Writes two folders of PNG files; returns the options that name them."""
    for name, arrays in (("images", images), ("masks", masks)):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(arrays):
            Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(folder / name / f"{number}.png")
    return {"data": str(folder / "images"), "masks": str(folder / "masks"), "cache_dir": str(folder / "cache")}


def save_instances(folder: Path, instances, mask=None) -> dict[str, str]:
    """One `save_to_disk` folder with a mask and an instance map; the image shows the instances in white."""
    rows = {"image": 255 * (instances > 0), "mask": 1 * (instances > 0) if mask is None else mask, "nuclei": instances}
    features = datasets.Features(dict.fromkeys(rows, datasets.Array2D(instances.shape, "uint8")))
    datasets.Dataset.from_dict({name: [value] for name, value in rows.items()}, features=features).save_to_disk(folder)
    return {"data": str(folder), "instances_column": "nuclei", "cache_dir": str(folder / "cache")}


def load(options: dict, num_classes: int = 2, **network):
    wanted = {"num_classes": num_classes, "channels": 1, "pixel_range": PixelRange.full("uint8"), **network}
    return load_labelled(MaskedOptions(**options), **wanted)


def white(image: torch.Tensor) -> torch.Tensor:
    """Predicts class 1 where an image is white."""
    return (image[0] == 255).long()


# scores


def test_a_square_two_pixels_too_far_to_the_right(tmp_path):
    square, nothing = np.zeros((20, 20)), np.zeros((10, 10))
    square[5:11, 5:11] = 1  # 36 pixels, of which 24 are hit and 12 missed, and 12 more are false
    dataset = load(save(tmp_path, [255 * square, nothing], [square, nothing]))
    scores = score_masks(lambda image: white(image).roll(2, dims=1), dataset)

    iou, dice = {0: 352 / 376, 1: 24 / 48}, {0: 2 * 352 / (2 * 364), 1: 2 * 24 / 72}
    first, second = scores.images
    assert (first["row"], second["row"]) == (0, 1)
    assert first["accuracy"] == pytest.approx(376 / 400)
    for label in (0, 1):
        assert first[f"iou_{label}"] == pytest.approx(iou[label])
        assert first[f"dice_{label}"] == pytest.approx(dice[label])
    assert first["boundary_f1"] == 1  # nowhere farther off than the tolerance of 2 pixels
    assert score_masks(lambda image: white(image).roll(9, dims=1), dataset).images[0]["boundary_f1"] < 0.5

    assert second["accuracy"] == second["iou_0"] == 1
    assert math.isnan(second["iou_1"])
    assert math.isnan(second["boundary_f1"])
    assert scores.pooled["accuracy"] == pytest.approx(476 / 500)
    assert scores.pooled["iou_0"] == pytest.approx((352 + 100) / (376 + 100))
    assert scores.pooled["iou_1"] == scores.per_image["iou_1"] == pytest.approx(0.5)
    assert scores.per_image["accuracy"] == pytest.approx((0.94 + 1) / 2)
    assert scores.per_image["iou_0"] == pytest.approx((352 / 376 + 1) / 2)
    assert scores.per_image["boundary_f1"] == 1  # of the only image with a boundary
    assert "boundary_f1" not in scores.pooled
    assert not any(name.startswith(("cell", "instance")) for name in scores.per_image)


def test_undefined_scores_are_null_in_json_and_empty_in_the_table(tmp_path):
    nothing = np.zeros((6, 7))
    scores = score_masks(white, load(save(tmp_path, [nothing], [nothing]), num_classes=3))
    written = json.loads(json.dumps(scores.to_dict(["ground", "a", "b"]), allow_nan=False))
    assert written["pooled"] == {"accuracy": 1, "mean_iou": 1, "mean_dice": 1}
    assert written["per_image"] == {"accuracy": 1, "mean_iou": 1, "mean_dice": 1, "boundary_f1": None}
    known, unknown = {"iou": 1, "dice": 1}, {"iou": None, "dice": None}
    assert written["classes"] == [
        {"name": "ground", "pooled": known, "per_image": known},
        {"name": "a", "pooled": unknown, "per_image": unknown},
        {"name": "b", "pooled": unknown, "per_image": unknown},
    ]
    assert written["images"][0]["iou_2"] is None
    assert written["boundary_tolerance"] == 2
    lines = scores.to_table().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| IoU of 0 | 1.0000 | 1.0000 |" in lines
    assert "| IoU of 1 |  |  |" in lines
    assert "| boundary F1, within 2 pixels |  |  |" in lines


def test_a_gap_in_the_membrane_merges_its_cells(tmp_path):
    membrane = np.zeros((15, 15))
    membrane[:, 7] = 1
    broken = membrane.copy()
    broken[10:] = 0
    thick = membrane.copy()
    thick[:, 6:9] = 1
    half = membrane.copy()
    half[:, 8:] = 255  # the second cell is unknown
    dataset = load(save(tmp_path, [255 * broken, 255 * thick, 255 * broken], [membrane, membrane, half]))
    scores = score_masks(white, dataset, membrane=1)
    merged, wide, ignored = scores.images
    together = 2 * 105 * 104  # ordered pairs of pixels within the two cells of 7 x 15 pixels
    error = 1 - 2 * together / (together + 210 * 209)
    assert merged["cell_rand_error"] == pytest.approx(error)
    assert (merged["cell_splits"], merged["cell_merges"]) == pytest.approx(
        (0, 1)
    )  # one bit says which cell a pixel is in
    for scored in (wide, ignored):
        assert (scored["cell_rand_error"], scored["cell_splits"], scored["cell_merges"]) == (0, 0, 0)
    assert scores.per_image["cell_rand_error"] == pytest.approx(error / 3)
    assert "| adapted Rand error, cells |  | 0.1" in scores.to_table()
    other = score_masks(lambda image: 1 - white(image), load_swapped(tmp_path), membrane=0)
    assert other.per_image["cell_rand_error"] == pytest.approx(error / 2)


def test_an_object_that_lies_mostly_in_ignored_pixels_does_not_count():
    objects = np.zeros((6, 12), dtype=int)
    objects[1:5, 0:5], objects[1:5, 6:12] = 1, 2
    known = np.ones(objects.shape, dtype=bool)
    known[:, :4] = False  # all of the first object but its rim
    known[:2] = False  # and a part of the second
    found = known_objects(objects, known)
    assert set(np.unique(found)) == {0, 2} and np.array_equal(found == 2, (objects == 2) & known)


def load_swapped(folder: Path):
    """The first two images of the test above, with the membrane as class 0."""
    images = [np.asarray(Image.open(folder / "images" / f"{number}.png")) for number in (0, 1)]
    masks = [1 - np.asarray(Image.open(folder / "masks" / f"{number}.png")) for number in (0, 1)]
    return load(save(folder / "swapped", images, masks))


def test_touching_instances_found_as_one(tmp_path):
    instances = np.zeros((12, 12))
    instances[2:6, 2:6], instances[2:6, 6:10] = 1, 2  # 16 pixels each
    dataset = load(save_instances(tmp_path / "both", instances))
    (scores,) = score_masks(white, dataset).images
    assert scores["accuracy"] == 1
    together = 2 * 16 * 15
    assert scores["instance_rand_error"] == pytest.approx(1 - 2 * together / (together + 32 * 31))
    assert (scores["instance_splits"], scores["instance_merges"]) == pytest.approx((0, 1))

    def apart(image: torch.Tensor) -> torch.Tensor:
        mask = white(image)
        mask[:, 6] = 0  # a quarter of the second nucleus is lost
        return mask

    (scores,) = score_masks(apart, dataset).images
    pairs = 16 * 15 + 12 * 11 + 4 * 3  # together in truth and in the prediction, where the lost part is background
    assert scores["instance_rand_error"] == pytest.approx(1 - 2 * pairs / (together + pairs))
    assert scores["instance_merges"] == 0

    mask = 1 * (instances > 0)
    mask[:, 6:] = 255  # the second nucleus is unknown
    (scores,) = score_masks(white, load(save_instances(tmp_path / "one", instances, mask))).images
    assert (scores["instance_rand_error"], scores["instance_splits"], scores["instance_merges"]) == (0, 0, 0)


def test_objects_are_matched_with_the_instances(tmp_path):
    instances = np.zeros((20, 40))
    rows, columns = np.mgrid[:20, :40]
    near = [np.hypot(rows - 9, columns - centre) for centre in (8, 19, 34)]  # the first two touch
    instances[near[0] <= 6] = 1
    instances[(near[1] <= 6) & (near[1] < near[0])] = 2
    instances[near[2] <= 4] = 3
    dataset = load(save_instances(tmp_path / "whole", instances))
    scores = score_masks(white, dataset)
    (of_image,) = scores.images
    assert of_image["object_ap_50"] == of_image["object_f1_mean"] == scores.pooled["object_ap_90"] == 1
    assert of_image["object_count_error"] == 0 and of_image["instance_merges"] > 0  # of connected components

    def without_the_last(image: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        return white(image), np.where(instances == 3, 0, instances).astype(np.int32)

    scores = score_masks(without_the_last, dataset)
    # of these objects, and not of the components: the first two are apart, and the last is background, in one piece
    assert scores.images[0]["instance_rand_error"] == scores.images[0]["instance_merges"] == 0
    assert scores.per_image["object_ap_50"] == scores.pooled["object_ap_50"] == pytest.approx(2 / 3)
    assert scores.pooled["object_count_error"] == pytest.approx(1 / 3)
    written = scores.to_dict()
    assert written["pooled"]["object_recall_90"] == written["per_image"]["object_recall_90"] == pytest.approx(2 / 3)
    lines = scores.to_table().splitlines()
    assert "| AP of objects at IoU 0.5 | 0.6667 | 0.6667 |" in lines
    assert "| F1 of objects, mean over IoU 0.5 to 0.9 | 0.8000 | 0.8000 |" in lines
    assert "| error of the number of objects | 0.3333 | 0.3333 |" in lines

    mask = 1 * (instances > 0)
    mask[instances == 3] = 255
    scores = score_masks(white, load(save_instances(tmp_path / "unknown", instances, mask)))
    assert scores.pooled["object_ap_50"] == 1  # what lies where the truth is unknown is not false


def test_objects_of_the_background_are_none(tmp_path):
    """As in training, a numbered object needs a class."""
    instances = np.zeros((12, 24))
    instances[2:6, 2:6], instances[2:6, 16:20] = 1, 2
    scores = score_masks(
        lambda image: white(image) * (torch.arange(24) < 12),
        load(save_instances(tmp_path / "one", instances, 1 * (instances == 1))),
    )
    assert (scores.pooled["object_ap_50"], scores.pooled["object_count_error"]) == (1, 0)


def test_a_value_that_all_objects_share_is_asked_about(tmp_path):
    """For a run that learnt from instance maps, whose test masks may be masks of classes."""
    cells = np.zeros((12, 24))
    cells[2:6, 2:6] = cells[2:6, 16:20] = 255
    source = save(tmp_path / "cells", [cells] * 3, [cells, cells, np.where(np.arange(24) < 12, cells, 0)])
    saved = MaskEncoding({0: 0, 1: 1}, 2, kind="instances")
    with pytest.raises(Question, match="in 2 of 3 masks in several separate pieces. If .* give mask_encoding='binary'"):
        load(source, saved=saved)
    as_classes = load({**source, "mask_encoding": "binary"}, saved=saved)
    assert not as_classes.cache.has_instances and as_classes[0]["mask"].sum() == 32
    assert load({**source, "mask_encoding": "instances"}, saved=saved).cache.instances[0].max() == 255
    numbered = np.where(np.arange(24) < 12, cells, cells / 5)
    source = save(tmp_path / "numbered", [cells] * 2, [cells, numbered])
    assert load(source, saved=saved).cache.numbered == [[1, 1], [2, 0]]


def test_options_that_fit_no_set_are_refused(tmp_path):
    dataset = load(save(tmp_path, [np.zeros((4, 4))], [np.zeros((4, 4))]))
    with pytest.raises(ValueError, match=r"membrane is 2, but the classes are 0\.\.1"):
        score_masks(white, dataset, membrane=2)
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"boundary_tolerance is {wrong}, but must be a number of pixels"):
            score_masks(white, dataset, boundary_tolerance=wrong)
        with pytest.raises(ValueError, match=f"boundary_tolerance is {wrong}, but must be a number of pixels"):
            Evaluate(boundary_tolerance=wrong)
    with pytest.raises(ValueError, match="must be the same"):
        score_masks(lambda image: white(image)[:2], dataset)


def test_reference_points_of_a_real_set(shared_data, tmp_path):
    """Interior everywhere reaches a pixel accuracy of 0.804, as the README of the data says, and merges all cells."""
    dataset = load({"data": str(shared_data / "isbi2012" / "test.parquet"), "cache_dir": str(tmp_path)})
    scores = score_masks(lambda image: torch.ones(image.shape[1:], dtype=torch.int64), dataset, membrane=0)
    assert len(scores.images) == 6
    assert scores.pooled["accuracy"] == pytest.approx(0.804, abs=0.0005)
    assert scores.per_image["cell_splits"] == pytest.approx(0, abs=1e-9)
    assert scores.per_image["cell_merges"] > 4  # bits, of cells of all sizes


# labelled sets


def test_colours_mean_what_they_meant_in_training(tmp_path):
    mask, other = np.zeros((2, 4, 5, 3))
    mask[1:3], other[1:3] = RED, GREEN
    options = save(tmp_path, [np.zeros((4, 5))], [mask])
    palette = [(0, 0, 0), GREEN, RED, GREEN]  # green does not occur in this set, and class 3 has no colour of its own
    for reading in ("auto", "palette"):
        item = load({**options, "mask_encoding": reading}, num_classes=4, palette=palette)[0]
        assert item["mask"].unique().tolist() == [0, 2]
    green = save(tmp_path / "green", [np.zeros((4, 5))], [other])
    assert load(green, num_classes=4, palette=palette)[0]["mask"].unique().tolist() == [0, 1]
    stated = load({**options, "mask_colours": {"black": 1, "red": 0}}, palette=None)
    assert torch.equal(stated[0]["mask"][:, 0], torch.tensor([1, 0, 0, 1]))
    with pytest.raises(ValueError, match="the run knows none; give mask_colours"):
        load(options, num_classes=4)
    with pytest.raises(ValueError, match=r"for a network of 2 classes: masks hold \(255, 0, 0\), but the classes are"):
        load(options, palette=[(0, 0, 0), GREEN])


def test_sets_that_do_not_fit_the_network_are_refused(tmp_path):
    image, mask = np.zeros((4, 5)), np.zeros((4, 5))
    mask[1:3] = 2
    indices = save(tmp_path / "indices", [image, image], [np.zeros((4, 5)), mask])
    with pytest.raises(
        ValueError, match=r"network of 2 classes: masks hold 2, but the classes are.*in 1 of 2.*rows 1\."
    ):
        load(indices)
    assert load(indices, num_classes=3)[1]["mask"].max() == 2
    binary = save(tmp_path / "binary", [image], [255 * (mask > 0)])
    assert load(binary)[0]["mask"].unique().tolist() == [0, 1]
    for reading in ("auto", "binary", "instances"):
        with pytest.raises(ValueError, match="one class beside the background, but the network has 3 classes"):
            load({**binary, "mask_encoding": reading}, num_classes=3)
    ignoring = load({**binary, "mask_encoding": "indices"}, num_classes=3)
    assert ignoring[0]["mask"].unique().tolist() == [0, 255]
    with pytest.raises(ValueError, match="label no pixel"):
        load(save(tmp_path / "ignored", [image], [np.full((4, 5), 255)]), num_classes=3)
    with pytest.raises(ValueError, match="1 channels of uint8, but the network takes 3 of uint8"):
        load(indices, num_classes=3, channels=3)
    assert load({**indices, "channels": 3}, num_classes=3, channels=3)[0]["image"].shape == (3, 4, 5)
    with pytest.raises(ValueError, match="1 channels of uint8, but the network takes 1 of uint16"):
        load(indices, num_classes=3, pixel_range=PixelRange.full("uint16"))


def test_images_are_resized_but_never_cut(tmp_path):
    options = save(tmp_path, [np.zeros((6, 12))], [np.eye(6, 12)])
    assert load(options)[0]["mask"].shape == (6, 12)
    assert load({**options, "image_size": 3})[0]["mask"].shape == (3, 6)


# the command


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three classes that predicts class 1 everywhere."""
    unet = UNet(sample_size=8, in_channels=1, out_channels=None, channels=(4, 8), head_channels=8, num_classes=3)
    with torch.no_grad():
        unet.segmentation_head.weight.zero_()
        unet.segmentation_head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    SegmentationPipeline(unet, class_names=["ground", "cell", "nucleus"]).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def labelled(tmp_path) -> dict[str, str]:
    """Three images of 9 x 12 pixels, of which 12, 24 and 36 of 108 are of class 1."""
    random = np.random.default_rng(0)
    masks = [np.repeat([1, 0], [count, 9 - count])[:, None] * np.ones((1, 12)) for count in (1, 2, 3)]
    return save(tmp_path / "set", [random.integers(0, 256, (9, 12)) for _ in masks], masks)


def arguments(labelled: dict[str, str]) -> list[str]:
    return [word for name, value in labelled.items() for word in (f"--{name.replace('_', '-')}", value)]


def test_the_command_writes_scores_and_a_table(run, labelled, tmp_path, capsys):
    cli.run("evaluate", ["--run", str(run), *arguments(labelled)])
    written = json.loads((run / "evaluation.json").read_text())
    assert written["count"] == 3
    assert (written["options"]["run"], written["options"]["data"]["masks"]) == (str(run), labelled["masks"])
    assert len(written["fingerprint"]) == 16
    masks = written["masks"]
    ground, cell, nucleus = masks["classes"]
    assert [each["name"] for each in masks["classes"]] == ["ground", "cell", "nucleus"]
    assert masks["pooled"]["accuracy"] == cell["pooled"]["iou"] == pytest.approx(72 / 324)
    assert ground["pooled"] == {"iou": 0, "dice": 0}
    assert nucleus["pooled"] == nucleus["per_image"] == {"iou": None, "dice": None}
    assert [each["accuracy"] for each in masks["images"]] == pytest.approx([1 / 9, 2 / 9, 3 / 9])
    assert masks["per_image"]["boundary_f1"] == 0
    text = (run / "evaluation.md").read_text()
    assert text.startswith(f"# run on {labelled['data']} (train)\n")
    assert "| IoU of cell | 0.2222 | 0.2222 |" in text
    assert capsys.readouterr().out == text + "\n"


def test_the_command_predicts_as_the_pipeline_does(run, labelled, tmp_path):
    pipe = SegmentationPipeline.from_pretrained(run)
    for parameter in pipe.unet.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(pipe.unet.segmentation_head.bias)
    pipe.save_pretrained(tmp_path / "random")
    images, masks = (sorted(Path(labelled[name]).iterdir()) for name in ("data", "masks"))
    expected = {}
    for augment in (False, True):
        options = Evaluate(
            MaskedOptions(**labelled), tmp_path / "random", tmp_path / f"out-{augment}", tile_size=6, augment=augment
        )
        evaluate(options)
        hits = [
            (pipe(str(image), tile_size=6, augment=augment, output_type="np").masks[0] == np.asarray(Image.open(mask)))
            for image, mask in zip(images, masks)
        ]
        expected[augment] = [hit.mean() for hit in hits]
        scores = json.loads((options.output / "evaluation.json").read_text())["masks"]["images"]
        assert [each["accuracy"] for each in scores] == pytest.approx(expected[augment])
    assert expected[False] != expected[True]


def test_cells_and_instances_reach_the_files(run, tmp_path):
    instances = np.zeros((8, 8))
    instances[:4, :4], instances[5:, 5:] = 1, 2
    evaluate(Evaluate(MaskedOptions(**save_instances(tmp_path / "nuclei", instances)), run, membrane=2))
    means = json.loads((run / "evaluation.json").read_text())["masks"]["per_image"]
    assert means["instance_merges"] == pytest.approx(-(16 / 25) * np.log2(16 / 25) - (9 / 25) * np.log2(9 / 25))
    assert means["cell_rand_error"] == 0  # no membrane in either: one cell
    assert "| variation of information, merges, bits, instances |  | 0.94" in (run / "evaluation.md").read_text()


def test_an_evaluation_is_not_overwritten_unless_asked(run, labelled):
    (run / "evaluation.md").write_text("mine")
    command = ["--run", str(run), *arguments(labelled)]
    with pytest.raises(SystemExit, match="evaluation.md exists already; set overwrite, or choose another output"):
        cli.run("evaluate", command)
    assert (run / "evaluation.md").read_text() == "mine"
    assert not (run / "evaluation.json").exists()
    cli.run("evaluate", [*command, "--overwrite"])
    assert (run / "evaluation.md").read_text() != "mine"


def test_colours_become_grey_for_a_run_that_learnt_from_images_made_grey(run, labelled, tmp_path):
    def scores(options: dict[str, str], output: Path) -> dict:
        cli.run("evaluate", ["--run", str(run), *arguments(options), "--output", str(output)])
        return json.loads((output / "evaluation.json").read_text())["masks"]

    (run / "config.json").write_text(json.dumps({"data": {"channels": 1}}))
    colour = tmp_path / "colour"
    colour.mkdir()
    for path in Path(labelled["data"]).iterdir():
        Image.open(path).convert("RGB").save(colour / path.name)
    assert scores({**labelled, "data": str(colour)}, tmp_path / "a") == scores(labelled, tmp_path / "b")


def test_the_images_that_the_run_held_out_are_kept_in_the_stated_cache(run, labelled, tmp_path):
    config = MaskedDataConfig(**labelled, num_classes=3, validation_fraction=0.5)
    data = load_masked(config)
    make_record(data, config.preparation, mask_encoding=data.encoding.to_dict()).write(run)
    (run / "config.json").write_text(json.dumps({"data": asdict(config)}))
    cli.run("evaluate", ["--run", str(run), "--cache-dir", str(tmp_path / "other")])
    assert any((tmp_path / "other").iterdir())


def test_mistakes_end_with_one_sentence_and_no_file(run, labelled, tmp_path):
    mask = np.full((4, 5), 3)
    others = save(tmp_path / "others", [mask], [mask])
    for given, options, message in (
        (labelled, ["--run", "absent"], "run is absent, but there is no model_index.json"),
        (labelled, ["--tile-size", "0"], "tile_size is 0"),
        (labelled, ["--membrane", "3"], "membrane is '3', but the classes are ground, cell"),
        (others, [], "for a network of 3 classes: masks hold 3, but the classes are"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.run("evaluate", ["--run", str(run), *arguments(given), *options])
    assert not list(run.glob("evaluation*"))
