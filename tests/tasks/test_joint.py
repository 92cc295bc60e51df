"""Masks and noise prediction in the same steps: loss, trained parts, held-out images, and the folder of the run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from datasets import Image as DatasetImage
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import power_cut, squares
from unet_diffusion import cli
from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import make_task, train_segmentation
from unet_diffusion.data.cache import content_digest
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.masked.unlabelled import load_unlabelled
from unet_diffusion.data.sets import place_of
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig
from unet_diffusion.tasks.diffusion import saved_objective
from unet_diffusion.tasks.joint import JointTask
from unet_diffusion.training.accelerator import RunContext, make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = DiffusionConfig(
    prediction_type="epsilon",
    min_snr_gamma=3.0,
    beta_schedule="linear",
    num_train_timesteps=500,
    class_conditional=True,
    label_dropout=0.3,
    preview_images=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images, a network small enough for many runs, and a DDPM run on the images, with two classes."""
    folder = tmp_path_factory.mktemp("joint")
    squares(folder / "data", kinds=("a", "b"))
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    training = TrainingConfig(steps=2, batch_size=4, warmup_steps=1, trackers=())
    data = DataConfig(data=str(folder / "data" / "images"), validation_fraction=0.0)
    train_ddpm(TrainDDPM(folder / "ddpm", str(folder / "network.json"), data, OBJECTIVE, training))
    return folder


@pytest.fixture
def options(place, tmp_path) -> TrainSegmentation:
    images, masks = (str(place / "data" / name) for name in ("images", "masks"))
    return TrainSegmentation(
        data=MaskedDataConfig(data=images, masks=masks, validation_fraction=0.25),
        output=tmp_path / "run",
        model=str(place / "network.json"),
        segmentation=SegmentationConfig(preview_images=2),
        joint=JointConfig(denoising_weight=0.3),
        augmentation=AugmentationConfig(elastic=1.0),
        training=TrainingConfig(
            steps=4, batch_size=4, warmup_steps=1, log_every=2, validate_every=4, checkpoint_every=2, trackers=()
        ),
    )


def task_of(options: TrainSegmentation) -> JointTask:
    task = make_task(options, load_masked(options.data, options.training.seed))
    assert isinstance(task, JointTask)
    return task


def context(options: TrainSegmentation) -> RunContext:
    return RunContext(options.training, make_accelerator(options.training, options.output))


def first_batch(options: TrainSegmentation, task: JointTask, step: int = 0) -> dict[str, torch.Tensor]:
    return next(task.batches(context(options), step))


def images(dataset) -> set[bytes]:
    return {dataset[i]["image"].numpy().tobytes() for i in range(len(dataset))}


def files(folder: str | Path) -> dict[bytes, str]:
    """The kind of each image, which is the name of its folder."""
    return {np.asarray(Image.open(path)).tobytes(): path.parent.name for path in Path(folder).rglob("*.png")}


# the loss


