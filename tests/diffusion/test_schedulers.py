"""Every scheduler of diffusers against the one case that has a closed form: Gaussian data and the exact predictor.

Data N(m, s^2), independent per pixel, noised to x = a x0 + b e. The best prediction of the clean value is

    E[x0 | x] = m + a s^2 / (a^2 s^2 + b^2) (x - a m),

noise, velocity and flow follow from it linearly, and the samples of a right scheduler are N(m, s^2) again. Consistency
models predict the end of the probability-flow trajectory instead, m + s (x - a m) / sqrt(a^2 s^2 + b^2).

Run this file to print the table of the documentation.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from unet_diffusion import UNetOutput
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2

MEAN, STD = 0.2, 0.5
IMAGES, SIDE = 4, 64
SAMPLES = IMAGES * SIDE**2  # 16384 independent pixels
# Four standard errors of the sample mean and of the sample standard deviation of a Gaussian, plus 2 % of s for the
# finite number of steps: a scheduler used wrongly (input or noise not scaled, wrong prediction) is off by more.
SOLVER_ERROR = 0.02 * STD
MEAN_TOLERANCE = 4 * STD / SAMPLES**0.5 + SOLVER_ERROR
STD_TOLERANCE = 4 * STD / (2 * SAMPLES) ** 0.5 + SOLVER_ERROR


class GaussianPredictor(ModelMixin, ConfigMixin):
    """The exact network for N(MEAN, STD^2), in the units that a family of schedulers gives it.

    Args:
        family: how a timestep becomes the data scale a and the noise scale b, one of the methods below.
        output: what is returned.
        endpoint: whether the clean value is that of a consistency model.
        sigma_data: of schedulers that precondition the network.
        sigma_min: of consistency models, which leave an image with that noise as it is.
        alphas_cumprod: the schedule of family "vp".
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        output: str = "epsilon",
        endpoint: bool = False,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        alphas_cumprod: tuple[float, ...] = (),
        sample_size: int = SIDE,
        in_channels: int = 1,
        out_channels: int = 1,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.scales = getattr(self, family)
        alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float64)
        self.log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))
        self.parameter = torch.nn.Parameter(torch.zeros(()))  # gives the pipeline a dtype and a device

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True, head: Any = None
    ):
        assert torch.isfinite(sample).all()
        a, b = self.scales(torch.as_tensor(timestep, dtype=torch.float64))
        x = sample.double()
        variance = a**2 * STD**2 + b**2
        gain = STD / variance.sqrt() if self.config.endpoint else a * STD**2 / variance
        clean = MEAN + gain * (x - a * MEAN)
        noise = (x - a * clean) / b
        outputs: dict[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: a * noise - b * clean,
            "sample": lambda: clean,
            "flow": lambda: noise - clean,
            "reverse_flow": lambda: clean - noise,
            "preconditioned": lambda: self.invert_preconditioning(clean, x, a, b),
        }
        return UNetOutput(sample=outputs[self.config.output]().float())

    def invert_preconditioning(self, clean: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """F of D(x) = c_skip x + c_out F (Karras et al. 2022, table 1; Song et al. 2023, appendix C); a is c_in."""
        sigma, sigma_data = b / a, self.config.sigma_data
        above = sigma - self.config.sigma_min
        c_skip = sigma_data**2 / (above**2 + sigma_data**2)
        c_out = above * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (clean - c_skip * x / a) / c_out

    def vp(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a^2 + b^2 = 1 with a^2 = alphas_cumprod[t]; between timesteps the logarithm of the SNR is interpolated."""
        last = len(self.log_snr) - 1
        below = timestep.floor().clamp(0, last).long()
        above = (below + 1).clamp(max=last)
        log_snr = torch.lerp(self.log_snr[below], self.log_snr[above], timestep - below)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def edm(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep log(sigma) / 4, input scaled by c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return self.input_scale((4 * timestep).exp())

    def cosine(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep 2 atan(sigma) / pi, input scaled by c_in."""
        return self.input_scale((timestep * math.pi / 2).tan())

    def karras_consistency(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep 250 log(sigma), input scaled by c_in (Song et al. 2023, appendix C)."""
        return self.input_scale((timestep / 250).exp())

    def input_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_in = 1 / (sigma**2 + self.config.sigma_data**2).sqrt()
        return c_in, c_in * sigma

    def angle(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a = cos, b = sin of a quarter turn times the timestep."""
        return (timestep * math.pi / 2).cos(), (timestep * math.pi / 2).sin()

    def flow(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """b = timestep / 1000, a = 1 - b."""
        return 1 - timestep / 1000, timestep / 1000

    def reverse_flow(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a = timestep, b = 1 - a."""
        return timestep, 1 - timestep


@dataclass(frozen=True)
class Case:
    """The settings and the network of a scheduler, and enough steps for the order of its solver."""

    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    family: str = "vp"
    network: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    eta: float | None = None


TWO = ("epsilon", "v_prediction")
FLOW = {"predictions": ("flow",), "family": "flow", "remark": "flow-matching network"}
CASES = {
    "CMStochasticIterativeScheduler": Case(
        4,
        {"clip_denoised": False},
        ("preconditioned",),
        "karras_consistency",
        {"endpoint": True, "sigma_min": 0.002},
        "consistency model",
    ),
    "CogVideoXDDIMScheduler": Case(250),
    "CosineDPMSolverMultistepScheduler": Case(
        100,
        {"prediction_type": "epsilon", "sigma_min": 0.01},  # the default 0.3 is for audio
        ("preconditioned",),
        "cosine",
        {"sigma_data": 1.0},
        "EDM network; needs torchsde",
    ),
    "DDIMParallelScheduler": Case(250),
    "DDIMScheduler": Case(250),
    "DDPMParallelScheduler": Case(500, predictions=("epsilon",)),
    "DDPMScheduler": Case(500),
    "DEISMultistepScheduler": Case(50),
    "DPMSolverMultistepScheduler": Case(50),
    "DPMSolverSDEScheduler": Case(
        50, {"noise_sampler_seed": 0}, TWO, remark="needs torchsde; noise from `noise_sampler_seed`"
    ),
    "DPMSolverSinglestepScheduler": Case(50, {"lower_order_final": True}),
    "EDMDPMSolverMultistepScheduler": Case(50, {}, ("preconditioned",), "edm", remark="EDM network"),
    "EDMEulerScheduler": Case(250, {}, ("preconditioned",), "edm", remark="EDM network"),
    "EulerAncestralDiscreteScheduler": Case(250, predictions=TWO),
    "EulerDiscreteScheduler": Case(250),
    "FlowMapEulerDiscreteScheduler": Case(250, **FLOW),
    "FlowMatchEulerDiscreteScheduler": Case(250, **FLOW),
    "FlowMatchHeunDiscreteScheduler": Case(50, **FLOW),
    "FlowMatchLCMScheduler": Case(
        4, {}, ("flow",), "flow", {"endpoint": True}, "consistency model distilled from a flow-matching network"
    ),
    "HeunDiscreteScheduler": Case(50, predictions=TWO),
    "IPNDMScheduler": Case(50, {}, ("v_prediction",), "angle", remark="velocity predictor in continuous time"),
    "KDPM2AncestralDiscreteScheduler": Case(100, predictions=TWO),
    "KDPM2DiscreteScheduler": Case(50, predictions=TWO),
    "LCMScheduler": Case(4, network={"endpoint": True}, remark="consistency model"),
    "LMSDiscreteScheduler": Case(50),
    "LTXEulerAncestralRFScheduler": Case(250, **FLOW),
    "MiniMaxH3Scheduler": Case(250, {"shift": 1.0}, ("reverse_flow",), "reverse_flow", remark="flow-matching network"),
    "PNDMScheduler": Case(50, predictions=TWO),
    "SASolverScheduler": Case(50),
    "TCDScheduler": Case(
        250, {"original_inference_steps": 250}, eta=0.0, remark="with `eta=0`; else only distilled networks"
    ),
    "UnCLIPScheduler": Case(250, predictions=("epsilon", "sample")),
    "UniPCMultistepScheduler": Case(50),
}
TOKENS = "samples discrete tokens, not images"
NOT_APPLICABLE = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CogVideoXDPMScheduler": "`step` also needs the last prediction; only CogVideoX's pipelines call it so",
    "ConsistencyDecoderScheduler": "part of an image decoder",
    "DDIMInverseScheduler": "goes from images to noise",
    "DDPMWuerstchenScheduler": "takes one timestep per image, of Würstchen's own network",
    "DPMSolverMultistepInverseScheduler": "goes from images to noise",
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": "generates videos in stages of growing resolution",
    "HeliosScheduler": "generates videos in stages of growing resolution",
    "KarrasVeScheduler": "withdrawn by diffusers",
    "PiflowScheduler": "needs a network with ten predictions per channel",
    "RFD4ProteinaScheduler": "generates proteins",
    "RePaintScheduler": "fills in a masked image, from predicted noise only; see [inpainting](diffusers.md#inpainting)",
    "SCMScheduler": "needs a TrigFlow network and the loop of its own pipelines",
    "ScoreSdeVeScheduler": "has no `step`; use `ScoreSdeVePipeline`",
    "ScoreSdeVpScheduler": "withdrawn by diffusers",
    "VQDiffusionScheduler": TOKENS,
}


@dataclass(frozen=True)
class Result:
    mean: float
    std: float

    @property
    def right(self) -> bool:
        return abs(self.mean - MEAN) < MEAN_TOLERANCE and abs(self.std - STD) < STD_TOLERANCE


def available(name: str) -> bool:
    """Returns whether the scheduler's extra libraries are installed; otherwise diffusers has a placeholder for it."""
    return "_backends" not in vars(getattr(diffusers.schedulers, name))


def pipeline(name: str, prediction: str) -> ImageGenerationPipeline:
    """The scheduler with the exact network for it."""
    case, kind = CASES[name], getattr(diffusers.schedulers, name)
    shared = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "prediction_type": prediction}
    offered = {**(shared if case.family == "vp" else {}), **case.settings}
    known = inspect.signature(kind).parameters
    scheduler = kind(**{key: value for key, value in offered.items() if key in known})
    schedule = {"alphas_cumprod": tuple(scheduler.alphas_cumprod.tolist())} if case.family == "vp" else {}
    pipe = ImageGenerationPipeline(GaussianPredictor(case.family, prediction, **case.network, **schedule), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def result(name: str, prediction: str) -> Result:
    """Mean and standard deviation of the samples that our pipeline makes."""
    pipe = pipeline(name, prediction)
    generator = torch.Generator().manual_seed(0)
    images = pipe(IMAGES, CASES[name].steps, generator=generator, eta=CASES[name].eta, output_type="latent").images
    return Result(images.mean().item(), images.std().item())


def scheduler_table() -> str:
    """The table of the documentation, in Markdown."""
    rows = ["| Scheduler | Verdict | Prediction | Steps | Mean | Std | Remark |", "|" + " --- |" * 7]
    for name in sorted({**CASES, **NOT_APPLICABLE}):
        if name in NOT_APPLICABLE:
            rows.append(f"| `{name}` | not applicable | | | | | {NOT_APPLICABLE[name]} |")
            continue
        case = CASES[name]
        results = [result(name, prediction) for prediction in case.predictions] if available(name) else []
        verdict = "not tried" if not results else "right" if all(r.right for r in results) else "WRONG"
        means, stds = (", ".join(f"{getattr(r, key):.3f}" for r in results) for key in ("mean", "std"))
        predictions = ", ".join(case.predictions)
        rows.append(f"| `{name}` | {verdict} | {predictions} | {case.steps} | {means} | {stds} | {case.remark} |")
    return "\n".join(rows)


def test_every_scheduler_of_diffusers_is_classified_once():
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert names <= {*CASES, *NOT_APPLICABLE}
    assert not set(CASES) & set(NOT_APPLICABLE)


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # a warning of torchsde about rounding
@pytest.mark.parametrize(("name", "prediction"), [(name, p) for name, case in CASES.items() for p in case.predictions])
def test_gaussian_comes_back_from_its_exact_predictor(name, prediction):
    if not available(name):
        pytest.skip(f"{name} needs a package that is not installed")
    found = result(name, prediction)
    assert found.mean == pytest.approx(MEAN, abs=MEAN_TOLERANCE)
    assert found.std == pytest.approx(STD, abs=STD_TOLERANCE)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_samplers_need_no_more_steps_than_they_are_said_to(name, beta_schedule):
    training = DDPMScheduler(prediction_type="v_prediction", beta_schedule=beta_schedule, clip_sample=False)
    tuned, abar = name == "lcm", tuple(training.alphas_cumprod.tolist())
    unet = GaussianPredictor("vp", "v_prediction", endpoint=tuned, alphas_cumprod=abar)
    pipe = ImageGenerationPipeline(unet, sampler(name, training), few_steps=4 if tuned else None)
    pipe.set_progress_bar_config(disable=True)
    steps = {"ddpm": 250, "ddim": 100, "euler": 100, "lcm": 1}.get(name, 20)
    images = pipe(IMAGES, steps, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert images.mean().item() == pytest.approx(MEAN, abs=MEAN_TOLERANCE)
    assert images.std().item() == pytest.approx(STD, abs=STD_TOLERANCE + 0.04 * STD)  # so few steps are 5 % off


def generated(name: str, steps: int, prediction: str = "epsilon", **arguments: Any) -> Result:
    """Mean and deviation of the samples of one of our samplers with the exact predictor."""
    training = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    unet = GaussianPredictor("vp", prediction, alphas_cumprod=tuple(training.alphas_cumprod.tolist()))
    pipe = ImageGenerationPipeline(unet, sampler(name, training))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(IMAGES, steps, generator=generator, output_type="latent", **arguments).images
    return Result(images.mean().item(), images.std().item())


@pytest.mark.parametrize("name", [name for name in get_args(SamplerName) if name != "lcm"])
def test_a_step_more_changes_little_where_diffusers_counts_down_to_timestep_minus_one(name):
    """With 61 steps, 1000 / 61 is rounded down, and the network would be asked for timestep -1."""
    affected, other = generated(name, 61), generated(name, 60)
    assert affected.mean == pytest.approx(other.mean, abs=0.01 * STD)
    assert affected.std == pytest.approx(other.std, abs=0.02 * STD)


@pytest.mark.parametrize(
    ("steps", "prediction", "arguments"),
    [(300, "epsilon", {}), (501, "epsilon", {}), (501, "v_prediction", {}), (300, "sample", {"eta": 1.0})],
)
def test_ddim_goes_to_its_next_timestep_also_if_its_steps_do_not_divide_the_training_timesteps(
    steps, prediction, arguments
):
    found = generated("ddim", steps, prediction, **arguments)
    assert found.mean == pytest.approx(MEAN, abs=MEAN_TOLERANCE)
    assert found.std == pytest.approx(STD, abs=STD_TOLERANCE)


@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "RePaintScheduler", "ScoreSdeVeScheduler"])
def test_scheduler_that_needs_another_loop_is_refused(name):
    pipe = ImageGenerationPipeline(GaussianPredictor("flow"), getattr(diffusers.schedulers, name)())
    with pytest.raises(ValueError, match=f"{name}.*use diffusers' own pipeline for it"):
        pipe()


if __name__ == "__main__":
    print(scheduler_table())
