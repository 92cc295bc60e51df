"""Learning objects: the data, the losses, a run from data to pipeline, and what goes with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from skimage.draw import disk
from skimage.segmentation import find_boundaries

from tests.support.tiny import power_cut
from unet_diffusion import UNet
from unet_diffusion.commands.export.graphs import fields_of
from unet_diffusion.commands.export.head_function import HeadFunction, Sizes
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_segmentation import make_task, make_unet, train_segmentation
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import load_pipeline, load_unet
from unet_diffusion.segmentation.instance_maps import UNKNOWN, ObjectSizes, normalised_distance
from unet_diffusion.segmentation.losses import boundary_loss, distance_loss, segmentation_loss
from unet_diffusion.tasks.config import JointConfig, SegmentationConfig
from unet_diffusion.tasks.segmentation import PARTS, SegmentationTask
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series

SIDE, RADIUS = 24, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Twelve images of two bright disks that touch, with instance maps in which they are 1 and 300; one is empty."""
    folder = tmp_path_factory.mktemp("instances")
    random = np.random.default_rng(0)
    for name in ("images", "instances"):
        (folder / name).mkdir()
    for i in range(12):
        instances = np.zeros((SIDE, SIDE), dtype=np.uint16)
        y, x = random.integers(RADIUS, SIDE - RADIUS), random.integers(RADIUS, SIDE - 3 * RADIUS)
        for number, centre in ((1, x), (300, x + 2 * RADIUS - 1)):
            if i:
                instances[disk((y, centre), RADIUS, shape=instances.shape)] = number
        dark_rim = find_boundaries(instances, mode="inner")
        image = random.integers(0, 60, (SIDE, SIDE)) + 150 * (instances > 0) - 60 * dark_rim
        Image.fromarray(image.clip(0).astype(np.uint8)).save(folder / "images" / f"{i:02}.png")
        Image.fromarray(instances).save(folder / "instances" / f"{i:02}.png")
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return folder


def options_for(place: Path, output: Path) -> TrainSegmentation:
    images, masks = (str(place / name) for name in ("images", "instances"))
    training = {"steps": 20, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2, "checkpoint_every": 10}
    return TrainSegmentation(
        data=MaskedDataConfig(data=images, masks=masks, mask_encoding="instances", validation_fraction=0.25),
        output=output,
        model=str(place / "network.json"),
        segmentation=SegmentationConfig(preview_images=2, instances=True),
        augmentation=AugmentationConfig(elastic=1.0),
        training=TrainingConfig(**training, log_every=5, validate_every=20, trackers=()),
    )


@pytest.fixture
def options(place, tmp_path) -> TrainSegmentation:
    return options_for(place, tmp_path / "run")


def loaded(options: TrainSegmentation) -> MaskedSets:
    return load_masked(options.data, options.training.seed, instances=options.segmentation.instances)


def generators(count: int = 4) -> list[torch.Generator]:
    return [keyed_generator(7, i) for i in range(count)]


# --- data ---


def test_items_hold_the_objects_of_whole_images_and_masks_that_keep_them_whole(options):
    sets = loaded(options)
    cache = sets.train.cache
    for index, row in enumerate(sets.train.rows):
        item, instances = sets.train[index], cache.instances[row].astype(np.int32)
        np.testing.assert_array_equal(item["objects"][0], instances)
        np.testing.assert_array_equal(item["objects"][1], normalised_distance(instances))
        np.testing.assert_array_equal(item["mask"], instances > 0)
    separated = load_masked(options.data, options.training.seed).train[1]
    assert "objects" not in separated and (separated["mask"] < sets.train[1]["mask"]).any()


def test_an_object_that_a_crop_cuts_has_the_distances_of_the_whole(options):
    options.data = replace(options.data, crop_size=9)
    train = loaded(options).train
    cut = 0
    for index in range(len(train)):
        whole, crop = train[index]["objects"].numpy(), train[1, index]["objects"].numpy()
        places = [
            (y, x) for y, x in np.ndindex(SIDE - 8, SIDE - 8) if np.array_equal(whole[:, y : y + 9, x : x + 9], crop)
        ]
        assert places
        cut += not np.allclose(crop[1], normalised_distance(crop[0].astype(np.int32)))
    assert cut > 3


def test_beyond_an_image_that_is_smaller_than_the_crop_objects_are_unknown(options):
    options.data = replace(options.data, crop_size=SIDE + 7)
    item = loaded(options).train[0, 1]
    outside = item["mask"] == IGNORE_INDEX
    assert outside.sum() == (SIDE + 7) ** 2 - SIDE**2
    assert (item["objects"][:, outside] == UNKNOWN).all() and (item["objects"][:, ~outside] >= 0).all()


