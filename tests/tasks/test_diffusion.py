"""The options of noise prediction: schedulers, recipes and errors; networks that are refused, and cards of runs."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.image_files import tiff
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.sample import sample
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.tune_few_steps import tune_few_steps
from unet_diffusion.data.config import DataConfig
from unet_diffusion.tasks.config import DiffusionConfig, FewStepsConfig, SuperResolutionConfig
from unet_diffusion.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
TINY = {"channels": [8, 16], "head_channels": 8}
ONE_STEP = TrainingConfig(steps=1, batch_size=2, warmup_steps=0, trackers=())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction_type": "flow"}, "'epsilon', 'v_prediction', 'sample'"),
        ({"beta_schedule": "sigmoid"}, "squaredcos_cap_v2"),
        ({"recipe": "edm"}, "recipe is 'edm', but must be one of 'ddpm', None"),
        ({"recipe": "ddpm", "prediction_type": "sample"}, "prediction_type is 'sample', but the recipe 'ddpm' has"),
        ({"zero_terminal_snr": True, "prediction_type": "epsilon"}, "use prediction_type='v_prediction'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_wrong_diffusion_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**wrong)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_objective_makes_a_scheduler_that_stock_pipelines_take(prediction_type, beta_schedule):
    config = DiffusionConfig(prediction_type=prediction_type, beta_schedule=beta_schedule)
    scheduler = config.make_scheduler()
    assert scheduler.config.prediction_type == prediction_type
    assert scheduler.config.beta_schedule == beta_schedule
    if prediction_type != "epsilon":
        assert replace(config, zero_terminal_snr=True).make_scheduler().alphas_cumprod[-1] < 1e-7


def test_the_classic_recipe_is_that_of_ddpm():
    """Equal weights of the noise's squared error (equation 14), on the noise schedule of diffusers' defaults."""
    config = DiffusionConfig(recipe="ddpm")
    ours, theirs = (
        {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        for scheduler in (config.make_scheduler(), DDPMScheduler())
    )
    assert ours == theirs
    assert config.min_snr_gamma is None
    assert DiffusionConfig(**asdict(config)) == config  # as read from the config.json of a run


def options(folder: Path, data: DataConfig | None = None, network: dict | None = None, **diffusion) -> TrainDDPM:
    """The options of a run of one step with a tiny network."""
    (folder / "network.json").write_text(json.dumps(TINY if network is None else network))
    return TrainDDPM(
        output=folder / "run",
        model=str(folder / "network.json"),
        data=data or DataConfig(max_images=4, image_size=8, validation_fraction=0),
        diffusion=DiffusionConfig(preview_images=1, **diffusion),
        training=ONE_STEP,
    )


def channels_of_16_bit(folder: Path) -> DataConfig:
    """Images of 8 x 8 pixels with five channels of 16 bits."""
    (folder / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 60_000, (8, 8, 5)).astype(np.uint16)
        file = tiff(pixels, photometric="minisblack", planarconfig="contig")
        (folder / "images" / f"{i}.tif").write_bytes(file)
    return DataConfig(data=str(folder / "images"), validation_fraction=0)


def run_card(run: Path, monkeypatch) -> dict:
    """Runs the Python code of a card beside the run; returns the variables that it leaves."""
    monkeypatch.chdir(run.parent)
    variables: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, variables)
    return variables


KINDS = {
    "few timesteps": lambda folder: options(folder, num_train_timesteps=10),
    "classes that are never dropped": lambda folder: options(
        folder, num_train_timesteps=10, class_conditional=True, label_dropout=0.0
    ),
    "5 channels of 16 bits": lambda folder: options(folder, channels_of_16_bit(folder), num_train_timesteps=10),
    "values that are not 0 to 255": lambda folder: options(
        folder,
        DataConfig(max_images=4, image_size=8, validation_fraction=0, value_range=(0, 200)),
        num_train_timesteps=10,
    ),
}
STOCK = ["few timesteps"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_in_the_card_of_a_run_and_of_the_tuned_run_executes(kind, tmp_path, monkeypatch):
    made = KINDS[kind](tmp_path)
    tuning = TuneFewSteps(train_ddpm(made), tmp_path / "tuned", few_steps=FewStepsConfig(), training=ONE_STEP)
    for run in (made.output, tune_few_steps(tuning)):
        card = (run / "README.md").read_text()
        assert ("import DDPMPipeline" in card or "DDIMPipeline" in card) == (kind in STOCK)
        left = run_card(run, monkeypatch)
        if kind == "5 channels of 16 bits":
            assert left["images"].shape == (1, 5, 8, 8) and str(left["images"].dtype) == "torch.uint16"
        else:
            assert Image.open(tmp_path / "sample.png").size == (8, 8)
            (tmp_path / "sample.png").unlink()
        assert f"--run {run.name}" in card
        assert ("--class-labels 0" in card) == (kind == "classes that are never dropped")


def test_the_code_in_the_card_of_a_run_that_enlarges_images_of_5_channels_executes(tmp_path, monkeypatch):
    data = channels_of_16_bit(tmp_path)
    made = replace(
        options(tmp_path, data, num_train_timesteps=10),
        task="super-resolution",
        super_resolution=SuperResolutionConfig(scale=2),
    )
    (tmp_path / "small.tif").write_bytes((tmp_path / "images" / "0.tif").read_bytes())
    assert run_card(train_ddpm(made), monkeypatch)["large"].shape == (5, 16, 16)


def test_a_run_of_few_timesteps_takes_no_more_steps_by_default_and_refuses_more(tmp_path):
    run = train_ddpm(options(tmp_path, num_train_timesteps=10))
    assert GenerationOptions(run).sampling == ("dpm-solver++", 10)
    folder = tmp_path / "images"
    with pytest.raises(ValueError, match="num_inference_steps is 20, but the network was trained with 10 timesteps"):
        sample(Sample(run, count=1, steps=20, output=folder))
    assert not folder.exists()
    sample(Sample(run, count=1, output=folder))
    assert (folder / "00000.png").is_file()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({**TINY, "time_embedding": None}, "time_embedding=None .* a timestep embedding"),
        ({**TINY, "padding": "valid"}, "padding='valid', but generation needs"),
        ({**TINY, "num_class_embeds": 3}, "class_conditional is False, but num_class_embeds of the network is 3"),
    ],
)
def test_a_network_that_cannot_generate_is_refused_before_anything_is_written(network, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_ddpm(options(tmp_path, network=network))
    assert not (tmp_path / "run" / "config.json").exists()
