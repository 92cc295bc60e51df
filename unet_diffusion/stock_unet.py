"""A `UNet2DModel` of diffusers as a `UNet`: its trunk and noise head, and a segmentation head.

The stock blocks take the places of the blocks of `UNet`. So `UNet.forward` runs them, and a `UNet2DAdapter` works
wherever a `UNet` does. Only the skips differ: the stock decoder takes one skip per residual block and one for the input
of the stage. So an encoder stage hands over all of them as one tuple.

The path of this module, `unet_diffusion.stock_unet`, is written into saved pipelines; do not move the class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.checks import require_choice, takes_plain
from unet_diffusion.network.attention import WITHOUT_LORA
from unet_diffusion.network.config import (
    CHOICES,
    check_input,
    check_keys,
    check_object_channels,
    check_segmentation_timestep,
)
from unet_diffusion.network.feature_maps import mirrored
from unet_diffusion.unet import UNet, UNetOutput

STOCK_KEYS = UNet2DModel._get_init_keys(UNet2DModel) - {"self"}
OWN_KEYS = {
    "num_classes",
    "segmentation_timestep",
    "prediction_type",
    "instances",
    "object_diameter",
    "object_min_area",
}
UNET_KEYS = {"channels", "attention", "padding", "time_embedding", "label_dropout"}  # keys that repeat the stock config
ADAPTED = ".base_layer."  # in the names of weights that have an adapter beside them
TRUNK_BLOCKS = {  # blocks whose only path from image to prediction is the trunk
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


class UNet2DAdapter(UNet):
    """A stock `UNet2DModel`, such as the `google/ddpm-*` checkpoints, with the heads and methods of `UNet`.

    Noise prediction equals that of the stock model bit for bit, at the sizes that it takes: multiples of its stride.
    Other sizes raise an error, since the noise beyond the border would have to be made up. Masks and features can have
    any size: the image is extended to the next multiple by its mirror image, and the maps are cut.

    A class-conditional stock model has no null class, so noise prediction needs `class_labels`. Masks do not: the mean
    of the embeddings of all classes stands for "no class". In training, the index after the last class means the same,
    as in a `UNet`.

    Args:
        num_classes: number of classes of the segmentation head, background included; None for no head.
        segmentation_timestep: the timestep (or noise level) that segmentation runs at.
        prediction_type: what the noise head was trained to predict, as for `UNet`; None if it is not known.
        instances: whether the logits have the two channels that tell objects apart, as for `UNet`.
        object_diameter: median diameter of the training objects, in pixels, as for `UNet`; None if it is not known.
        object_min_area: least area of the training objects, in pixels, as for `UNet`; None if it is not known.
        stock: config values of the `UNet2DModel`; other values are that class's defaults.

    Raises:
        ValueError: a value breaks a rule above, blocks are not those of a plain U-Net, or classes are not given by an
            index; the message gives the rule and the fix.
    """

    _no_split_modules = ["StockEncoderStage", "UNetMidBlock2D", "StockDecoderStage"]
    _repeated_blocks = ["ResnetBlock2D", "Attention"]

    bridge: Any  # the stock middle block, or `NoBridge`

    @takes_plain
    def __init__(
        self,
        num_classes: int | None = None,
        segmentation_timestep: float = 0,
        prediction_type: str | None = None,
        instances: bool = False,
        object_diameter: float | None = None,
        object_min_area: int | None = None,
        **stock: Any,
    ) -> None:
        ModelMixin.__init__(self)  # `UNet`'s own would build its blocks
        check_keys(stock, STOCK_KEYS)
        check_object_channels(instances, object_diameter, object_min_area)
        if instances and num_classes is None:
            raise ValueError("instances is True, but needs a segmentation head; set num_classes too.")
        model = UNet2DModel(**stock)
        config = {key: model.config[key] for key in STOCK_KEYS}
        check_stock(config)
        check_segmentation_timestep(segmentation_timestep)
        require_choice("prediction_type", prediction_type, CHOICES["prediction_type"])
        self.register_to_config(
            **config,
            **unet_config(config),
            num_classes=None,
            segmentation_timestep=segmentation_timestep,
            prediction_type=prediction_type,
            instances=False,
            object_diameter=None,
            object_min_area=None,
        )
        self.stem = model.conv_in
        self.time_embed = StockEmbedding(model)
        self.encoder = nn.ModuleList(StockEncoderStage(block) for block in model.down_blocks)
        self.bridge = NoBridge() if model.mid_block is None else model.mid_block
        self.decoder = nn.ModuleList(StockDecoderStage(block) for block in model.up_blocks)
        self.norm_out, self.activation_out = model.conv_norm_out, model.conv_act
        self.noise_head, self.segmentation_head, self.instance_head = model.conv_out, None, None
        if num_classes is not None:
            self.to_segmentation(num_classes, instances=instances)
            self.register_to_config(object_diameter=object_diameter, object_min_area=object_min_area)
        self.active_head = "noise"
        self.smallest_side = 1

    @classmethod
    def from_stock(cls, stock: UNet2DModel) -> "UNet2DAdapter":
        """Makes the adapter of a stock model, with a copy of its weights.

        Raises:
            ValueError: the model is not a plain U-Net, is not a `UNet2DModel` of diffusers itself, or has weights that
                such a model gets later, such as those of LoRA.
        """
        if not isinstance(stock, UNet2DModel) or isinstance(stock, UNet):
            fix = "use it as it is" if isinstance(stock, UNet) else "use another checkpoint"
            raise ValueError(f"the model is a {type(stock).__name__}, but must be a UNet2DModel of diffusers; {fix}.")
        adapter = cls(**{key: stock.config[key] for key in STOCK_KEYS})
        weights = copied(stock.state_dict(), adapter._names())
        if more := sorted(weights.keys() - adapter.state_dict().keys()):
            raise ValueError(
                f"the model has {len(more)} weights that a UNet2DModel lacks, such as {more[0]}, perhaps of LoRA or of "
                "fused projections; load it again, and change the adapter instead."
            )
        adapter.load_state_dict(weights, assign=True)
        return adapter.train(stock.training)

    def to_stock(self) -> UNet2DModel:
        """Makes the stock model with copies of the weights of trunk and noise head, without the segmentation head.

        Raises:
            ValueError: the network has an adapter, such as LoRA.
        """
        if any(ADAPTED in name for name in self.state_dict()):
            raise ValueError(f"the network has an adapter, such as LoRA, which a UNet2DModel lacks; {WITHOUT_LORA}.")
        stock = UNet2DModel(**{key: self.config[key] for key in STOCK_KEYS})
        back = [(theirs, ours) for ours, theirs in self._names()]
        stock.load_state_dict(copied(self.state_dict(), back), assign=True)
        return stock.train(self.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        return_dict: bool = True,
        *,
        head: str | None = None,
    ) -> UNetOutput | tuple[Any, ...]:
        """Runs the trunk and one head, or both, as `UNet.forward` does.

        Raises:
            ValueError: as for `UNet.forward`; also if the stock model cannot predict noise at this size, or there is no
                noise level for a network that takes its logarithm.
        """
        head = head or self.active_head
        predicts_noise = head in ("noise", "both")
        if class_labels is None and not predicts_noise and self.config.num_class_embeds is not None:
            class_labels = torch.full(sample.shape[:1], self.config.num_class_embeds, device=sample.device)
        check_input(self, sample, timestep, class_labels, head)
        self._check_stock_input(sample, timestep, head)
        if not predicts_noise:
            given = extended(sample, self.stride)
        else:  # a stock model may ask for values in [0, 1], but its trunk always gets [-1, 1]
            given = 2 * sample - 1 if self.config.center_input_sample else sample
        output: Any = super().forward(given, timestep, class_labels, head=head)
        size = sample.shape[2:]
        if head == "features":
            maps = zip(output.features, self.feature_info)
            output = UNetOutput(features=tuple(cut(x, size, info["stride"]) for x, info in maps))
        elif head == "segmentation":
            output = UNetOutput(logits=cut(output.logits, size))
        elif self.config.time_embedding_type == "fourier":  # the stock model ends by dividing by the noise level
            level = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1, 1, 1, 1)
            output = UNetOutput(sample=(output.sample / level).to(sample.dtype), logits=output.logits)
        return output if return_dict else output.to_tuple()

    @property
    def feature_info(self) -> list[dict[str, int]]:
        """Channels and stride of each map in `UNetOutput.features`; a stock stage ends with its upsampling."""
        strides = [2**level for level in reversed(range(len(self.config.channels) - 1))] + [1]
        return [{"channels": c, "stride": s} for c, s in zip(reversed(self.config.channels), strides)]

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        """Returns the keys of the config, which `ConfigMixin` would take from the signature."""
        return STOCK_KEYS | OWN_KEYS | {"self"}

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Leaves out the keys that only repeat the stock config, then calls `OwnConfig.extract_init_dict`.

        Raises:
            ValueError: the config names another class, such as `UNet2DModel`, whose weights have other names.
        """
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in UNET_KEYS}, **kwargs)

    def _names(self) -> list[tuple[str, str]]:
        """Returns pairs of prefixes of weight names: in the stock model, and here."""
        return [
            ("conv_in.", "stem."),
            ("time_", "time_embed.time_"),
            ("class_", "time_embed.class_"),
            *((f"down_blocks.{i}.", f"encoder.{i}.block.") for i in range(len(self.encoder))),
            ("mid_block.", "bridge."),
            *((f"up_blocks.{i}.", f"decoder.{i}.block.") for i in range(len(self.decoder))),
            ("conv_norm_out.", "norm_out."),
            ("conv_out.", "noise_head."),
        ]

    def _check_stock_input(self, sample: Tensor, timestep: Any, head: str) -> None:
        height, width = sample.shape[2:]
        if head in ("noise", "both") and (height % self.stride or width % self.stride):
            raise ValueError(
                f"sample is {height}x{width} and head {head!r}, but this network predicts noise at multiples of "
                f"{self.stride} pixels only; resize or crop it. Masks and features come at any size."
            )
        if timestep is None and self.config.time_embedding == "fourier" and self.config.segmentation_timestep == 0:
            raise ValueError(
                "segmentation_timestep is 0, but this network takes the logarithm of a noise level; set it to a small "
                "level, such as 0.01, or pass a timestep."
            )


