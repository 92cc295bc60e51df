"""Samplers: schedulers of diffusers with settings that fit the training, and calls of their methods."""

import inspect
import reprlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, get_args

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from unet_diffusion.checks import is_number, require
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.network.config import needs_class

# The steps are spaced evenly from the noisiest timestep ("trailing"; Lin et al. 2024, table 2); a schedule that ends at
# zero signal needs this. The last step goes to sigma = 0: stopping at the smallest sigma of the training leaves noise
# behind. Steps even in log(sigma), Karras' steps and third order are better with exact predictors of simple
# distributions, but not with a trained network, except for Heun's method.
SOLVER = {
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"), False),
    "final_sigmas_type": "zero",
}
DPM_SOLVER = {**SOLVER, "solver_order": 2, "use_lu_lambdas": False}
SETTINGS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "dpm-solver++": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "algorithm_type": "dpmsolver++"}),
    "sde-dpm-solver++": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {**SOLVER, "solver_order": 2}),
    "heun": (HeunDiscreteScheduler, {**SOLVER, "use_exponential_sigmas": True}),  # the cosine schedule needs it
    "euler": (EulerDiscreteScheduler, SOLVER),
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}),
    "ddpm": (DDPMScheduler, {}),
    "lcm": (LCMScheduler, {"timestep_scaling": 1e4}),  # the larger, the less of the noisy image is mixed in: here none
}
NOISE_SETTINGS = {  # settings that a network is trained for, and their values for schedulers without them
    "prediction_type": "epsilon",
    **dict.fromkeys(("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")),
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
STEPS_OF_ONE_LENGTH = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler)  # wherever their timesteps lie
MEANS = 2  # steps after which an image is still near the mean of many
NOISY = 0.05  # share of the variance up to which an image may show at the first step, which gets pure noise
ALMOST_CLEAN = 0.95
OTHER_TIMES = {"use_flow_sigmas": True, "timestep_type": "continuous"}  # settings that give a network other timesteps
STEP_ARGUMENTS = {"self", "model_output", "timestep", "sample"}  # every scheduler's step gets these


