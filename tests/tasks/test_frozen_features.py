import json
import logging
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.support.tiny import power_cut
from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.tiling import Tiling, noise_window
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.segmentation.segmenter import CLASSIFIER_SEED, TURNS, tiling_for_classifier, turned, turned_back
from unet_diffusion.tasks.config import FrozenFeaturesConfig, SegmentationConfig
from unet_diffusion.tasks.frozen_features import FrozenFeaturesTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series
from unet_diffusion.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL = {
    "norm": "none",
    "attention": (False, False, False),
}  # so that every output pixel depends on a context of its own


def noise_predictor(std: float = 0.3, **overrides) -> UNet:
    """A network with random weights, also where they start at zero."""
    unet = UNet(**{"in_channels": 1, "out_channels": 1, "channels": (8, 12, 16), "head_channels": 8, **overrides})
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:
                nn.init.normal_(parameter, std=std)
    return unet.eval()


def pipeline(unet: UNet | None = None, **arguments) -> SegmentationPipeline:
    unet = unet or noise_predictor()
    classifier = PixelClassifier.beside(unet, 3, (20, 300), hidden=(8, 6))
    nn.init.normal_(classifier.head.weight)
    pipe = SegmentationPipeline(unet, DDPMScheduler(), classifier=classifier, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 1), dtype=np.uint8)


def probabilities(pipe: SegmentationPipeline, pixels: np.ndarray, **arguments) -> np.ndarray:
    return pipe(pixels, output_type="np", **arguments).probabilities[0]


# --- the pipeline ---


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (17, 30)])
def test_probabilities_are_those_of_the_classifier_with_the_fixed_noise(size, augment):
    pipe, pixels = pipeline(), image(*size)
    clean = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = (slice(0, size[0]), slice(0, size[1]))
    noises = [noise_window(CLASSIFIER_SEED, draw, 1, *whole)[None] for draw in range(2)]
    expected = []
    for turn in TURNS if augment else TURNS[:1]:
        given = [turned(noise, turn) for noise in noises]
        features = pipe.classifier.features(pipe.unet, pipe.scheduler, turned(clean, turn), given)
        with torch.no_grad():
            logits = pipe.classifier(features, turned(clean, turn).shape[2:])
        expected.append(turned_back(logits.softmax(dim=1), turn)[0])
    found = probabilities(pipe, pixels, augment=augment)
    np.testing.assert_allclose(found, torch.stack(expected).mean(dim=0), atol=1e-5)
    assert found.shape == (3, *size)


def test_network_and_classifier_may_have_different_dtypes():
    pipe, pixels = pipeline(), image(16, 16)
    expected = probabilities(pipe, pixels)
    pipe.unet.to(torch.bfloat16)
    found = probabilities(pipe, pixels)
    assert found.dtype == np.float32 and 0 < np.abs(found - expected).max() < 0.1


def test_masks_are_the_same_at_every_call_with_any_generator():
    pipe, pixels = pipeline(), image(16, 16)
    one = probabilities(pipe, pixels, generator=torch.manual_seed(1))
    assert np.array_equal(one, probabilities(pipe, pixels, generator=torch.manual_seed(2)))
    beside = pipe([image(16, 16, seed=1), pixels], output_type="np").probabilities[1]
    np.testing.assert_allclose(beside, one, atol=1e-5)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_tiles_give_the_mask_of_the_whole_image(augment, upsample):
    """At sizes that are not multiples of the stride; the context of the tiles is that of the network."""
    pipe = pipeline(noise_predictor(**LOCAL, upsample=upsample))
    pixels = image(61, 87)
    whole = probabilities(pipe, pixels, augment=augment)
    np.testing.assert_allclose(probabilities(pipe, pixels, augment=augment, tile_size=8), whole, atol=1e-5)


