"""A small classifier of whole images, trained on the classes of a data set.

Its features show how near generated images are to real ones (`feature_networks`) where networks trained on ImageNet
show little, such as for small grey images. Nothing is downloaded.
"""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.checks import is_count, is_number, require, takes_plain
from unet_diffusion.network.blocks import BlockStyle, Downsample, PlainBlock
from unet_diffusion.network.own_config import OwnConfig

CLASSIFIER_FOLDER = "classifier"  # of the weights, inside the run's folder, where `config.json` is the run's
STYLE = BlockStyle("plain", norm="group", activation="silu", padding="same", head_channels=1, embed_dim=None)


class ImageClassifier(OwnConfig, ModelMixin, ConfigMixin):
    """Class scores of images: a block of two convolutions at each resolution, then a linear layer on the mean features.

    Args:
        in_channels: channels of the images.
        num_classes: number of classes, at least 2.
        widths: channels of each resolution, the image's own first.
        dropout: share of the features dropped in training before the last layer.
        class_names: names of the classes, in the order of the scores.
        data: name of the images that it learnt from.
        accuracy: share of held-out images whose class got the highest score; None while it learns.

    Raises:
        ValueError: no classifier can be built from a value.
    """

    former_names = ("PictureClassifier",)

    _no_split_modules = ["PlainBlock"]
    _repeated_blocks = ["PlainBlock"]

    @takes_plain
    @register_to_config
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (32, 64, 128),
        dropout: float = 0.1,
        class_names: tuple[str, ...] | None = None,
        data: str | None = None,
        accuracy: float | None = None,
    ) -> None:
        super().__init__()
        require(is_count(in_channels), "in_channels", in_channels, "must be an integer of at least 1")
        valid = is_count(num_classes, 2)
        require(valid, "num_classes", num_classes, "must be at least 2; give images of more classes")
        valid = isinstance(widths, (tuple, list)) and len(widths) > 0 and all(is_count(width, 2) for width in widths)
        require(valid, "widths", widths, "must be one or more integers of at least 2, such as (32, 64, 128)")
        valid = is_number(dropout) and 0 <= dropout < 1
        require(valid, "dropout", dropout, "must be a share of at least 0 and below 1")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names are {len(class_names)}, but num_classes is {num_classes}; name each class.")
        valid = accuracy is None or (is_number(accuracy) and 0 <= accuracy <= 1)
        require(valid, "accuracy", accuracy, "must be a share from 0 to 1, or None")
        self.blocks = nn.ModuleList(PlainBlock(i, o, 0.0, STYLE) for i, o in zip([in_channels, *widths], widths))
        self.downsample = Downsample("max_pool", in_channels, STYLE)
        self.drop = nn.Dropout(dropout)  # not named dropout, for which ModelMixin would return the config value
        self.head = nn.Linear(widths[-1], num_classes)
        nn.init.zeros_(self.head.weight)  # so that all classes get the same score before training
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Returns the input of the last layer, (B, widths[-1]), for images (B, C, H, W) in [-1, 1] of any size."""
        first, *further = self.blocks
        x = first(images, None)
        for block in further:
            x = block(self.downsample(x), None)  # (B, widths[i], H / 2**i, W / 2**i), rounded up
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores before softmax, (B, K), for images (B, C, H, W) in [-1, 1]."""
        return self.head(self.drop(self.features(images)))