def sampler(name: SamplerName, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Makes a scheduler that samples with the noise schedule and prediction type of `scheduler`.

    Args:
        name: "dpm-solver++" (Lu et al. 2022; 20 steps are enough), "sde-dpm-solver++" (the same with fresh noise in
            each step, which makes up for errors of the network as DDPM's does; 15 to 20), "unipc" (Zhao et al. 2023;
            20), "euler" and "heun" (Karras et al. 2022; heun runs the network twice a step), "ddim" (Song et al. 2020;
            50 to 100), "ddpm" (Ho et al. 2020; 1000), or, for networks that `tune-few-steps` has tuned, "lcm" (Song et
            al. 2023, algorithm 1; 1 to 4 steps, each to a clean image to which noise is added again).
        scheduler: the training's scheduler, or one made from it; it does not change.

    Raises:
        ValueError: the name is unknown, the scheduler has no noise schedule of betas, or the sampler or noise
            prediction cannot handle the noise schedule.
    """
    if name not in SETTINGS:
        raise ValueError(f"there is no sampler {name!r}; choose one of {', '.join(get_args(SamplerName))}.")
    kind, settings = SETTINGS[name]
    config = dict(scheduler.config)
    if "beta_schedule" not in config:
        raise ValueError(
            f"{type(scheduler).__name__} has no schedule of betas, so its network needs another kind of sampler; "
            "give a scheduler such as DDPMScheduler."
        )
    check_betas(scheduler)
    check_signal(scheduler)
    check_schedule(kind, config)
    known = inspect.signature(kind).parameters
    fixed = {key: value for key, value in settings.items() if key in known}
    # If the training's scheduler clips and the network predicts noise, the resulting clean image is clipped to [-1, 1]:
    # at the noisy end of the cosine schedule, an error in the noise becomes one 20,000 times larger in the image. Other
    # predictions do not have this factor, and clipping DDIM makes their images worse. Thresholding with the default
    # sample_max_value = 1 is the same clipping, see `clip_without_quantiles`. DDPM keeps the setting of the training's
    # scheduler.
    clips = config.get("clip_sample", config.get("thresholding", False)) and config.get("clip_sample_range", 1.0) == 1.0
    if name != "ddpm":
        key = "clip_sample" if "clip_sample" in known else "thresholding"
        config[key] = bool(clips and config["prediction_type"] == "epsilon")
    if name == "lcm":  # steps are spaced evenly among these, which must not be more than the timesteps
        config["original_inference_steps"] = config["num_train_timesteps"]
    config.pop("_use_default_values", None)  # otherwise from_config replaces these values by the new defaults
    made = kind.from_config(config, timestep_spacing="trailing", **fixed)
    clip_without_quantiles(made)
    return made


def check_schedule(kind: type[SchedulerMixin], config: Mapping[str, Any]) -> None:
    """Raises a ValueError if a sampler of this class cannot handle the noise schedule, or noise prediction on it."""
    ends = config.get("rescale_betas_zero_snr")
    if ends and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        raise ValueError(
            f"{kind.__name__} does not support noise schedules that end at zero signal (rescale_betas_zero_snr); "
            "use any other sampler."
        )
    noise_on_cosine = config["prediction_type"] == "epsilon" and config["beta_schedule"] == "squaredcos_cap_v2"
    if noise_on_cosine and kind is EulerDiscreteScheduler:
        raise ValueError(
            "noise prediction on the cosine schedule diverges at its noisy end without clipping, which "
            "EulerDiscreteScheduler lacks; use any other sampler."
        )


def check_betas(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError if a scheduler was given another number of betas than that of its timesteps."""
    betas, timesteps = scheduler.config.get("trained_betas"), scheduler.config.get("num_train_timesteps")
    if betas is not None and len(betas) != timesteps:
        raise ValueError(
            f"num_train_timesteps is {timesteps}, but there are {len(betas)} trained_betas, one for each timestep; set "
            f"num_train_timesteps={len(betas)}, or give {timesteps} betas."
        )


def ends_at_zero_signal(scheduler: SchedulerMixin) -> bool:
    """Returns whether nothing of the image is left at the last timestep of a scheduler's table, if it has one."""
    shares = getattr(scheduler, "alphas_cumprod", (1,))
    return bool(scheduler.config.get("rescale_betas_zero_snr")) or float(shares[-1]) == 0


def check_signal(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError if a scheduler for noise predictions ends at zero signal."""
    if scheduler.config.get("prediction_type") == "epsilon" and ends_at_zero_signal(scheduler):
        raise ValueError(
            "the noise schedule ends at zero signal, where the noise says nothing of the image, so prediction_type "
            "'epsilon' cannot be sampled; train with 'v_prediction', or without rescale_betas_zero_snr."
        )


def noise_settings(scheduler: SchedulerMixin | None) -> dict[str, Any] | None:
    """The settings of a scheduler that its network was trained for, as JSON holds them; None if it has no betas."""
    if scheduler is None:
        return None
    known = inspect.signature(type(scheduler)).parameters  # its config keeps values that the class ignores, too
    if "beta_schedule" not in known:
        return None
    settings: dict[str, Any] = {
        name: scheduler.config[name] if name in known else default for name, default in NOISE_SETTINGS.items()
    }
    betas = settings["trained_betas"]
    return {**settings, "trained_betas": None if betas is None else [float(beta) for beta in betas]}


def forward_process(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Returns the scheduler that adds noise as in the training of a sampler's network.

    The `add_noise` of some samplers depends on the steps that they took last, or does not scale the images.
    """
    settings = noise_settings(scheduler)
    return scheduler if settings is None else DDPMScheduler.from_config(settings)


def check_noise(
    scheduler: SchedulerMixin,
    trained: Mapping[str, Any] | None,
    prediction_type: str | None = None,
    left_out: Collection[str] = (),
) -> None:
    """Raises a ValueError if a scheduler's settings differ from those that the network was trained for.

    Also refused are another number of betas than that of the timesteps and, unless `prediction_type` is left out, noise
    prediction on a schedule that ends at zero signal.

    Args:
        scheduler: the sampler of a pipeline.
        trained: `noise_settings` of the scheduler that the network was trained with; None if they are not known.
        prediction_type: what the network predicts, according to its config; None if the config does not say.
        left_out: names of settings that do not matter.
    """
    kind, given = type(scheduler).__name__, noise_settings(scheduler)
    expected = {**(trained or {}), **({} if prediction_type is None else {"prediction_type": prediction_type})}
    if expected and given is None and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the scheduler is a {kind}, which has no betas, but the network was trained with {listed(expected)}, so "
            "its output would be misread; use a scheduler that has them, such as DDIMScheduler."
        )
    if given is None:  # UnCLIP's betas have no settings
        given = {"prediction_type": scheduler.config.get("prediction_type")}
    for name, value in OTHER_TIMES.items():
        allowed = not expected or scheduler.config.get(name) != value
        require(allowed, name, value, f"the network knows the timesteps of its training; leave it out of the {kind}")
    check_betas(scheduler)
    unused = {"beta_start", "beta_end"} if expected.get("beta_schedule") == "squaredcos_cap_v2" else set()
    if all(settings.get("trained_betas") is not None for settings in (given, expected)):
        unused = {"beta_schedule", "beta_start", "beta_end"}
    compared = given.keys() & expected.keys() - {*left_out, *unused}
    names = [name for name in NOISE_SETTINGS if name in compared and given[name] != expected[name]]
    if names:
        raise ValueError(
            f"the scheduler is a {kind} with {listed(given, names)}, but the network was trained with "
            f"{listed(expected, names)}, so its output would be misread. Take one with the same settings: "
            f"{kind}.from_config(pipe.scheduler.config, {listed(expected, names)}), of the pipeline of the run. "
            "If you have trained the network anew, say so: unet.register_to_config(prediction_type=...)."
        )
    if "prediction_type" not in left_out:
        check_signal(scheduler)


def listed(settings: Mapping[str, Any], names: Sequence[str] = ("prediction_type", "beta_schedule")) -> str:
    """Lists the settings of these names that exist, written as in a call; long lists are shortened."""
    return ", ".join(f"{name}={reprlib.repr(settings[name])}" for name in names if name in settings)


def check_few_steps(few_steps: int | None, scheduler: SchedulerMixin, steps: int, guidance_scale: float = 1.0) -> None:
    """Warns if a network generates in a number of steps, or with a sampler, that it was not trained for.

    Args:
        few_steps: the largest number of steps that the network was tuned for; None if it was not tuned.
        scheduler: the sampler of a pipeline.
        steps: number of steps of the sampler.
        guidance_scale: the scale of classifier-free guidance.

    Raises:
        ValueError: the network was tuned, and guidance is asked for.
    """
    rule = (
        "the network was tuned to reach one image of a class from any noise, while guidance moves the mean of all that "
        "are likely; set it to 1, or guide the run that it was tuned from"
    )
    require(few_steps is None or guidance_scale == 1, "guidance_scale", guidance_scale, rule)
    kind, jumps = type(scheduler).__name__, isinstance(scheduler, LCMScheduler)
    problem = ""
    if few_steps is None and (jumps or steps <= MEANS):
        what = f"the scheduler is {kind}" if jumps else f"num_inference_steps is {steps}"
        problem = (
            f"{what}, but the network was not tuned for a few steps, so the images are blurred or noise. Tune it: "
            "`unet-diffusion tune-few-steps --model RUN --output TUNED`, or take 20 steps of "
            'sampler("dpm-solver++", pipe.scheduler).'
        )
    elif few_steps is not None and not jumps and steps > 1:
        problem = (
            f"the scheduler is {kind} with num_inference_steps {steps}, but the network was tuned to reach one image "
            "from any noise, and such samplers expect the mean of all that are likely. Take 1 to "
            f'{few_steps} steps of sampler("lcm", pipe.scheduler), or the run that it was tuned from.'
        )
    elif few_steps is not None and steps > few_steps:
        problem = (
            f"num_inference_steps is {steps}, but the network was tuned for 1 to {few_steps} steps; take at most "
            f"{few_steps}."
        )
    if problem:
        warnings.warn(problem, stacklevel=4)  # the line that calls a pipeline


def check_scheduler(scheduler: SchedulerMixin, eta: float | None) -> None:
    """Raises a ValueError if the scheduler's `step` needs more than a prediction, or does not take the given `eta`.

    `eta` is a number from 0 to 1, or None.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise ValueError(f"{name} has no step(); use diffusers' own pipeline for it.")
    arguments = inspect.signature(scheduler.step).parameters
    needed = [key for key, value in arguments.items() if value.default is value.empty and key not in STEP_ARGUMENTS]
    if needed:
        raise ValueError(f"{name}.step also needs {', '.join(needed)}; use diffusers' own pipeline for it.")
    if eta is not None and "eta" not in arguments:
        raise ValueError(f"eta is {eta}, but {name}.step takes none; leave it out, or use DDIMScheduler.")
    valid = eta is None or (is_number(eta) and 0 <= eta <= 1)
    require(valid, "eta", eta, "must be a number from 0 to 1, or None")
    variance = scheduler.config.get("variance_type")
    learned = isinstance(variance, str) and variance.startswith("learned")
    require(not learned, "variance_type", variance, f"the network predicts no variances; leave it out of the {name}")


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Checks a number of steps, and sets the timesteps of the scheduler for it.

    It warns if they start far from noise, as those of "leading" spacing do if they are few, or do not divide those of
    the training. Pipelines start from pure noise.

    Raises:
        ValueError: there are more steps than the timesteps that the network was trained with, the scheduler cannot take
            this number, or they start at an almost clean image or at a timestep that the network does not know.
    """
    known = (noise_settings(scheduler) or {}).get("num_train_timesteps")
    if known is not None and num_inference_steps > known:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}, but the network was trained with {known} timesteps, which "
            f"cannot be divided into more steps; take {known} or fewer."
        )
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}, for which {type(scheduler).__name__} finds no timesteps "
            f"({error}); take another number, or another sampler."
        ) from error
    if hasattr(scheduler, "alphas_cumprod"):
        check_start(scheduler, num_inference_steps)