def test_the_diameter_is_the_median_over_the_training_objects(options):
    sets = loaded(options)
    areas = [
        np.sum(instances == number)
        for instances in (sets.train.cache.instances[row] for row in sets.train.rows)
        for number in (1, 300)
    ]
    areas = [area for area in areas if area]
    assert sets.object_sizes is not None
    assert sets.object_sizes.diameter == pytest.approx(np.median([(4 * area / np.pi) ** 0.5 for area in areas]))
    assert sets.object_sizes.min_area == min(min(areas), int(np.median(areas) / 10))  # of fewer than a hundred


def test_border_weights_are_those_of_whole_objects(options):
    options.data = replace(options.data, border_weights=True)
    item = loaded(options).train[1]
    assert (item["weights"][0][item["mask"] == 1] == 1).all()


def columns(folder: Path, mask: np.ndarray, instances: np.ndarray) -> MaskedDataConfig:
    """Two images with that mask and that instance map, in columns of a table."""
    images = [np.zeros((*mask.shape, 3), dtype=np.uint8)] * 2
    features = Features({name: ImageFeature() for name in ("image", "mask", "instances")})
    rows = {"image": images, "mask": [mask] * 2, "instances": [instances] * 2}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data.parquet")
    of = {"mask_column": "mask", "instances_column": "instances", "mask_encoding": "indices"}
    return MaskedDataConfig(data=str(folder / "data.parquet"), **of, validation_fraction=0)


def test_instance_maps_of_several_classes_number_the_objects_of_all(tmp_path):
    mask = np.array([[1, 1, 2, 3, 3, 0, 255, 2]], dtype=np.uint8)
    instances = np.array([[4, 4, 4, 500, 501, 9, 9, 0]], dtype=np.uint16)  # one of two classes; two of one class
    item = load_masked(columns(tmp_path, mask, instances), instances=True).train[0]
    assert item["mask"].tolist() == mask.tolist()
    assert item["objects"][0].tolist() == [[4, 4, 4, 500, 501, 0, 0, 0]]


def test_instance_maps_without_objects_are_refused(tmp_path):
    mask = np.arange(4, dtype=np.uint8)[None]
    for instances in (np.zeros((1, 4), dtype=np.uint16), np.array([[1, 0, 0, 0]], dtype=np.uint16)):
        with pytest.raises(ValueError, match="instances is True, but the training masks hold no object"):
            load_masked(columns(tmp_path, mask, instances), instances=True)


# --- loss ---


def test_the_loss_is_the_sum_of_three_computed_by_hand(options):
    options.augment = False
    task = make_task(options, loaded(options))
    items = [task.train[i] for i in range(1, 5)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    losses = task.loss(task.network, batch, generators())
    logits = task.network(batch["image"] / 127.5 - 1, head="segmentation").logits
    boundary = np.stack([find_boundaries(item["objects"][0].int().numpy(), mode="inner") for item in items])
    expected = (
        segmentation_loss(logits[:, :2], batch["mask"]),
        boundary_loss(logits[:, 2], torch.from_numpy(boundary), batch["mask"]),
        distance_loss(logits[:, 3], batch["objects"][:, 1], batch["mask"]),
    )
    for name, value in zip(PARTS, expected):
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], sum(expected))


def test_self_training_and_noise_prediction_leave_the_objects_to_the_masks(options):
    options.data = replace(options.data, max_labels=6)
    options.joint = JointConfig(self_training_weight=0.5, confidence=0.5, denoising_weight=0.3)
    task = make_task(options, loaded(options))
    items = [task.train[i] for i in range(4)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    others = torch.stack([task.diffusion.train[i]["image"] for i in range(4)])
    batch |= {"unlabelled_image": others, "self_training_image": others}
    losses = task.loss(task.network, batch, generators())
    assert losses["sure"] > 0
    total = losses["segmentation_loss"] + 0.5 * losses["self_training_loss"] + 0.3 * losses["denoising_loss"]
    torch.testing.assert_close(losses["loss"], total)
    torch.testing.assert_close(losses["segmentation_loss"], sum(losses[name] for name in PARTS))
    losses["self_training_loss"].backward()
    head = task.network.instance_head.weight
    assert head.grad is None or not head.grad.any()


def test_the_card_of_a_network_that_also_generates_says_that_it_learnt_objects(options):
    options.data = replace(options.data, max_labels=6)
    options.joint = JointConfig(denoising_weight=0.3)
    for instances in (True, False):
        options.segmentation = replace(options.segmentation, instances=instances)
        data = loaded(options)
        task = make_task(options, data)
        diameter = 0 if data.object_sizes is None else data.object_sizes.diameter
        said = f"what tells objects apart, from objects with a median diameter of {diameter:.1f} pixels, of which at"
        assert (said in task.card(task.network).summary) == instances
    assert "also generates images" in task.card(task.network).summary


# --- a run ---


def test_a_run_that_was_started_before_there_were_instances_resumes_as_before(options, tmp_path):
    training = replace(options.training, steps=4, checkpoint_every=2, validate_every=4)
    options = replace(options, training=training, segmentation=replace(options.segmentation, instances=False))
    undisturbed = train_segmentation(replace(options, output=tmp_path / "undisturbed"))
    with power_cut(SegmentationTask, 3):
        train_segmentation(options)
    path = options.output / "config.json"
    config = json.loads(path.read_text())
    assert config["segmentation"].pop("instances") is False
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="instances is True, but the run in .* was started with False"):
        train_segmentation(replace(options, segmentation=replace(options.segmentation, instances=True)))
    train_segmentation(options)
    files = (each / "checkpoints/step-00000004/model.safetensors" for each in (undisturbed, options.output))
    a, b = map(load_file, files)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "instance_head.weight" not in a


