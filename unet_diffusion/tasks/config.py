"""The options of the tasks, which need neither torch nor diffusers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from unet_diffusion.checks import is_count, is_number, require, require_choice, require_each, set_plain
from unet_diffusion.diffusion.config import PredictionType, check_condition_noise, check_scale
from unet_diffusion.network.config import check_recipe
from unet_diffusion.unused_options import check_used

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
LossName = Literal["cross_entropy", "dice", "both"]
TuningMethod = Literal["distillation", "consistency"]
LearningPart = Literal["everything", "decoder", "head", "pixel_classifier"]
RECIPES: dict[str | None, dict[str, Any]] = {
    # Ho et al. 2020, sections 3.4 and 4
    "ddpm": {"prediction_type": "epsilon", "min_snr_gamma": None, "beta_schedule": "linear"},
    None: {"prediction_type": "v_prediction", "min_snr_gamma": 5.0, "beta_schedule": "squaredcos_cap_v2"},
}


@dataclass
class DiffusionConfig:
    """The prediction of the network, and how noise is added."""

    recipe: Literal["ddpm"] | None = None
    """"ddpm" is the classic recipe: predict the noise, weight all timesteps equally, use linear betas. It sets the next
    three options where they are "auto", and no other values go with it."""
    prediction_type: PredictionType | Literal["auto"] = "auto"
    """"epsilon" (the noise, as in DDPM), "v_prediction" or "sample" (the clean image); "auto" is "v_prediction" without
    a recipe."""
    min_snr_gamma: float | Literal["auto"] | None = "auto"
    """Gamma of the Min-SNR weights of the timesteps; None weights them equally, as in DDPM; "auto" is 5 without a
    recipe. With zero_terminal_snr, the weights of the noisiest timesteps do not go to 0."""
    beta_schedule: BetaSchedule | Literal["auto"] = "auto"
    """"linear" (DDPM), "scaled_linear" or "squaredcos_cap_v2" (the cosine schedule), which is "auto" without a
    recipe."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2023); needs v_prediction or sample."""
    num_train_timesteps: int = 1000
    """Timesteps of the forward process."""
    class_conditional: bool = False
    """Condition on the class labels of the data."""
    label_dropout: float = 0.1
    """With class_conditional, share of the labels replaced by "no class" in training; guidance needs this."""
    validation_images: int = 256
    """Held-out images for the validation loss, each with a fixed timestep and fixed noise."""
    preview_images: int = 36
    """Images in a preview and in the model card."""

    def __post_init__(self) -> None:
        set_plain(self)
        require_choice("recipe", self.recipe, tuple(RECIPES))
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) == "auto":
                setattr(self, name, value)
        require_choice("prediction_type", self.prediction_type, get_args(PredictionType))
        require_choice("beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        gamma, dropout = self.min_snr_gamma, self.label_dropout
        positive = gamma is None or (not isinstance(gamma, str) and is_number(gamma) and gamma > 0)
        require(positive, "min_snr_gamma", gamma, "must be above 0, or None for equal weights")
        require(is_number(dropout) and 0 <= dropout < 1, "label_dropout", dropout, "must be at least 0 and below 1")
        counts = ("num_train_timesteps", "validation_images", "preview_images")
        require_each(self, counts, is_count, "must be an integer of at least 1")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr is set and prediction_type is 'epsilon', but pure noise says nothing about the "
                "image; use prediction_type='v_prediction'."
            )
        check_used(self, **({} if self.recipe is None else {"settings": RECIPES[self.recipe]}))

    def make_scheduler(self) -> "DDPMScheduler":
        """Returns the forward process as a diffusers scheduler, which is saved with the run."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_terminal_snr,
            timestep_spacing="trailing" if self.zero_terminal_snr else "leading",
        )


@dataclass
class FewStepsConfig:
    """How a run is tuned to generate in a few steps."""

    method: TuningMethod = "distillation"
    """"distillation" learns the images that the run itself reaches in 8 evaluations from the same noise; in the last
    third of the steps it learns to make its images as likely as the data (DMD). "consistency" (ECT) learns to give the
    same image from all noise levels."""
    stages: int = 8
    """Stages of consistency tuning, all of equal length. From stage to stage the compared noise levels move closer by
    the same factor, until they are a 256th apart in the last; the paper (ECT) has 8, 4 and, for short tunings, 1."""

    def __post_init__(self) -> None:
        set_plain(self)
        require_choice("method", self.method, get_args(TuningMethod))
        require(is_count(self.stages), "stages", self.stages, "must be an integer of at least 1")
        check_used(self)


@dataclass
class SuperResolutionConfig:
    """The size of the images that the network learns to enlarge."""

    scale: int | None = None
    """With task "super-resolution", the factor by which each side of an image grows: 2, 4 or any integer above 1."""
    condition_noise: float = 0.05
    """Highest standard deviation of the noise that training adds to the enlarged small image (values from -1 to 1); the
    deviation is drawn for each image. The network then copes with images that differ a little from the training images,
    such as compressed ones. 0 adds none."""

    def __post_init__(self) -> None:
        set_plain(self)
        if self.scale is not None:
            check_scale(self.scale)
        check_condition_noise(self.condition_noise)


@dataclass
class SegmentationConfig:
    """The segmentation loss, the part of the network that learns, and when to stop."""

    loss: LossName = "cross_entropy"
    """Pixel-wise softmax cross-entropy (2015), soft Dice, or "both" (their sum)."""
    balance_classes: bool = False
    """Weight classes in the cross-entropy by the inverse of their share of the training pixels."""
    instances: bool = False
    """Learn objects too: their boundaries, and how deep in its object each pixel lies, from instance maps or, without
    instance maps, from the connected components of each class. Objects that touch then stay whole in the masks."""
    learn: LearningPart = "everything"
    """The part that learns: "everything", the "decoder" with the segmentation head, or the "head" alone; the rest is
    frozen. Or a "pixel_classifier" on features of the frozen network of a DDPM run, for a handful of masks."""
    trunk_rate: float = 1.0
    """Learning rate of everything but the segmentation head, as a share of learning_rate; values below 1 change
    pretrained weights less."""
    timestep: float | None = None
    """Timestep that the network gets while it segments; by default the network's own (0 for networks made here)."""
    patience: int | None = None
    """Stop after this many validations in a row without a higher mean IoU; by default the run goes to its last
    step."""
    preview_images: int = 12
    """Validation images in a preview."""

    def __post_init__(self) -> None:
        set_plain(self)
        require_choice("loss", self.loss, get_args(LossName))
        require_choice("learn", self.learn, get_args(LearningPart))
        rate, rule = self.trunk_rate, "must be above 0 and at most 1; to freeze the trunk, set learn='head'"
        require(is_number(rate) and 0 < rate <= 1, "trunk_rate", rate, rule)
        require_each(self, ("patience", "preview_images"), is_count, "must be an integer of at least 1")
        check_used(self)