def test_blended_tiles_of_a_network_with_attention_are_near_the_whole():
    pipe, pixels = pipeline(), image(90, 90)
    whole, tiles = probabilities(pipe, pixels), probabilities(pipe, pixels, tile_size=32)
    assert np.abs(tiles - whole).mean() < 0.2 * np.abs(whole - whole.mean(axis=(1, 2), keepdims=True)).mean()


def test_files_are_segmented_window_by_window(tmp_path):
    pipe = pipeline(noise_predictor(**LOCAL))
    pixels, mask = image(70, 41), np.zeros((70, 41), dtype=np.uint8)
    expected = pipe(pixels, output_type="np").masks[0]
    pipe.segment_file(pixels, mask, tile_size=16)
    assert np.array_equal(mask, expected)
    assert len(np.unique(mask)) > 1


def test_tiles_that_we_choose_fit_the_classifier_as_well_as_the_network():
    """With the classifier, 4 maps of 128 channels need more than 12 of 8, so windows of 64 MiB are smaller."""
    unet = noise_predictor(**LOCAL)

    def tiling(**arguments) -> Tiling:
        classifier = PixelClassifier.beside(unet, 3, (20,), **arguments)
        return tiling_for_classifier(Tiling.of(unet), classifier)

    alone, narrow, wide = Tiling.of(unet), tiling(hidden=(4,)), tiling()
    assert narrow == alone
    side = math.sqrt(2**26 / (4 * 4 * 128))
    assert side - 4 < wide.tile + wide.shared <= side


def test_a_classifier_takes_the_place_of_the_segmentation_head():
    unet = noise_predictor(num_classes=5)
    pipe = pipeline(unet)
    assert pipe.num_classes == 3
    assert probabilities(pipe, image(9, 9)).shape == (3, 9, 9)
    assert SegmentationPipeline(unet).num_classes == 5
    assert unet.active_head == "noise"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"timesteps": [20]}, r"timesteps are \[20\].*leave both out"), ({"num_draws": 2}, "num_draws is 2.*leave both")],
)
def test_timesteps_and_draws_are_the_classifiers_own(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(image(4, 4), **arguments)


def test_components_that_do_not_fit_are_refused():
    unet = noise_predictor()
    classifier = PixelClassifier.beside(unet, 3, (20,))
    with pytest.raises(ValueError, match="no scheduler"):
        SegmentationPipeline(unet, classifier=classifier)
    with pytest.raises(ValueError, match="use the network that it was trained with"):
        SegmentationPipeline(noise_predictor(channels=(4, 12, 16)), DDPMScheduler(), classifier=classifier)
    with pytest.raises(ValueError, match="class_names has 2 entries.*3 classes"):
        SegmentationPipeline(unet, DDPMScheduler(), class_names=["a", "b"], classifier=classifier)
    with pytest.raises(ValueError, match="or give a classifier"):
        SegmentationPipeline(unet, DDPMScheduler())


# --- saving and loading ---


def test_a_saved_pipeline_names_the_class_by_its_module():  # this path is part of the checkpoint format
    assert pipeline().config["classifier"] == ("unet_diffusion.adapters", "PixelClassifier")


@pytest.mark.slow
def test_a_fresh_process_loads_it_without_a_warning_and_computes_the_same(tmp_path):
    pipe = pipeline(pixel_range=PixelRange((0.0,), (200.0,), "uint8").to_dict())
    pipe.save_pretrained(tmp_path / "run")
    np.save(tmp_path / "image.npy", image(20, 15))
    program = f"""
import numpy as np, unet_diffusion
from unet_diffusion.pipelines import SegmentationPipeline
pipe = SegmentationPipeline.from_pretrained({str(tmp_path / "run")!r})
np.save({str(tmp_path / "out.npy")!r}, pipe({str(tmp_path / "image.npy")!r}, output_type="np").probabilities[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert [line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line] == []
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), probabilities(pipe, image(20, 15)), atol=1e-6)


def test_it_works_as_a_custom_pipeline_and_by_from_pipe(tmp_path):
    pipe = pipeline(class_names=["ground", "cell", "border"])
    pipe.save_pretrained(tmp_path)
    custom = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(REPOSITORY / "pipelines" / "segmentation.py"), trust_remote_code=True
    )
    expected = probabilities(pipe, image(9, 9))
    np.testing.assert_allclose(probabilities(custom, image(9, 9)), expected, atol=1e-6)
    again = SegmentationPipeline.from_pipe(pipe)
    assert again.classifier is pipe.classifier
    assert again.class_names == ["ground", "cell", "border"]


def test_the_folder_still_generates(tmp_path, caplog):
    pipeline().save_pretrained(tmp_path)
    assert DDPMPipeline.from_pretrained(tmp_path).unet.config.channels == [8, 12, 16]
    logging.getLogger("diffusers").propagate = True
    try:
        generating = ImageGenerationPipeline.from_pretrained(tmp_path)
    finally:
        logging.getLogger("diffusers").propagate = False
    ours = [record.getMessage() for record in caplog.records if "ImageGenerationPipeline" in record.getMessage()]
    assert ours == []
    assert len(generating(batch_size=1, num_inference_steps=2).images) == 1


def test_a_pipeline_without_a_classifier_does_not_name_one(tmp_path):
    SegmentationPipeline(noise_predictor(num_classes=2)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {key for key in index if not key.startswith("_")} == {"unet", "scheduler"}
    assert SegmentationPipeline.from_pretrained(tmp_path).classifier is None


# --- the task ---


def squares(folder: Path, count: int = 12, side: int = 16) -> None:
    """Images of one square on grey noise, bright (class 1) or dark (class 2), and their masks."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        top, left = random.integers(0, side - 6, 2)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[top : top + 6, left : left + 6] = 1 + i % 2
        pixels = random.integers(110, 150, (side, side)) + np.choose(mask, [0, 100, -100])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i:02d}.png")


