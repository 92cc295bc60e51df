"""The choices for options of diffusion and super-resolution, and checks of their values."""

from typing import Any, Literal

from unet_diffusion.checks import is_count, is_number, require

SamplerName = Literal["dpm-solver++", "sde-dpm-solver++", "unipc", "heun", "euler", "ddim", "ddpm", "lcm"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
FEW_STEPS = 4  # the largest number that tune-few-steps tunes for


def best_sampling(
    prediction_type: Any, few_steps: int | None = None, num_train_timesteps: int | None = None
) -> tuple[SamplerName, int]:
    """The sampler with which a network needs the fewest steps for good images, and that number of steps.

    A noise predictor needs fresh noise in every step, which makes up for its errors (docs/samplers.md).

    Args:
        prediction_type: what the network predicts.
        few_steps: the largest number of steps that `tune-few-steps` tuned the network for; None if it was not tuned.
        num_train_timesteps: the timesteps that the network knows, which are the most steps; None for no limit.
    """
    name: SamplerName = "sde-dpm-solver++" if prediction_type == "epsilon" else "dpm-solver++"
    steps = 20
    if few_steps is not None:
        name, steps = "lcm", 2
    return name, steps if num_train_timesteps is None else min(steps, num_train_timesteps)


def check_tunable(prediction_type: Any) -> None:
    """Raises a ValueError unless a network with this prediction can be tuned to generate in a few steps."""
    if prediction_type not in ("v_prediction", "sample"):
        raise ValueError(
            f"prediction_type is {prediction_type!r}, but a network that predicts noise gives the image at the noisy "
            "end only as a small difference of large numbers, so it cannot be tuned for a few steps; train one with "
            "'v_prediction', the default of train-ddpm."
        )


def check_scale(scale: Any) -> None:
    """Raises a ValueError unless each side of an image can be enlarged by this factor."""
    require(is_count(scale, 2), "scale", scale, "must be an integer of at least 2; 2 and 4 are usual")


def check_condition_noise(condition_noise: Any) -> None:
    """Raises a ValueError unless noise of this deviation can be added to the enlarged image."""
    valid = is_number(condition_noise) and 0 <= condition_noise < 1
    require(valid, "condition_noise", condition_noise, "must be at least 0 and less than 1")


def check_sides(height: int, width: int, scale: int) -> None:
    """Raises a ValueError unless images of a size can be shrunk `scale` times a side."""
    if height % scale or width % scale:
        raise ValueError(
            f"the images have {width}x{height} pixels, but both sides must be multiples of scale, {scale}; set "
            "image_size or crop_size to one, or another scale."
        )
