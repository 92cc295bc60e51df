"""The options of noise prediction: schedulers, recipes and errors."""

from dataclasses import asdict, replace

import pytest
from diffusers import DDPMScheduler

from unet_diffusion.tasks.config import DiffusionConfig


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