def check_start(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Warns if the first of the timesteps that are set is far from noise; a ValueError if it cannot be right."""
    shares, start = scheduler.alphas_cumprod, int(scheduler.timesteps[0])
    if scheduler.timesteps.max() > len(shares) - 1:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}, for which {type(scheduler).__name__} starts at timestep "
            f"{start}, but the network knows 0 to {len(shares) - 1}; take fewer steps, or set steps_offset to 0."
        )
    excess = float(shares[start] - shares[-1])  # the last timestep of a short training may be far from noise, too
    if excess <= NOISY:
        return
    fix = 'set timestep_spacing="trailing", as sampler("ddim", pipe.scheduler) does'
    if len(shares) % num_inference_steps:
        fix += f", or take a number of steps that divides {len(shares)}"
    problem = (
        f"num_inference_steps is {num_inference_steps}, for which {type(scheduler).__name__} starts at timestep "
        f"{start}, whose images keep {shares[start].sqrt():.0%} of their signal, but sampling starts from pure noise; "
        f"{fix}."
    )
    if excess > ALMOST_CLEAN:
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=5)  # the line that calls a pipeline


def start_sampling(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> None:
    """Sets the timesteps of a scheduler and makes it forget the steps that it took before."""
    scheduler.set_timesteps(num_inference_steps, device=device)
    drop_timestep_before_first(scheduler, num_inference_steps)
    clip_without_quantiles(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise a timestep that occurs twice would start at its second place


def drop_timestep_before_first(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Removes timestep -1 from the end of the timesteps of a scheduler whose `timestep_spacing` is "trailing".

    For some numbers of steps n, such as 61 of 1000 timesteps T, T / n is rounded down, and diffusers, which counts down
    from T to 0 in steps of T / n, adds this timestep, which no network knows.
    """
    if scheduler.config.get("timestep_spacing") != "trailing":
        return
    known = scheduler.timesteps != -1
    if known.all():
        return
    if hasattr(scheduler, "sigmas"):  # one for each timestep, and the last, 0
        levels, last = scheduler.sigmas[:-1], scheduler.sigmas[-1:]
        scheduler.sigmas = torch.cat([levels[known.to(levels.device)], last])
    scheduler.timesteps = scheduler.timesteps[known]
    scheduler.num_inference_steps = num_inference_steps


def clip_without_quantiles(scheduler: SchedulerMixin) -> None:
    """Makes a scheduler that thresholds at 1 clip clean images to [-1, 1] directly, with the same result.

    diffusers computes quantiles first, which PyTorch refuses for more than 2^24 values, and clamps them to 1.
    """
    if scheduler.config.get("thresholding") and scheduler.config.get("sample_max_value") == 1:
        scheduler._threshold_sample = clipped


def clipped(sample: Tensor) -> Tensor:
    """Clips clean images of any shape to [-1, 1]."""
    return sample.clamp(-1, 1)


def scaled_input(scheduler: SchedulerMixin, sample: Tensor, timestep: Any) -> Tensor:
    """Scales noisy images (B, C, H, W) for the network; flow-matching schedulers leave them as they are."""
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def denoised(
    scheduler: SchedulerMixin, step: int, prediction: Tensor, sample: Tensor, generator: Any, eta: float | None = None
) -> Tensor:
    """Takes `sample` (B, C, H, W) through one step of the scheduler; other arguments as for `step_arguments`."""
    arguments = step_arguments(scheduler, step, generator, eta)
    timestep = scheduler.timesteps[step]
    if not isinstance(scheduler, STEPS_OF_ONE_LENGTH):
        return scheduler.step(prediction, timestep, sample, **arguments).prev_sample
    # It goes from t to t - T // n, also where its timesteps lie further apart since n does not divide T. With the exact
    # n = T / d, it goes to t - d.
    following = scheduler.timesteps[step + 1] if step + 1 < len(scheduler.timesteps) else -1
    steps, distance = scheduler.num_inference_steps, int(timestep - following)
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, distance)
    try:
        return scheduler.step(prediction, timestep, sample, **arguments).prev_sample
    finally:
        scheduler.num_inference_steps = steps


