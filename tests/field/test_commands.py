"""Cases of commands and documents: trackers, schedulers, loading, and other pipelines."""

import contextlib
import json
import re
import reprlib
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import tracking
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from tests.package.documentation import DOCUMENTS, blocks
from tests.support.tiny import network
from unet_diffusion import PixelClassifier, UNet, UNet2DAdapter, cli
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.evaluation.classifier import ImageClassifier
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import USE as GENERATION_USE
from unet_diffusion.tasks.segmentation import USE as SEGMENTATION_USE
from unet_diffusion.tasks.super_resolution import USE as ENLARGING_USE
from unet_diffusion.training.accelerator import check_trackers
from unet_diffusion.training.config import TrainingConfig


@pytest.fixture
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])


@pytest.mark.parametrize("trackers", [["wandb"], ["wandb", "tensorboard"], ["tensorboard", "wandb"]])
def test_a_tracker_that_is_not_installed_is_refused_before_training(field, only_tensorboard, tmp_path, trackers):
    folder, _ = field("pictures_of_red_discs")
    command = ["train-ddpm", "--data", str(folder), "--output", str(tmp_path / "run"), "--trackers", *trackers]
    with pytest.raises(SystemExit, match="trackers has 'wandb', but wandb is not installed here; pip install wandb"):
        cli.main(command)
    assert not (tmp_path / "run").exists()


def test_the_tracker_of_the_default_is_named_too_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tensorboard is not installed here; pip install tensorboard, or leave it out"):
        check_trackers(TrainingConfig().trackers)


def test_an_unknown_tracker_is_refused_with_those_that_there_are(only_tensorboard):
    with pytest.raises(ValueError, match="trackers has 'wanbd', but must be among all, aim, tensorboard, wandb, .*"):
        check_trackers(("tensorboard", "wanbd"))
    with pytest.raises(ValueError, match="trackers is 'wandb', but must be a tuple of names"):
        TrainingConfig(trackers="wandb")


def test_trackers_that_are_there_are_taken(only_tensorboard, monkeypatch):
    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory = "mine", False

        def __init__(self):
            pass

        @property
        def tracker(self):
            return None

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    check_trackers(("tensorboard", "all", "mine", Mine()))
    check_trackers(())


def noise_predictor(**changes) -> ImageGenerationPipeline:
    """A pipeline as `train-ddpm` leaves it behind."""
    scheduler = DiffusionConfig(**changes).make_scheduler()
    return ImageGenerationPipeline(network(in_channels=3, out_channels=3), scheduler)


def generate(pipe) -> list:
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images


RECIPES = [{}, {"recipe": "ddpm"}, {"zero_terminal_snr": True}, {"prediction_type": "sample"}]
REPLACED = "the network was trained with prediction_type='v_prediction', beta_schedule='squaredcos_cap_v2', so its"


def test_a_scheduler_of_another_prediction_in_place_of_the_runs_is_refused(tmp_path):
    noise_predictor().save_pretrained(tmp_path / "run")
    pipe = ImageGenerationPipeline.from_pretrained(tmp_path / "run")
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match=REPLACED) as caught:
        generate(pipe)
    message = str(caught.value)
    assert "a DPMSolverMultistepScheduler with prediction_type='epsilon', beta_schedule='linear', but" in message
    own = "pipe.scheduler.config, prediction_type='v_prediction', beta_schedule='squaredcos_cap_v2'"
    assert f"DPMSolverMultistepScheduler.from_config({own})" in message
    pipe.save_pretrained(tmp_path / "wrong")  # the scheduler is saved as it is, and stays another one
    with pytest.raises(ValueError, match=REPLACED):
        generate(ImageGenerationPipeline.from_pretrained(tmp_path / "wrong"))
    with pytest.raises(ValueError, match=REPLACED):
        generate(ImageGenerationPipeline.from_pretrained(tmp_path / "run", scheduler=DDIMScheduler()))


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "epsilon"},
        {"beta_schedule": "linear"},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 500},
        {"trained_betas": [0.01] * 1000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_that_the_network_was_trained_for_is_compared(change):
    pipe = noise_predictor()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **change)
    ((name, value),) = change.items()
    shown = reprlib.repr(value)  # of 1000 betas, the first six
    with pytest.raises(ValueError, match=re.escape(f"a DDIMScheduler with {name}={shown}, but")):
        pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])