@dataclass
class FrozenFeaturesConfig:
    """The features of the noise predictor that a pixel classifier reads, and how wide it is."""

    timesteps: tuple[int, ...] = (50, 150, 250)
    """Timesteps whose noise is added to the image, one network pass each; by default those of Baranchuk et al. 2022,
    out of 1000."""
    stages: tuple[int, ...] | None = None
    """Stages of the decoder, 0 the coarsest; by default all."""
    hidden: tuple[int, ...] = (128, 32)
    """Widths of the classifier's hidden layers."""

    def __post_init__(self) -> None:
        """Checks every value; those that depend on the network are checked when it is known."""
        set_plain(self)
        check_recipe(self.timesteps, self.hidden, self.stages)


@dataclass
class JointConfig:
    """Which images without masks are used besides those with masks, and what the network learns from them."""

    denoising_weight: float = 0.0
    """Weight of the noise-prediction loss. Above 0, every step also predicts the noise of as many images without
    masks, so that the network learns from them and can generate images too."""
    self_training_weight: float | None = None
    """Weight of the loss against the network's own masks. Above 0, every step after the first tenth also learns from
    as many images without masks, wherever the network is sure of their classes. By default 0 if there are no such
    images (unlabelled, or images of `data` that max_labels leaves without a mask); else 1 for up to 10 images with
    masks, and 10 divided by their number for more."""
    confidence: float = 0.9
    """In self-training, the probability of a class from which on the network counts as sure."""
    unlabelled: str | None = None
    """Images without masks, given like `data`, of the split `train`; by default all of `data`, including the images
    beyond max_labels. Images held out for validation are left out."""

    def __post_init__(self) -> None:
        set_plain(self)
        weights = ("denoising_weight", "self_training_weight")
        rule = "must be a number of at least 0"
        require_each(self, weights, lambda weight: is_number(weight) and weight >= 0, rule)
        valid = is_number(self.confidence) and 0 < self.confidence < 1
        require(valid, "confidence", self.confidence, "must be a probability above 0 and below 1")
        check_used(self)

    @property
    def needs_images(self) -> bool:
        """Returns whether the network learns from images without masks; a weight that is None counts as 0."""
        return max(self.denoising_weight, self.self_training_weight or 0) > 0
