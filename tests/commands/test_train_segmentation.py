import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import power_cut, squares
from unet_diffusion import UNet
from unet_diffusion.commands.export.graphs import heads_of
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.sample import sample
from unet_diffusion.commands.segment import segment
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import make_task, train_segmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.saved_index import part_that_left_noise
from unet_diffusion.saved_runs import load_pipeline
from unet_diffusion.tasks.config import DiffusionConfig, FrozenFeaturesConfig, JointConfig, SegmentationConfig
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series


@pytest.fixture
def options(tmp_path) -> TrainSegmentation:
    squares(tmp_path / "data")
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    training = TrainingConfig(
        steps=4, batch_size=4, warmup_steps=1, log_every=2, validate_every=4, checkpoint_every=2, trackers=()
    )
    return TrainSegmentation(
        data=MaskedDataConfig(
            data=str(tmp_path / "data" / "images"), masks=str(tmp_path / "data" / "masks"), validation_fraction=0.25
        ),
        output=tmp_path / "run",
        model=str(network),
        augmentation=AugmentationConfig(elastic=1.0),
        training=training,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def test_training_finds_the_squares_and_saves_a_pipeline(options, tmp_path):
    options.training = replace(options.training, steps=60, learning_rate=1e-2, validate_every=60)
    run = train_segmentation(options)
    assert series(read_metrics(run / "metrics.jsonl"), "mean_iou")[1][-1] > 0.8
    for name in ("masks.png", "curves.png", "README.md", "previews/step-00000060.png"):
        assert (run / name).stat().st_size > 0
    pipe = SegmentationPipeline.from_pretrained(run)
    image, mask = (tmp_path / "data" / kind / "00.png" for kind in ("images", "masks"))
    predicted = np.asarray(pipe(str(image)).masks[0])
    assert (predicted == np.asarray(Image.open(mask))).mean() > 0.9


def noise_predictor(options: TrainSegmentation, folder: Path) -> Path:
    """A DDPM run of two steps on the images."""
    return train_ddpm(
        TrainDDPM(
            output=folder,
            model=options.model,
            data=DataConfig(data=options.data.data, validation_fraction=0.2),
            diffusion=DiffusionConfig(preview_images=2),
            training=replace(options.training, steps=2),
        )
    )


@pytest.mark.parametrize("values", [{"learn": "head"}, {"learn": "pixel_classifier"}, {"trunk_rate": 0.1}])
def test_untrained_weights_are_not_spared(options, values):
    (name,) = values
    options.segmentation = SegmentationConfig(**values)
    with pytest.raises(ValueError, match=f"{name} is .*, which spares trained weights, but those of the model"):
        train_segmentation(options)


def test_a_run_for_masks_starts_from_one_with_other_classes_or_values(options, tmp_path, caplog):
    """With another number of classes it takes all but the head; with as many under other names, the head too."""
    first = replace(options, training=replace(options.training, steps=1))
    first.data = replace(options.data, class_names=("ground", "square"), value_range=(0, 255))
    run = train_segmentation(first)
    caplog.clear()

    def warned(**values) -> list[str]:
        caplog.clear()
        again = replace(first, model=str(run), training=replace(first.training, steps=1), output=tmp_path / "again")
        network = make_task(again, load_masked(replace(first.data, **values))).network
        assert network.config.num_classes == values.get("num_classes", 2)
        return [message.removeprefix(f"the network of {run} ") for message in caplog.messages]

    assert warned() == []
    assert warned(num_classes=3, class_names=("ground", "square", "disk")) == [
        "tells 2 classes apart, and these masks have 3, so its segmentation head starts untrained"
    ]
    (message,) = warned(class_names=("square", "ground"))
    assert message.startswith("learnt the classes ground, square, but these are square, ground; its segmentation head")
    (message,) = warned(value_range=(0, 60))
    assert message.startswith("learnt from images mapped by PixelRange(low=(0.0,), high=(255.0,)")


@pytest.mark.parametrize("learn", ["everything", "decoder", "head"])
def test_a_ddpm_run_keeps_its_noise_head_but_generates_only_if_the_trunk_stayed(options, tmp_path, learn):
    ddpm = noise_predictor(options, tmp_path / "ddpm")
    part = replace(options.segmentation, learn=learn)
    run = train_segmentation(replace(options, model=str(ddpm), segmentation=part))
    before, after = weights(ddpm), weights(run)
    assert torch.equal(before["noise_head.weight"], after["noise_head.weight"])
    stayed = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert (stayed == set(before)) == (learn == "head") and ("stem.weight" in stayed) == (learn != "everything")
    pipe = ImageGenerationPipeline.from_pretrained(run)  # in Python it can be loaded in any case
    assert len(pipe(batch_size=2, num_inference_steps=2).images) == 2
    assert pipe.unet.active_head == "noise"
    card = " ".join((run / "README.md").read_text().split())
    assert ("noise head, which no longer fits" in card) == (learn != "head")
    wanted = Sample(run=run, output=tmp_path / "samples", count=1, steps=1)
    figures = EvaluateGeneration(run=run)
    if learn == "head":
        sample(wanted)
        figures.check_paths()
        return
    message = f"learnt masks with learn='{learn}', .* give the run that learnt to generate, or train"
    for refused in (lambda: sample(wanted), figures.check_paths):
        with pytest.raises(ValueError, match=message):
            refused()


def test_a_noise_head_that_no_longer_fits_is_refused_in_runs_that_start_from_there(options, tmp_path):
    ddpm = noise_predictor(options, tmp_path / "ddpm")
    masks = train_segmentation(replace(options, model=str(ddpm), output=tmp_path / "masks"))
    for learn, features in (("head", FrozenFeaturesConfig()), ("pixel_classifier", FrozenFeaturesConfig((10, 100)))):
        part = SegmentationConfig(learn=learn)
        start = {"model": str(masks), "segmentation": part, "frozen_features": features}
        run = train_segmentation(replace(options, output=tmp_path / learn, **start))
        assert "noise head, which no longer fits" in " ".join((run / "README.md").read_text().split())
        copy = tmp_path / f"{learn}-copy"
        SegmentationPipeline.from_pretrained(run).save_pretrained(copy)
        for folder in (run, copy):
            with pytest.raises(ValueError, match="a run that it started from, learnt masks with learn='everything'"):
                sample(Sample(run=folder, output=tmp_path / "samples", count=1, steps=1))
        index = json.loads((run / "model_index.json").read_text())
        del index["_left_noise"]  # as earlier versions saved it
        (run / "model_index.json").write_text(json.dumps(index))
        assert part_that_left_noise(run) == "everything"
    masks.rename(tmp_path / "elsewhere")
    assert part_that_left_noise(run) is None


def test_a_kept_noise_head_keeps_its_steps_and_the_names_of_its_classes(options, tmp_path):
    unet = UNet(16, 1, 1, channels=(8, 16), head_channels=8, num_class_embeds=2, label_dropout=0.1)
    model = tmp_path / "tuned"
    ImageGenerationPipeline(unet, DDPMScheduler(), label_names=["a", "b"], few_steps=4).save_pretrained(model)
    for learn in ("head", "pixel_classifier"):  # the second starts from the first
        part = {"segmentation": SegmentationConfig(learn=learn)}
        part |= {"frozen_features": FrozenFeaturesConfig((10, 100))} if learn == "pixel_classifier" else {}
        model = train_segmentation(replace(options, model=str(model), output=tmp_path / learn, **part))
        assert GenerationOptions(model).sampling == ("lcm", 2)
        pipe = load_pipeline(ImageGenerationPipeline, model)
        assert pipe.few_steps == 4 and pipe.label_names == ["a", "b"]
        index = json.loads((model / "model_index.json").read_text())
        assert index["_class_name"].endswith("SegmentationPipeline")  # it gives masks, though diffusers could generate
    run = train_segmentation(replace(options, model=str(model), output=tmp_path / "masks"))
    assert json.loads((run / "model_index.json").read_text()).get("_few_steps") is None


def test_graphs_leave_out_a_noise_head_that_no_longer_fits(tmp_path, caplog):
    unet = UNet(1, 1, 1, channels=(4, 8), head_channels=8, num_classes=2)
    SegmentationPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    for learn, heads in ((None, 2), ("head", 2), ("everything", 1)):
        if learn is not None:
            (tmp_path / "config.json").write_text(json.dumps({"segmentation": {"learn": learn}}))
        assert heads_of(tmp_path, unet, None) == ["segmentation", "noise"][:heads]
        assert heads_of(tmp_path, unet, "noise") == ["noise"]
    (message,) = caplog.messages
    assert (
        "is left out, since the layers under it have changed" in message and "set head='noise' to write it" in message
    )


def test_a_pixel_classifier_learns_beside_a_ddpm_run(options, tmp_path):
    ddpm = noise_predictor(options, tmp_path / "ddpm")
    config = SegmentationConfig(learn="pixel_classifier")
    few = replace(options, model=str(ddpm), segmentation=config, frozen_features=FrozenFeaturesConfig((10, 100)))
    run = train_segmentation(few)
    before, after = weights(ddpm), weights(run)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pipe = SegmentationPipeline.from_pretrained(run)
    assert pipe.classifier.config.timesteps == [10, 100] and pipe.num_classes == 2
    assert "one of 2 classes" in (run / "README.md").read_text()
    masks = segment(Segment(run=run, inputs=(options.data.data,)))
    assert len(list(masks.glob("*-overlay.png"))) == 12


def test_options_of_another_way_to_learn_are_refused(options):
    with pytest.raises(ValueError, match="reads no features; set learn='pixel_classifier'"):
        train_segmentation(replace(options, frozen_features=FrozenFeaturesConfig(timesteps=(5,))))
    joint = JointConfig(denoising_weight=1.0)
    with pytest.raises(ValueError, match="learn is 'pixel_classifier', whose trunk does not learn"):
        train_segmentation(replace(options, joint=joint, segmentation=SegmentationConfig(learn="pixel_classifier")))
    assert not options.output.exists()


def test_an_interrupted_run_ends_as_an_undisturbed_one(options, tmp_path):
    whole = train_segmentation(replace(options, output=tmp_path / "whole"))
    with power_cut(SegmentationTask, 4):
        train_segmentation(options)
    a, b = weights(train_segmentation(options)), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("loss", "balance", "border"),
    [("cross_entropy", True, False), ("cross_entropy", False, True), ("dice", False, False), ("both", True, True)],
)
def test_every_loss_trains(options, loss, balance, border):
    options.segmentation = SegmentationConfig(loss=loss, balance_classes=balance)
    options.data = replace(options.data, border_weights=border)
    options.training = replace(options.training, steps=40, learning_rate=1e-2, log_every=10)
    losses = series(read_metrics(train_segmentation(options) / "metrics.jsonl"), "loss")[1]
    assert losses[-1] < losses[0]


