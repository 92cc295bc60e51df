"""The U-Net: one trunk with a noise head and a segmentation head.

The path of this module, `unet_diffusion.unet`, is written into every saved pipeline; do not move the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from unet_diffusion.checks import plain, takes_plain
from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.blocks import (
    Blocks,
    BlockStyle,
    DecoderStage,
    Downsample,
    EncoderStage,
    ResidualBlock,
    Upsample,
)
from unet_diffusion.network.config import (
    INSTANCE_CHANNELS,
    check_config,
    check_input,
    check_keys,
    check_num_classes,
    check_object_channels,
    load_preset,
    output_side,
    smallest_side,
)
from unet_diffusion.network.embeddings import ConditionEmbedding
from unet_diffusion.network.own_config import OwnConfig

CACHE_LINE = 64  # bytes
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # dtypes of class labels


@dataclass
class UNetOutput(BaseOutput):
    """The output of `UNet`; a field that was not asked for is None.

    Attributes:
        sample: the noise head's prediction, (B, out_channels, H, W).
        logits: the segmentation head's scores before softmax, (B, num_classes, H, W); with `instances` in the config,
            (B, num_classes + 2, H, W), and the last two channels are boundary and distance.
        features: one map per decoder stage, finest last; `UNet.feature_info` gives channels and stride.
    """

    sample: Tensor | None = None
    logits: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


class UNet(OwnConfig, UNet2DModel, AttentionMixin, PeftAdapterMixin):
    """The U-Net of Ronneberger, Fischer and Brox (2015), also as a noise predictor (Ho et al. 2020).

    The defaults give a padded residual network that predicts noise; `from_preset("ronneberger-2015")` builds the
    network of the paper. Padded networks take any height and width from 1 pixel up.

    It derives from `UNet2DModel` and has the same calls, since pipelines of diffusers check for that class. Its layers
    and its config are its own.

    Args:
        sample_size: height and width of the images to generate, in pixels.
        in_channels: channels of the input image.
        out_channels: channels that the noise head predicts; None for no noise head.
        channels: width of each resolution, finest first; N entries make N - 1 downsamplings, and the last entry is the
            width of the bridge.
        blocks_per_stage: convolution blocks per resolution, in the encoder, the bridge and the decoder.
        attention: whether self-attention follows the blocks of each resolution, one bool per entry of `channels`;
            None: in the bridge only.
        head_channels: channels per attention head.
        block: "residual" (pre-activation with a shortcut) or "plain" (2015: convolution, activation, twice).
        norm: "group" (at least two channels per group, at most 32 groups), "batch" or "none".
        activation: "silu" or "relu".
        padding: "same" keeps the size; "valid" is the unpadded network of 2015, whose output is smaller.
        downsample: "max_pool" (2x2) or "conv" (strided).
        upsample: "transposed" (2x2, stride 2) or "nearest" (every value repeated 2x2, then a 2x2 convolution).
        dropout: share of values dropped in training: inside every residual block or, in plain networks, at the end of
            the contracting path (last encoder stage and bridge), as in 2015.
        time_embedding: "sinusoidal" for timesteps, "fourier" for continuous noise levels, None for neither.
        num_class_embeds: number of classes that generation is conditioned on, or None.
        label_dropout: probability that training replaces a class by the null class; above 0, `class_labels` is optional
            and guidance works.
        num_classes: number of classes of the segmentation head, background included; None for no head.
        segmentation_timestep: the timestep (or noise level) that segmentation runs at.
        prediction_type: what the noise head was trained to predict, as diffusers' schedulers call it: "epsilon",
            "v_prediction" or "sample"; None if it is not known. Training sets it, and the network itself does not use
            it. Pipelines refuse schedulers that interpret the prediction differently.
        instances: whether the logits have two more channels, which tell objects apart: the logit of the boundary
            (object pixels that touch background or another object), and the distance to the nearest pixel outside the
            object, divided by its largest value in the object; 0 outside objects.
        object_diameter: median diameter of the training objects, in pixels; the diameter of an object is that of a
            circle of the same area. None if it is not known. Training with `instances` sets it, and the network itself
            does not use it.
        object_min_area: the number of pixels that at least 99 % of the training objects have, or a tenth of their
            median area if that is less; None if it is not known. Training with `instances` sets it, and the network
            itself does not use it.

    Raises:
        ValueError: a value breaks a rule above; the message gives the rule and the fix.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderStage", "DecoderStage", "Blocks"]
    _repeated_blocks = ["ResidualBlock", "PlainBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    time_embed: ConditionEmbedding | Any  # each of these four is None if the config leaves it out
    noise_head: nn.Conv2d | Any
    segmentation_head: nn.Conv2d | Any
    instance_head: nn.Conv2d | Any  # beside the segmentation head, whose results do not depend on it

    @takes_plain
    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        out_channels: int | None = 3,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        blocks_per_stage: int = 1,
        attention: tuple[bool, ...] | None = None,
        head_channels: int = 32,
        block: str = "residual",
        norm: str = "group",
        activation: str = "silu",
        padding: str = "same",
        downsample: str = "max_pool",
        upsample: str = "transposed",
        dropout: float = 0.0,
        time_embedding: str | None = "sinusoidal",
        num_class_embeds: int | None = None,
        label_dropout: float = 0.0,
        num_classes: int | None = None,
        segmentation_timestep: float = 0,
        prediction_type: str | None = None,
        instances: bool = False,
        object_diameter: float | None = None,
        object_min_area: int | None = None,
    ) -> None:
        ModelMixin.__init__(self)  # UNet2DModel's own would build its layers
        check_config(self.config)
        residual = block == "residual"
        embed_dim = 4 * channels[0] if time_embedding else None
        style = BlockStyle(block, norm, activation, padding, head_channels, embed_dim)

        *finer, deepest = channels
        *attend, attend_deepest = attention or [False] * len(finer) + [True]
        inner_dropout = dropout if residual else 0.0
        dropouts = [inner_dropout] * (len(finer) - 1) + [dropout]  # the contracting path ends with the last of finer

        self.stem = style.conv(in_channels, channels[0]) if residual else nn.Identity()
        width = channels[0] if residual else in_channels  # in 2015 the first block reads the image itself
        self.time_embed = None
        if time_embedding is not None:
            self.time_embed = ConditionEmbedding(time_embedding, 4 * channels[0], num_class_embeds)

        self.encoder = nn.ModuleList()
        for wider, attends, drop in zip(finer, attend, dropouts):
            blocks = Blocks(width, wider, blocks_per_stage, attends, drop, style)
            self.encoder.append(EncoderStage(blocks, Downsample(downsample, wider, style)))
            width = wider

        self.bridge = Blocks(width, deepest, blocks_per_stage, attend_deepest, dropout, style)
        width = deepest

        self.decoder = nn.ModuleList()
        for narrower, attends in zip(reversed(finer), reversed(attend)):
            blocks = Blocks(2 * narrower, narrower, blocks_per_stage, attends, inner_dropout, style)
            self.decoder.append(DecoderStage(Upsample(upsample, width, narrower), blocks, padding == "valid"))
            width = narrower

        self.norm_out = style.make_norm(width) if residual else nn.Identity()
        self.activation_out = style.make_activation() if residual else nn.Identity()
        self.noise_head = None if out_channels is None else nn.Conv2d(width, out_channels, kernel_size=1)
        self.segmentation_head = None if num_classes is None else nn.Conv2d(width, num_classes, kernel_size=1)
        self.instance_head = nn.Conv2d(width, INSTANCE_CHANNELS, kernel_size=1) if instances else None
        self.active_head = "segmentation" if out_channels is None else "noise"  # state of this object, never saved
        self.smallest_side = smallest_side(self.config)
        self._initialise()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        return_dict: bool = True,
        *,
        head: str | None = None,
    ) -> UNetOutput | tuple[Any, ...]:
        """Runs the trunk and one head, or both.

        Args:
            sample: images in [-1, 1] or their noisy versions, (B, in_channels, H, W).
            timestep: a number or a tensor of shape (), (1,) or (B,), integer or not; None means
                `config.segmentation_timestep` and is allowed where no noise is predicted.
            class_labels: class indices, integers of any width (B,); None means the null class.
            return_dict: whether to return a `UNetOutput`; if not, a tuple of its fields that are not None.
            head: "noise", "segmentation", "both" or "features"; None: the active head.

        Raises:
            ValueError: a head that the network lacks, a size or channel count that it cannot take, a missing timestep,
                class labels where there are no classes, or class labels that are not integers.
        """
        head = head or self.active_head
        check_input(self, sample, timestep, class_labels, head)
        embedding = self._embed(timestep, class_labels, sample)  # (B, 4 * C0)
        x = self.stem(sample)  # (B, C0, H, W)

        skips = []
        for stage in self.encoder:  # stage s works at (B, C[s], H / 2**s, W / 2**s), rounded up
            x, skip = stage(x, embedding)
            skips.append(skip)

        x = self.bridge(x, embedding)  # (B, C[-1], H / 2**S, W / 2**S)

        features = []
        for stage in self.decoder:
            x = stage(x, skips.pop(), embedding)
            features.append(x)

        x = self.activation_out(self.norm_out(x))  # (B, C0, H, W)
        output = UNetOutput(
            sample=self.noise_head(x) if head in ("noise", "both") else None,
            logits=self._logits(x) if head in ("segmentation", "both") else None,
            features=tuple(features) if head == "features" else None,
        )
        return output if return_dict else output.to_tuple()

    def to_segmentation(
        self, num_classes: int | None = None, replace: bool = False, *, instances: bool | None = None
    ) -> "UNet":
        """Makes the segmentation head active, adding one if there is none, and returns the network.

        Call it before the optimizer, the moving average and `Accelerator.prepare` see the parameters.

        Args:
            num_classes: classes of the head, background included; None keeps the current head.
            replace: whether to replace a head that has another number of classes by a new one.
            instances: whether the logits have the two further channels that tell objects apart. The channels are added
                or removed; the channels of the classes stay as they are. None changes nothing, so a first segmentation
                head is without them.

        Raises:
            ValueError: there is neither a head nor `num_classes`, or the head has another number of classes.
        """
        num_classes, present = plain(num_classes), self.config.num_classes
        wanted = present if num_classes is None else num_classes
        if wanted is None:
            raise ValueError("there is no segmentation head yet; give the number of classes: to_segmentation(K).")
        if present not in (None, wanted) and not replace:
            raise ValueError(
                f"num_classes is {wanted}, but the segmentation head has {present} classes; "
                f"call to_segmentation({wanted}, replace=True) to start a new head."
            )
        check_num_classes(wanted)
        instances = self.config.instances if instances is None else plain(instances)
        check_object_channels(instances)
        if wanted != present:
            self.segmentation_head = self._new_head(wanted)
            self.register_to_config(num_classes=wanted)
        if instances != self.config.instances:
            self.instance_head = self._new_head(INSTANCE_CHANNELS) if instances else None
            self.register_to_config(instances=instances, object_diameter=None, object_min_area=None)
        self.active_head = "segmentation"
        return self

    def _new_head(self, channels: int) -> nn.Module:
        """Makes an untrained head, with the dtype and the device that the trunk computes in, not those of its storage.

        Layerwise casting and group offloading hook into the layers that were there before, but not into the head.
        """
        head = nn.Conv2d(self.channels_out, channels, kernel_size=1)
        return head.to(self.device, self.dtype).train(self.training)

    def _logits(self, x: Tensor) -> Tensor:
        """Computes the class scores, then any object channels, from the map (B, C0, H, W) that the heads read."""
        classes = self.segmentation_head(x)
        return classes if self.instance_head is None else torch.cat([classes, self.instance_head(x)], dim=1)

    def to_diffusion(self) -> "UNet":
        """Makes the noise head active again and returns the network.

        Raises:
            ValueError: the network was built without a noise head.
        """
        if self.noise_head is None:
            raise ValueError("the network has no noise head (out_channels is None), so it cannot predict noise.")
        self.active_head = "noise"
        return self

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "UNet":
        """Builds an untrained network from one of the configs that come with the package.

        Args:
            name: such as "ronneberger-2015" or "small-32".
            overrides: config values that differ from the preset's.

        Raises:
            ValueError: there is no preset or no config value of that name.
        """
        values = {**load_preset(name), **overrides}
        check_keys(values, cls._get_init_keys(cls) - {"self"})
        return cls(**values)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a network as `OwnConfig.from_pretrained` does, so that it computes bit for bit what the saved one did.

        Weights that are not safetensors are read by PyTorch's restricted unpickler, which makes tensors and calls
        nothing else; `use_safetensors=True` refuses them, and so do all commands.

        Weights that are mapped from a file may start anywhere in memory, and kernels round differently if they do not
        start at a cache line. Such weights are copied to new memory.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        unet = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        for tensor in (*unet.parameters(), *unet.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % CACHE_LINE:
                tensor.data = tensor.data.clone()
        return loaded

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compiles every convolution block as `ModelMixin.compile_repeated_blocks` does, each with its own graphs.

        The blocks of a U-Net differ in width and size, so none can use another's graph. In a shared cache they count as
        recompilations of each other, and a deep network reaches the limit. If PyTorch cannot keep the caches apart,
        raise `torch._dynamo.config.recompile_limit` to the number of blocks. Arguments as for `torch.compile`.
        """
        apart = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
        super().compile_repeated_blocks(*args, **{**apart, **kwargs})

    @property
    def channels_out(self) -> int:
        """Channels of the map that both heads read."""
        return int(self.config.channels[0])

    @property
    def stride(self) -> int:
        """Pixels of the image per pixel of the coarsest map."""
        return 2 ** (len(self.config.channels) - 1)

    @property
    def feature_info(self) -> list[dict[str, int]]:
        """Channels and stride (input pixels per feature pixel) of each map in `UNetOutput.features`."""
        finer = list(self.config.channels[:-1])
        return [{"channels": width, "stride": 2**level} for level, width in reversed(list(enumerate(finer)))]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the heads' output for an image of the given height and width."""
        return output_side(self.config, height), output_side(self.config, width)

    def _embed(self, timestep: Tensor | float | int | None, class_labels: Any, sample: Tensor) -> Any:
        if self.time_embed is None:
            return None
        if timestep is None:  # created on the device, since a copy would wait for it
            timestep = torch.full((), float(self.config.segmentation_timestep), device=sample.device)
        batch = sample.shape[0]
        timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1).expand(batch)
        if self.config.num_class_embeds is not None and class_labels is None:
            class_labels = torch.full((batch,), self.config.num_class_embeds, device=sample.device)  # the null class
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=sample.device)
            if class_labels.dtype not in LABEL_DTYPES:
                raise ValueError(f"class_labels hold {class_labels.dtype}, but must be integers, an index per image.")
            class_labels = class_labels.long()  # bytes would be taken for a mask, or refused
        return self.time_embed(timesteps, class_labels, sample.dtype)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Plain networks start as in 2015, section 3: deviation sqrt(2 / fan-in); residual branches start at zero.

        The noise head starts as any convolution. When it started at zero, as in Ho et al. 2020, no other layer had a
        gradient in the first step, and learning began late: after 50 steps on mnist-5000 at 16 pixels, the validation
        loss was 0.47 instead of 0.16. After 300 steps there was no difference at learning rate 1e-3 (0.094), but at
        2e-4 the loss was 0.21 instead of 0.115 (noise predicted, channels 16, 32, 64, batches of 32, two seeds,
        2026-11-29).
        """
        zero: list[Any] = []
        for module in (module for module in self.modules() if module is not self.noise_head):
            if self.config.block == "plain" and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                taps = 1 if isinstance(module, nn.ConvTranspose2d) else module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ResidualBlock):
                zero.append(module.conv2)
            elif isinstance(module, SelfAttention):
                zero.append(module.to_out[0])
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