@pytest.fixture
def data(tmp_path) -> MaskedDataConfig:
    folder = tmp_path / "data"
    squares(folder)
    return MaskedDataConfig(
        data=str(folder / "images"), masks=str(folder / "masks"), validation_fraction=0.25, num_classes=3
    )


TRAINING = TrainingConfig(
    steps=4, batch_size=4, warmup_steps=1, log_every=2, validate_every=4, checkpoint_every=2, trackers=(), ema_decay=0.9
)


def make_task(data: MaskedDataConfig, config: SegmentationConfig | None = None, **arguments) -> FrozenFeaturesTask:
    torch.manual_seed(0)
    return FrozenFeaturesTask(
        noise_predictor(std=0.05),  # its features stay close to the image
        load_masked(data),
        config or SegmentationConfig(),
        arguments.pop("features", FrozenFeaturesConfig(timesteps=(10, 50), hidden=(32,))),
        **{"scheduler": DDPMScheduler(), "augmentation": AugmentationConfig(elastic=1.0), **arguments},
    )


def train(task: FrozenFeaturesTask, data: MaskedDataConfig, training: TrainingConfig, output: Path) -> Path:
    config = {"data": asdict(data), "training": asdict(training)}
    return Trainer(task, training, output, config, make_accelerator(training, output)).run()


@pytest.mark.slow
def test_a_classifier_finds_planted_classes_while_the_network_stays_as_it_was(data, tmp_path):
    """Background everywhere has a mean IoU below 1 / 3, and a random guess by the shares of the classes less."""
    task = make_task(data)
    trunk = {name: tensor.clone() for name, tensor in task.unet.state_dict().items()}
    training = replace(TRAINING, steps=100, learning_rate=2e-2, validate_every=20)
    run = train(task, data, training, tmp_path / "run")
    assert series(read_metrics(run / "metrics.jsonl"), "mean_iou")[1][-1] > 0.6
    for name in ("masks.png", "curves.png", "README.md"):
        assert (run / name).stat().st_size > 0

    saved = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == trunk.keys()
    for name, tensor in trunk.items():
        assert torch.equal(task.unet.state_dict()[name], tensor)
        assert torch.equal(saved[name], tensor)
    assert not task.unet.training
    learnt = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert learnt.keys() == task.network.state_dict().keys()

    pipe = SegmentationPipeline.from_pretrained(run)
    with torch.no_grad():
        task.network.load_state_dict(pipe.classifier.state_dict())
        predict = task.pipeline(task.network).predictor()
    for index in range(3):
        image, mask = (tmp_path / "data" / kind / f"{index:02d}.png" for kind in ("images", "masks"))
        predicted = np.asarray(pipe(str(image)).masks[0])
        stored = torch.from_numpy(np.asarray(Image.open(image)).copy())[None]
        assert np.array_equal(predicted, predict(stored).numpy())
        assert (predicted == np.asarray(Image.open(mask))).mean() > 0.9