def test_the_unpadded_network_learns_from_masks_cut_to_its_output(options, tmp_path):
    squares(tmp_path / "large", count=4, side=80)
    network = {"channels": [4, 8, 8], "block": "plain", "norm": "none", "padding": "valid", "time_embedding": None}
    Path(options.model).write_text(json.dumps({**network, "attention": [False] * 3}))
    folder = tmp_path / "large"
    options.data = MaskedDataConfig(
        data=str(folder / "images"), masks=str(folder / "masks"), validation_fraction=0.25, crop_size=64
    )
    options.training = replace(options.training, batch_size=2)
    pipe = SegmentationPipeline.from_pretrained(train_segmentation(options))
    assert pipe(str(folder / "images" / "00.png")).masks[0].size == (80, 80)


def test_data_that_cannot_be_trained_on_are_refused_before_training(options, tmp_path):
    values = np.zeros((16, 16), dtype=np.uint8)
    values[3:9, 3:9] = 7
    Image.fromarray(values).save(tmp_path / "data" / "masks" / "03.png")
    options.data = replace(options.data, num_classes=2)
    with pytest.raises(ValueError, match="cannot be trained on"):
        train_segmentation(options)
    assert not options.output.exists()


def test_dice_takes_no_class_weights():
    with pytest.raises(ValueError, match="set loss='both'"):
        SegmentationConfig(loss="dice", balance_classes=True)