def test_the_loss_is_the_sum_computed_by_hand(options):
    options.augment = False
    task = task_of(options)
    torch.nn.init.normal_(task.network.noise_head.weight)  # so that it matters
    batch = first_batch(options, task)
    losses = task.loss(task.network, batch, [keyed_generator(7, i) for i in range(4)])

    logits = task.network(batch["image"] / 127.5 - 1, head="segmentation").logits
    masks = F.cross_entropy(logits, batch["mask"])

    clean, generators = batch["unlabelled_image"] / 127.5 - 1, [keyed_generator(7, i) for i in range(4)]
    steps = torch.stack([torch.randint(1000, (), generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(1, 16, 16, generator=generator) for generator in generators])
    abar = task.diffusion.scheduler.alphas_cumprod[steps].view(4, 1, 1, 1)
    predicted = task.network(abar.sqrt() * clean + (1 - abar).sqrt() * noise, steps, head="noise").sample
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
    snr = abar / (1 - abar)
    weights = snr.clamp(max=5.0) / (snr + 1)  # of min-SNR for the velocity
    denoising = (weights * (predicted - velocity).square()).mean()

    assert denoising > 0.1
    found = [losses[name].item() for name in ("segmentation_loss", "denoising_loss", "loss")]
    assert found == pytest.approx([masks.item(), denoising.item(), (masks + 0.3 * denoising).item()], rel=1e-5)


def test_every_parameter_gets_a_gradient_and_a_share_of_the_learning_rate(options):
    options.segmentation = replace(options.segmentation, trunk_rate=0.1)
    task = task_of(options)
    task.loss(task.network, first_batch(options, task), [keyed_generator(0, i) for i in range(4)])["loss"].backward()
    assert [name for name, parameter in task.network.named_parameters() if parameter.grad is None] == []
    shares = {id(parameter): share for group, share in task.parameter_groups() for parameter in group}
    head = {id(parameter) for parameter in task.network.segmentation_head.parameters()}
    expected = {id(each): 1.0 if id(each) in head else 0.1 for each in task.network.parameters()}
    assert shares == expected


def test_only_what_both_heads_share_and_the_heads_learn_where_the_encoder_is_frozen(options):
    options.segmentation = replace(options.segmentation, learn="decoder")
    network = task_of(options).network
    learning = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {"decoder", "norm_out", "segmentation_head", "noise_head"}


@pytest.mark.parametrize("modes", [(True,), (True, False)])
def test_both_losses_see_a_frozen_encoder_in_evaluation_mode(options, tmp_path, modes):
    """Its dropout and its running means are at rest in every micro-batch of a step, which starts in training mode."""
    network = json.loads(Path(options.model).read_text()) | {"dropout": 0.5, "norm": "batch"}
    options.model = str(tmp_path / "network.json")
    Path(options.model).write_text(json.dumps(network))
    options.segmentation = replace(options.segmentation, learn="decoder")
    options.augment = False
    task, seen = task_of(options), []
    encoder, decoder = task.network.encoder, task.network.decoder
    block = encoder[0].blocks.blocks[0]
    block.register_forward_pre_hook(lambda module, _: seen.append((module.training, decoder.training)))
    means = {name: value.clone() for name, value in encoder.named_buffers()}
    batch = first_batch(options, task)
    for starts in modes:  # micro-batches: only the first follows a call of train()
        if starts:
            task.network.train()
        task.loss(task.network, batch, [keyed_generator(7, i) for i in range(4)])
    assert seen == 2 * len(modes) * [(False, True)]
    assert means and all(torch.equal(value, means[name]) for name, value in encoder.named_buffers())


def test_both_heads_learn(options, layout):
    """After training, it finds squares, and predicts noise better than an untrained head."""
    options.joint = JointConfig(denoising_weight=1.0)
    options.training = replace(
        options.training, steps=40, learning_rate=1e-2, validate_every=40, checkpoint_every=40, ema_decay=0.9
    )
    task = task_of(options)
    accelerator = make_accelerator(options.training, options.output)
    with torch.no_grad():
        untrained = task.validate(task.network.eval(), accelerator)["validation_loss"]
    rows = read_metrics(train_segmentation(options) / "metrics.jsonl")
    parts = [series(rows, name)[1] for name in ("segmentation_loss", "denoising_loss", "loss")]
    assert np.add(*parts[:2]) == pytest.approx(parts[2], rel=1e-5)  # logged separately; the weight is 1
    assert series(rows, "mean_iou")[1][-1] > 0.8
    assert series(rows, "validation_loss")[1][-1] < 0.8 * untrained


# resuming, and several processes


def test_an_interrupted_run_ends_as_an_undisturbed_one(options, tmp_path, layout):
    whole = train_segmentation(replace(options, output=tmp_path / "whole"))
    with power_cut(JointTask, 4):
        train_segmentation(options)
    train_segmentation(options)
    for part in (
        "checkpoints/step-00000004/model",
        "checkpoints/step-00000004/optimizer",
        "unet/diffusion_pytorch_model",
    ):
        a, b = (load_file(run / f"{part}.safetensors") for run in (options.output, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)
    logged = [series(read_metrics(run / "metrics.jsonl"), "denoising_loss") for run in (options.output, whole)]
    assert logged[0] == logged[1]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(options, tmp_path):
    """Without augmentation: a mean over pixels weighs its ignored borders differently in each process."""

    def command(output: Path, batch_size: int) -> list[str]:
        arguments = {
            **{"data": options.data.data, "masks": options.data.masks, "model": options.model, "output": output},
            **{"validation-fraction": 0.25, "crop-size": 12, "denoising-weight": 0.3, "preview-images": 2},
            **{"steps": 6, "batch-size": batch_size, "log-every": 2, "validate-every": 3, "warmup-steps": 2},
        }
        words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        return [str(ROOT / "scripts" / "train_segmentation.py"), *words, "--no-augment", "--trackers"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *command(runs[0], 4)], check=True, env=environment)
    result = subprocess.run(
        [*launch, *command(runs[1], 2)], check=True, env=environment, capture_output=True, text=True
    )
    assert json.loads((runs[1] / "config.json").read_text())["processes"] == 2, result.stderr
    for quantity in ("loss", "mean_iou", "validation_loss"):
        single, double = (series(read_metrics(run / "metrics.jsonl"), quantity) for run in runs)
        assert single[0] == double[0]
        assert single[1] == pytest.approx(double[1], rel=1e-4)


# the images without masks


@pytest.mark.parametrize("max_labels", [None, 8])
@pytest.mark.parametrize("named", [False, True])
def test_validation_images_of_masks_are_never_trained_on(options, max_labels, named):
    """About a quarter of all rows is held out; all other images are used, also those after `max_labels` rows."""
    options.data = replace(options.data, max_labels=max_labels)
    options.joint = replace(options.joint, unlabelled=options.data.data if named else None)
    task, everything = task_of(options), set(files(options.data.data))
    held_out = images(load_masked(options.data, options.training.seed).validation)
    decoded = (np.asarray(Image.open(file))[:, :, None] for file in Path(options.data.data).rglob("*.png"))
    assert len(held_out) == sum(place_of(content_digest(pixels).hex()) < 0.25 for pixels in decoded)
    assert len(task.segmentation.train) == min(max_labels or 12, 12 - len(held_out))
    assert (0 < len(held_out) < 12, len(everything)) == (True, 12)
    assert images(task.segmentation.validation) == images(task.diffusion.data.validation) == held_out
    assert images(task.segmentation.train).isdisjoint(held_out)
    assert images(task.diffusion.data.train) == everything - held_out
    assert len(task.diffusion.data.train) == 12 - len(held_out)


def test_images_of_a_named_validation_set_are_left_out_too(options, tmp_path):
    squares(tmp_path / "other", count=3, kinds=("a", "b"))  # its first images are those of the fixture
    folder = tmp_path / "other"
    named = {"validation_data": str(folder / "images"), "validation_masks": str(folder / "masks")}
    options.data = replace(options.data, **named, validation_fraction=0)
    unlabelled = images(task_of(options).diffusion.data.train)
    assert unlabelled == set(files(options.data.data)) - set(files(folder / "images"))
    assert len(unlabelled) == 9


def test_both_kinds_of_images_are_cut_alike_and_mapped_by_one_range(options):
    options.data = replace(options.data, crop_size=12, value_range=(0.0, 210.0))
    task = task_of(options)
    batch, other = first_batch(options, task), first_batch(options, task, step=1)
    assert batch["image"].shape == batch["unlabelled_image"].shape == (4, 1, 12, 12)
    assert task.network.config.sample_size == 12
    assert task.diffusion.pixel_range == task.segmentation.pixel_range
    assert task.diffusion.pixel_range.high == (210.0,)
    assert not torch.equal(batch["unlabelled_image"], other["unlabelled_image"])
    assert len(task.diffusion.sample(task.network.eval(), 2)) == 2


def test_equal_sets_are_shuffled_independently(options):
    """The labelled and the unlabelled half of a batch, 4 of 9 images each, are equal only by chance."""
    task = task_of(options)
    batches = [first_batch(options, task, step) for step in range(6)]
    assert any(not torch.equal(batch["image"], batch["unlabelled_image"]) for batch in batches)


# the objective


def test_a_ddpm_run_keeps_its_objective_and_classes(options, place):
    options.model = str(place / "ddpm")
    task = task_of(options)
    assert task.diffusion.config == OBJECTIVE
    expected = {key: value for key, value in OBJECTIVE.make_scheduler().config.items() if not key.startswith("_")}
    assert {key: task.diffusion.scheduler.config[key] for key in expected} == expected
    assert set(task.diffusion.data.train.labels) == {NO_LABEL}  # masks come without classes: the null class
    options.joint = replace(options.joint, unlabelled=options.data.data)
    assert set(task_of(options).diffusion.data.train.labels) == {0, 1}


def test_images_of_classes_that_the_network_does_not_know_have_no_label(options, place, tmp_path):
    squares(tmp_path / "other", kinds=("b", "c"))
    options.model = str(place / "ddpm")
    options.joint = replace(options.joint, unlabelled=str(tmp_path / "other" / "images"))
    dataset = task_of(options).diffusion.data.train
    kinds = files(tmp_path / "other")
    found = {
        (kinds[item["image"].numpy().tobytes()], item["label"]) for item in map(dataset.fetch, range(len(dataset)))
    }
    assert found == {("b", 1), ("c", NO_LABEL)}


def test_without_a_run_the_objective_is_the_default(options):
    assert task_of(options).diffusion.config == DiffusionConfig(preview_images=2)


def test_a_pipeline_without_a_run_determines_its_objective(place, tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(place / "ddpm")
    pipe.save_pretrained(tmp_path / "pipeline")
    found = saved_objective(tmp_path / "pipeline", pipe.unet, pipe.scheduler)
    same = {"preview_images": 36, "min_snr_gamma": 5.0}  # known only from the options of the run
    assert found == replace(OBJECTIVE, **same)


# the folder of a run


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A joint run from the DDPM run, by the command."""
    output = place / "by-command"
    arguments = {
        **{"data": place / "data/images", "masks": place / "data/masks", "model": place / "ddpm", "output": output},
        **{"denoising-weight": 0.1, "unlabelled": place / "data/images", "preview-images": 3},
        **{"steps": 2, "batch-size": 4, "warmup-steps": 1},
    }
    words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    cli.run("train-segmentation", [*words, "--trackers"])
    return output


def test_a_run_shows_masks_samples_and_curves_and_says_what_it_does(run):
    for name in ("masks.png", "samples.png", "curves.png", "previews/step-00000002.png"):
        assert (run / name).stat().st_size > 0
    assert Image.open(run / "previews/step-00000002-samples.png").size == Image.open(run / "samples.png").size
    card = (run / "README.md").read_text()
    assert "every pixel one of 2 classes, and also generates images of 16x16 pixels" in " ".join(card.split())
    assert json.loads((run / "config.json").read_text())["diffusion"]["prediction_type"] == "epsilon"


def test_the_folder_loads_as_a_segmentation_pipeline(run, place):
    pipe = SegmentationPipeline.from_pretrained(run)
    assert pipe(str(place / "data/images/a/00.png")).masks[0].size == (16, 16)


def test_the_folder_loads_as_an_image_generation_pipeline_with_its_classes(run):
    pipe = ImageGenerationPipeline.from_pretrained(run)
    assert pipe.label_names == ["a", "b"]
    assert pipe.scheduler.config.prediction_type == "epsilon"
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, class_labels=["a", "b"], guidance_scale=2.0, num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_the_folder_loads_as_a_stock_pipeline(run):
    pipe = DDPMPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)


def test_the_noise_head_keeps_learning(run, place):
    before, after = (load_file(each / "unet/diffusion_pytorch_model.safetensors") for each in (place / "ddpm", run))
    assert not torch.equal(before["noise_head.weight"], after["noise_head.weight"])


# errors


def test_images_without_masks_need_a_weight():
    for wrong, message in ((-0.1, "denoising_weight is -0.1"), (float("nan"), "denoising_weight is nan")):
        with pytest.raises(ValueError, match=message):
            JointConfig(denoising_weight=wrong)
    with pytest.raises(ValueError, match="unlabelled is 'images', but denoising_weight and self_training_weight are 0"):
        JointConfig(self_training_weight=0.0, unlabelled="images")


@pytest.mark.parametrize(
    "network", [{"time_embedding": None}, {"block": "plain", "norm": "none", "padding": "valid", "channels": [4, 8]}]
)
def test_networks_that_cannot_generate_are_refused(options, tmp_path, network):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "attention": [False, False], **network}))
    options.model = str(path)
    with pytest.raises(ValueError, match="denoising_weight is 0.3, but the network has .* leave denoising_weight out"):
        task_of(options)


def test_a_run_that_learnt_masks_alone_is_refused(options, tmp_path):
    training = replace(options.training, steps=1)
    alone = train_segmentation(replace(options, joint=JointConfig(), training=training))
    with pytest.raises(ValueError, match="run has no scheduler, which a noise predictor is saved with"):
        train_segmentation(replace(options, model=str(alone), output=tmp_path / "second"))


def test_a_head_alone_learns_nothing_from_noise_prediction(options):
    options.segmentation = replace(options.segmentation, learn="head")
    with pytest.raises(ValueError, match="learn is 'head' and denoising_weight 0.3"):
        task_of(options)


def test_unlabelled_images_of_another_kind_are_refused(options, tmp_path):
    for name, mode, size in (("colour", "RGB", (16, 16)), ("wide", "L", (20, 16))):
        (tmp_path / name).mkdir()
        Image.new(mode, size).save(tmp_path / name / "0.png")
    messages = {
        "colour": "have 3 channels of uint8, but those with masks have 1 of uint8",
        "wide": "have 20x16 pixels, but those with masks have 16x16; give crop_size",
    }
    for name, message in messages.items():
        options.joint = replace(options.joint, unlabelled=str(tmp_path / name))
        with pytest.raises(ValueError, match=message):
            task_of(options)


def test_unlabelled_images_come_from_the_stated_column_if_the_source_has_it(options, tmp_path):
    """As in tables with several images a row; a table with one column of images needs no name."""
    pixels = [np.random.default_rng(seed).integers(0, 255, (16, 16), dtype=np.uint8) for seed in range(15)]
    rows = {"t1": pixels[:6], "mask": [(image > 128).astype(np.uint8) for image in pixels[:6]]}
    Dataset.from_dict(rows, Features({"t1": DatasetImage(), "mask": DatasetImage()})).to_parquet(tmp_path / "a.parquet")
    two = {"t1": pixels[6:9], "t2": pixels[9:12]}
    Dataset.from_dict(two, Features(dict.fromkeys(two, DatasetImage()))).to_parquet(tmp_path / "b.parquet")
    one = {"scan": pixels[12:]}
    Dataset.from_dict(one, Features({"scan": DatasetImage()})).to_parquet(tmp_path / "c.parquet")
    config = MaskedDataConfig(
        data=str(tmp_path / "a.parquet"), image_column="t1", mask_column="mask", validation_fraction=0
    )
    data = load_masked(config)
    for name, expected in (("b", pixels[6:9]), ("c", pixels[12:])):
        source = str(tmp_path / f"{name}.parquet")
        images = load_unlabelled(source, config, data).train
        assert [images[i]["image"].numpy().tobytes() for i in range(3)] == [each.tobytes() for each in expected]
        assert f"unlabelled: {source} (train): 3 images of 16x16" in str(examine(config, unlabelled=source).summary)


def test_a_source_of_held_out_images_alone_is_refused(options, tmp_path):
    squares(tmp_path / "other", count=3, kinds=("a", "b"))
    folder = tmp_path / "other"
    named = {"validation_data": str(folder / "images"), "validation_masks": str(folder / "masks")}
    options.data = replace(options.data, **named, validation_fraction=0)
    options.joint = replace(options.joint, unlabelled=str(folder / "images"))
    with pytest.raises(ValueError, match="all 3 unlabelled images of .* are held out for validation"):
        task_of(options)


def test_the_objective_of_a_run_from_before_options_were_renamed_is_read(tmp_path):
    saved = {**asdict(DiffusionConfig(preview_images=5)), "preview_pictures": 5}
    del saved["preview_images"]
    (tmp_path / "config.json").write_text(json.dumps({"diffusion": saved}))
    assert saved_objective(tmp_path, None, None) == DiffusionConfig(preview_images=5)