def step_arguments(scheduler: SchedulerMixin, step: int, generator: Any, eta: float | None) -> dict[str, Any]:
    """The arguments among generator(s), eta and next timestep that the scheduler's `step` takes.

    `step` is an index into `scheduler.timesteps`; eta None leaves the scheduler's own default.
    """
    following = scheduler.timesteps[step + 1] if step + 1 < len(scheduler.timesteps) else None
    offered = {"generator": generator, "prev_timestep": following, **({} if eta is None else {"eta": eta})}
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in taken}


def check_has_classes(config: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the network of this config has classes, which class labels need."""
    if config["num_class_embeds"] is None:
        raise ValueError(
            "class_labels were given, but the network has no classes: num_class_embeds is None. Leave them out, or "
            "train a network with class_conditional."
        )


def check_classes(
    config: Mapping[str, Any],
    batch_size: int,
    class_labels: list[int] | None,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
) -> None:
    """Raises a ValueError if classes and guidance do not suit the network's config or each other."""
    classes, label_dropout = config["num_class_embeds"], config.get("label_dropout", 0)
    if class_labels is None:
        if needs_class(config):
            raise ValueError(
                "class_labels are missing and the network was trained without label dropout, so it cannot generate "
                f"without a class; pass class_labels from 0 to {classes - 1}, or train with label_dropout > 0."
            )
        require(
            guidance_scale == 1, "guidance_scale", guidance_scale, "there is no class to guide to; pass class_labels"
        )
    else:
        check_has_classes(config)
        if len(class_labels) != batch_size:
            raise ValueError(f"there are {len(class_labels)} class_labels, but batch_size is {batch_size}.")
        for label in class_labels:
            if not 0 <= label < classes:
                raise ValueError(f"class label {label} is not between 0 and {classes - 1}.")
        rule = "the null class that guidance needs was not trained; set it to 1, or train with label_dropout > 0"
        require(guidance_scale == 1 or label_dropout > 0, "guidance_scale", guidance_scale, rule)
    if guidance_interval is None:
        return
    pair = isinstance(guidance_interval, (list, tuple)) and len(guidance_interval) == 2
    valid = pair and all(map(is_number, guidance_interval)) and 0 <= guidance_interval[0] < guidance_interval[1] <= 1
    require(valid, "guidance_interval", guidance_interval, "must be two numbers, 0 <= low < high <= 1")
    rule = "guidance_scale is 1, so there is no guidance; set guidance_scale, or leave it out"
    require(guidance_scale != 1, "guidance_interval", guidance_interval, rule)