def test_a_scheduler_without_betas_is_refused():
    pipe = noise_predictor()
    saved = pipe.scheduler.config  # `from_config` keeps its betas in the config of classes that ignore them
    for kind in (FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, IPNDMScheduler):
        pipe.scheduler = kind.from_config(saved)
        with pytest.raises(
            ValueError,
            match=f"a {kind.__name__}, which has no betas, but the network was trained with prediction_type='v_pred",
        ):
            pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_schedulers_that_are_made_from_the_runs_are_accepted(changes, tmp_path):
    noise_predictor(**changes).save_pretrained(tmp_path)
    kinds = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
    if not changes.get("zero_terminal_snr"):
        kinds += [PNDMScheduler, DEISMultistepScheduler, KDPM2DiscreteScheduler, HeunDiscreteScheduler]
    if not changes.get("recipe") and changes.get("prediction_type") == "sample":
        kinds += [UnCLIPScheduler]  # takes neither other betas nor the velocity
    for kind in kinds:
        pipe = ImageGenerationPipeline.from_pretrained(tmp_path)
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])
    for name in get_args(SamplerName):
        pipe = ImageGenerationPipeline.from_pretrained(tmp_path)
        with contextlib.suppress(ValueError):  # a combination that is refused
            pipe.scheduler = sampler(name, pipe.scheduler)
        pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])


def test_pipelines_that_do_not_say_what_their_network_was_trained_for_are_accepted(tmp_path):
    noise_predictor().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    trained = index.pop("_trained_with")
    path.write_text(json.dumps(index))
    generate(ImageGenerationPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler()))
    DDPMPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path / "stock")
    generate(ImageGenerationPipeline.from_pretrained(tmp_path / "stock"))
    del trained["beta_schedule"]
    for damaged in (trained, "epsilon"):
        path.write_text(json.dumps({**index, "_trained_with": damaged}))
        with pytest.raises(ValueError, match="trained_with is .*, but must hold prediction_type, num_train_timesteps"):
            ImageGenerationPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [PNDMScheduler, DEISMultistepScheduler, HeunDiscreteScheduler])
def test_schedulers_that_ignore_zero_terminal_snr_are_refused(kind):
    pipe = noise_predictor(zero_terminal_snr=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="with rescale_betas_zero_snr=False, but the network was trained with"):
        pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}),
    ],
)
def test_settings_that_give_the_network_other_timesteps_are_refused(kind, change):
    pipe = noise_predictor()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*, but the network knows the timesteps of its"):
        pipe.check_inputs((1, 3, 8, 8), None, None, None, "pil", [])


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_the_noise_of_masks_does_not_depend_on_the_sampler(kind):
    unet = network(num_classes=2, time_embedding="sinusoidal")
    masks, image = SegmentationPipeline(unet, DiffusionConfig().make_scheduler()), np.zeros((8, 8), dtype=np.uint8)

    def probabilities():
        return masks(image, timesteps=[500], generator=torch.manual_seed(0), output_type="pt").probabilities[0]

    expected = probabilities()
    masks.scheduler = kind.from_config(masks.scheduler.config)
    generate(ImageGenerationPipeline(unet, masks.scheduler))  # which leaves its steps in the scheduler
    assert torch.equal(probabilities(), expected)


def test_super_resolution_and_noisy_segmentation_are_refused_too():
    scheduler = DiffusionConfig().make_scheduler()
    enlarging = SuperResolutionPipeline(network(in_channels=2), scheduler, scale=2)
    enlarging.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=REPLACED):
        enlarging.check_inputs(3, 0.0, "pil")
    segmenting = SegmentationPipeline(network(num_classes=2), scheduler)
    segmenting.scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="epsilon")
    segmenting.check_inputs(None, 1, (50,))  # adding noise asks for no prediction
    segmenting.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="with beta_schedule='linear', but the network was trained with beta_schedule"):
        segmenting.check_inputs(None, 1, (50,))
    segmenting.check_inputs(None, 1, None)  # no noise is added