def test_an_interrupted_run_ends_as_an_undisturbed_one(data, tmp_path):
    whole = train(make_task(data), data, TRAINING, tmp_path / "whole")
    with power_cut(FrozenFeaturesTask, 4):
        train(make_task(data), data, TRAINING, tmp_path / "run")
    run = train(make_task(data), data, TRAINING, tmp_path / "run")
    a, b = (load_file(each / "classifier" / "diffusion_pytorch_model.safetensors") for each in (run, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [
        row["step"] for row in read_metrics(whole / "metrics.jsonl")
    ]


def test_the_noise_of_a_sample_follows_from_its_generator_alone(data):
    task = make_task(data, augmentation=None)
    nn.init.normal_(task.network.head.weight)
    item = task.train[0, 0]
    other = task.train[0, 1]

    def loss(items: list[dict], seeds: list[int]) -> float:
        batch = {name: torch.stack([each[name] for each in items]) for name in items[0]}
        return task.loss(task.network, batch, [torch.Generator().manual_seed(seed) for seed in seeds]).item()

    alone = loss([item], [1])
    assert alone == loss([item], [1])
    assert alone != pytest.approx(loss([item], [2]), rel=1e-4)
    assert (alone + loss([other], [7])) / 2 == pytest.approx(loss([item, other], [1, 7]), rel=1e-5)


def test_it_trains_in_half_precision_with_class_and_border_weights(data, tmp_path):
    config = SegmentationConfig(loss="both", balance_classes=True)
    weighted = replace(data, border_weights=True)
    training = replace(TRAINING, steps=20, learning_rate=2e-2, log_every=5, mixed_precision="bf16", validate_every=20)
    run = train(make_task(weighted, config), weighted, training, tmp_path / "run")
    losses = series(read_metrics(run / "metrics.jsonl"), "loss")[1]
    assert losses[-1] < losses[0]


def test_stages_and_timesteps_are_chosen_by_the_options(data):
    task = make_task(data, features=FrozenFeaturesConfig(timesteps=(7,), stages=(1,), hidden=(16,)))
    config = task.network.config
    assert (config.timesteps, config.stages, config.strides, config.hidden) == ((7,), (1,), (1,), (16,))
    groups = task.parameter_groups()
    learning = {parameter for parameters, _ in groups for parameter in parameters}
    assert learning == set(task.network.parameters())
    assert not any(parameter.requires_grad for parameter in task.unet.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timesteps": ()}, "timesteps are"), ({"stages": (0, 0)}, "stages are"), ({"hidden": (0,)}, "hidden is")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FrozenFeaturesConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": None}, "no scheduler"),
        ({"scheduler": DDPMScheduler(num_train_timesteps=40)}, "0 to 39"),
        ({"features": FrozenFeaturesConfig(stages=(2,))}, "stages 0 to 1"),
        ({"config": SegmentationConfig(timestep=3)}, "timestep is 3, but a pixel classifier has timesteps of its own"),
        ({"config": SegmentationConfig(trunk_rate=0.1)}, "trunk_rate is 0.1, but learn='pixel_classifier' freezes"),
    ],
)
def test_unsuitable_networks_schedulers_and_options_are_refused(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(data, **arguments)