class StockEmbedding(nn.Module):
    """Timestep and class as one vector, computed as in `UNet2DModel.forward`, with a null class added."""

    def __init__(self, model: UNet2DModel) -> None:
        super().__init__()
        self.time_proj, self.time_embedding = model.time_proj, model.time_embedding
        self.class_embedding: Any = model.class_embedding

    def forward(self, timestep: Tensor, class_labels: Any, dtype: torch.dtype) -> Tensor:
        """Timesteps (B,) and class indices int64 (B,) to an embedding (B, D).

        The index after the last is the null class. PyTorch refuses other indices.
        """
        if isinstance(self.time_proj, nn.Embedding):
            timestep = timestep.long()
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype))
        if self.class_embedding is None:
            return embedding
        classes = torch.arange(self.class_embedding.num_embeddings, device=embedding.device)
        rows = self.class_embedding(classes)  # calls the layer, since offloading and 8-bit storage hook into it
        rows = torch.cat([rows, rows.mean(dim=0, keepdim=True)])
        return embedding + F.embedding(class_labels, rows).to(dtype)


class StockEncoderStage(nn.Module):
    """A stock encoder stage: residual blocks, and a downsampling except in the coarsest stage.

    Its skips include the stage's input, but not its output.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map (B, C, h, w) to the next stage's map, and the maps for the decoder, all of height h and width w."""
        lower, maps = self.block(x, embedding)
        return lower, (x, *maps[: len(self.block.resnets)])