def test_a_network_that_is_loaded_from_the_folder_of_its_run_is_found_where_the_message_says(tmp_path):
    noise_predictor().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"data": {}, "training": {}}')  # that of the run
    for place in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="is the folder of a run or a pipeline, not of a network") as raised:
            UNet.from_pretrained(place)
    (fix,) = re.findall(r"load its unet with (UNet\.from_pretrained\(.*\))\.$", str(raised.value))
    assert isinstance(eval(fix), UNet)
    with pytest.raises(ValueError, match=r"it holds unet \(UNet\), but no PixelClassifier\."):
        PixelClassifier.from_pretrained(tmp_path)
    assert isinstance(UNet.from_pretrained(tmp_path, subfolder="unet"), UNet)


def test_a_classifier_is_found_in_its_run_too(tmp_path):
    ImageClassifier(in_channels=1, num_classes=2, widths=(4,)).save_pretrained(tmp_path / "classifier")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="load its classifier with ImageClassifier.from_pretrained"):
        ImageClassifier.from_pretrained(tmp_path)


def test_no_network_is_loaded_as_another_one_with_random_weights(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    stock = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    adapter, unet = UNet2DAdapter.from_stock(stock), network()
    for saved in (stock, adapter, unet):
        saved.save_pretrained(tmp_path / type(saved).__name__)
    for kind, saved in [(UNet, stock), (UNet, adapter), (PixelClassifier, unet), (UNet2DAdapter, unet)]:
        with pytest.raises(
            ValueError, match=f"the config of a {type(saved).__name__}, but must be that of a {kind.__name__}; "
        ):
            kind.from_pretrained(tmp_path / type(saved).__name__)

    class Mine(UNet):
        pass

    assert isinstance(Mine.from_pretrained(tmp_path / "UNet"), Mine)


@pytest.mark.parametrize("kind", [{}, {"recipe": "ddpm"}], ids=str)
def test_the_card_of_a_run_names_the_classes_that_load_it(kind, tmp_path):
    noise_predictor(**kind).save_pretrained(tmp_path / "run")
    use = GENERATION_USE.replace("{name}", str(tmp_path / "run"))
    for name in ("DDPMPipeline", "ImageGenerationPipeline"):
        assert f"`{name}`" in use
        pipe = globals()[name].from_pretrained(tmp_path / "run")
        assert isinstance(pipe.unet, UNet)
        assert type(DiffusionPipeline.from_pretrained(tmp_path / "run")) is DDPMPipeline
        assert DDIMScheduler.from_config(pipe.scheduler.config).config.prediction_type == (
            "epsilon" if kind else "v_prediction"
        )
    (network_alone,) = re.findall(r"unet_diffusion\.(UNet\.from_pretrained\(.*?\))`", use)
    assert isinstance(eval(network_alone), UNet)
    for other in (SEGMENTATION_USE, ENLARGING_USE):
        assert "DiffusionPipeline.from_pretrained` looks for classes in diffusers only" in other


def test_a_run_in_bfloat16_gives_float_images(tmp_path):
    """The stock pipeline converts the network's own dtype to NumPy, which has no bfloat16; with a stock network too."""
    noise_predictor().save_pretrained(tmp_path)
    pipe = ImageGenerationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    full = ImageGenerationPipeline.from_pretrained(tmp_path)
    images = [p(num_inference_steps=3, output_type="np", generator=torch.manual_seed(0)).images for p in (pipe, full)]
    assert images[0].dtype == np.float32
    assert np.abs(images[0] - images[1]).mean() < 0.05
    stock = DDPMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert stock(num_inference_steps=2, output_type="pt").images.dtype == torch.bfloat16


def test_documents_make_no_scheduler_without_the_settings_of_the_run():
    """A bare one takes the output of the network for noise, which the default recipe does not predict."""
    made = [
        (block.document.name, line)
        for document in DOCUMENTS
        for block in blocks(document)
        for line in block.text.splitlines()
        if re.search(r"Scheduler\(\)", line)
    ]
    assert [name for name, line in made if "that of the stock network" not in line] == []