@pytest.fixture(scope="module")
def run(place, tmp_path_factory) -> Path:
    return train_segmentation(options_for(place, tmp_path_factory.mktemp("run") / "whole"))


def test_a_run_lowers_all_three_losses(run):
    rows = read_metrics(run / "metrics.jsonl")
    for name in PARTS:
        values = series(rows, name)[1]
        assert len(values) == 4 and values[-1] < 0.8 * values[0]
    assert {"mean_iou", "mean_dice", "accuracy"} <= {name for row in rows for name in row}


def test_an_interrupted_run_ends_as_an_undisturbed_one(run, options):
    with power_cut(SegmentationTask, 14):
        train_segmentation(options)
    train_segmentation(options)
    a, b = (load_file(each / "checkpoints/step-00000020/model.safetensors") for each in (run, options.output))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "instance_head.weight" in a


@pytest.mark.parametrize("learn", ["everything", "decoder", "head"])
def test_the_part_for_objects_learns_with_every_part_of_the_network(options, learn):
    options.segmentation = replace(options.segmentation, learn=learn)
    task = make_task(options, loaded(options))
    head, rate = task.parameter_groups()[-1]
    assert rate == 1 and {id(each) for each in task.network.instance_head.parameters()} <= {id(each) for each in head}


def test_the_saved_network_knows_its_objects(run, options):
    assert "objects with a median diameter of" in (run / "README.md").read_text()
    unet = UNet.from_pretrained(run / "unet")
    assert (unet.config.num_classes, unet.config.instances) == (2, True)
    sizes = loaded(options).object_sizes
    assert ObjectSizes(unet.config.object_diameter, unet.config.object_min_area) == sizes
    again = load_pipeline(SegmentationPipeline, run).unet.config
    assert ObjectSizes(again.object_diameter, again.object_min_area) == sizes


def test_the_pipeline_gives_masks_of_the_classes_alone(run):
    pipe = SegmentationPipeline.from_pretrained(run)
    pipe.unet.instance_head.bias.data.fill_(100.0)  # larger than every score of a class
    output = pipe(np.zeros((9, 7), dtype=np.uint8), output_type="np", augment=True)
    assert output.masks[0].max() <= 1 and output.probabilities[0].shape == (2, 9, 7)
    np.testing.assert_allclose(output.probabilities[0].sum(axis=0), 1, rtol=1e-5)


def test_the_graph_of_the_segmentation_head_has_all_channels_and_says_so(run):
    function = HeadFunction(load_unet(str(run), {}), "segmentation")
    assert function(*function.example(1, 9, 8)).shape == (1, 4, 9, 8)
    fields = fields_of(function, Sizes.of_network(function.unet), "onnx", run)
    assert (fields["num_classes"], fields["instances"]) == ("2", "true")
    assert float(fields["object_diameter"]) == function.unet.config.object_diameter
    assert int(fields["object_min_area"]) == function.unet.config.object_min_area


def test_a_run_can_go_on_with_objects_add_them_or_leave_them_out_and_says_that(run, options, caplog):
    data = loaded(options)
    trained = UNet.from_pretrained(run / "unet")
    kept = make_unet(str(run), data, instances=True)
    assert torch.equal(kept.instance_head.weight, trained.instance_head.weight) and not caplog.records
    left = make_unet(str(run), data)
    assert left.instance_head is None and torch.equal(left.segmentation_head.weight, trained.segmentation_head.weight)
    assert "this run leaves that part out; set instances to keep it" in caplog.text


def test_what_does_not_fit_is_refused(run, options):
    with pytest.raises(ValueError, match="instances is True, but a pixel classifier gives classes alone; set learn="):
        SegmentationConfig(learn="pixel_classifier", instances=True)
    plain = load_masked(options.data)
    unet = UNet.from_pretrained(run / "unet")
    with pytest.raises(ValueError, match="instances is True, but the data come without the maps of objects"):
        SegmentationTask(unet, plain, SegmentationConfig(instances=True))
    with pytest.raises(ValueError, match="instances is False, but the network has the part that learns them"):
        SegmentationTask(unet, plain, SegmentationConfig())
    changed = replace(options, output=run, segmentation=replace(options.segmentation, instances=False))
    with pytest.raises(ValueError, match="instances is False, but the run in .* was started with True"):
        train_segmentation(changed)