class StockDecoderStage(nn.Module):
    """A stock decoder stage: residual blocks, which take a skip each, and an upsampling except in the finest stage."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
        """Map (B, C, h, w) and the skips of the encoder stage, last first, to the next stage's map."""
        learns = torch.is_grad_enabled() and self.block.resnets[0].norm1.weight.requires_grad
        if learns and not x.requires_grad:  # behind a frozen encoder, PyTorch 2.13 crashes on a CPU in the backward
            x = x.contiguous()  # pass of GroupNorm if maps are channels_last, as attention makes them
        return self.block(x, skips, embedding)


class NoBridge(nn.Module):
    """The bridge of a stock model without a middle block: the identity."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The map (B, C, h, w) as it is."""
        return x


def unet_config(stock: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `UNet` config that training, tiling and pipelines read, from the config of a stock model."""
    stages = zip(stock["down_block_types"], reversed(stock["up_block_types"]))  # finest first
    attention = [any("Attn" in kind for kind in kinds) for kinds in stages]
    attention[-1] |= stock["mid_block_type"] is not None and stock["add_attention"]
    time_embedding = stock["time_embedding_type"]
    return {
        "channels": list(stock["block_out_channels"]),
        "attention": attention,
        "padding": "same",
        "time_embedding": "sinusoidal" if time_embedding == "positional" else time_embedding,
        "label_dropout": 0.0,
    }


def check_stock(config: Mapping[str, Any]) -> None:
    """Raises a ValueError for a stock model that is not a plain U-Net."""
    for key, known in TRUNK_BLOCKS.items():
        for kind in config[key]:
            if kind not in known:
                raise ValueError(
                    f"{key} has {kind!r}, but all of the prediction must come from one trunk, as in a network of "
                    f"{', '.join(known)}; use another checkpoint."
                )
    if config["class_embed_type"] is not None:
        raise ValueError(
            f"class_embed_type is {config['class_embed_type']!r}, but classes must be given by an index (None); "
            "use another checkpoint."
        )


def copied(weights: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Returns copies of the weights that the other network also has, under that network's names."""
    return {
        new + name.removeprefix(old): tensor.clone()
        for name, tensor in weights.items()
        for old, new in names
        if name.startswith(old)
    }


def extended(sample: Tensor, stride: int) -> Tensor:
    """Extends images (B, C, H, W) by their mirror image, at the far ends, to the next multiple of the stride."""
    if not any(side % stride for side in sample.shape[2:]):
        return sample  # so that graphs for these sizes do not contain the mirroring
    rows, columns = (
        mirrored(torch.arange(-(-side // stride) * stride, device=sample.device), side) for side in sample.shape[2:]
    )
    return sample[:, :, rows[:, None], columns]


def cut(x: Tensor, size: Sequence[int], stride: int = 1) -> Tensor:
    """Cuts a map to the part (B, C, H / stride, W / stride), rounded up, of an image of `size`, (H, W)."""
    height, width = (-(-side // stride) for side in size)
    return x[..., :height, :width]
