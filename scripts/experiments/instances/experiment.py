"""The options of the comparison, its cases, and the images that they share."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.compute
import pyarrow.parquet

from scripts import NETWORKS
from scripts.experiments.cases import check_cases, label_counts, short_hash
from scripts.experiments.exchange import PARTS
from scripts.reports import content_hash
from unet_diffusion.checks import is_count, is_number, require, require_each
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import load_labelled
from unet_diffusion.files import written_aside
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.saved_runs import best_device
from unet_diffusion.training.config import OptimizerName

Method = Literal["ours", "ours-masks", "stardist", "cellpose"]
METHODS: tuple[Method, ...] = get_args(Method)
PEERS = ("stardist", "cellpose")
ALL = "all"
CASE = "case.json"


@dataclass
class Instances:
    """Find objects in several ways, each trained for the same processor time, and score all on the same test images."""

    data: Path
    """Folder with `train.parquet`, `validation.parquet` and `test.parquet`, of columns `image`, `mask` (two classes),
    `instances` and, for subsets, `modality`."""
    output: Path
    """Folder for the cases, the table and the figures."""
    sets: tuple[str, ...] = ("fluorescence", ALL)
    """Subsets to compare on: "all" rows, or those with a value in the column `modality`."""
    grey: tuple[str, ...] = ("fluorescence",)
    """Subsets whose images all methods get with one channel instead of three."""
    methods: tuple[Method, ...] = METHODS
    """Ways to find objects: "ours" with `--instances`; "ours-masks", without, by connected components and by watershed;
    "stardist" and "cellpose", from untrained weights."""
    labels: tuple[int | Literal["all"], ...] = ("all",)
    """Numbers of labelled images, the first of the training set."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation, order, crops and augmentation."""
    minutes: float = 20.0
    """Processor minutes of the training steps of each method, data loading included. Not counted are imports,
    compilation, what is computed once before training, and validation."""
    crop_size: int = 128
    """Side of the training squares in pixels, for all methods; a multiple of 16. Other images stay whole."""
    batch_size: int = 8
    """Squares per step of ours; the peers have their own."""
    learning_rate: float = 1e-3
    """Highest learning rate of ours; the peers have their own."""
    optimizer: OptimizerName = "muon"
    """Optimizer of ours; the peers have their own."""
    validations: int = 20
    """Validations in a training of ours."""
    network: Path = NETWORKS / "segmentation-2m.json"
    """JSON file of our network's config values."""
    stardist_python: Path | None = None
    """Python of an environment with StarDist 0.9; without it, StarDist is not run."""
    cellpose_python: Path | None = None
    """Python of an environment with Cellpose 3; without it, Cellpose is not run."""
    stardist_width: int = 39
    """Channels of StarDist's first level: 39 for about as many parameters as ours by default, 32 as published."""
    cellpose_width: int = 18
    """Channels of Cellpose's first level: 18 for about as many parameters as ours by default, 32 as published."""
    cellpose_diameter: float = 17.0
    """Diameter in pixels to which Cellpose scales objects: 17 as in its authors' network for nuclei, 30 for cells."""
    worst: int = 0
    """Test images in the figure of each set's worst ones; 0 writes none."""
    percentiles: tuple[float, float] | None = (1.0, 99.8)
    """Percentiles of each image that become the ends of the range of values, for ours; the peers have their own."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        """Checks every value."""
        check_cases(self, METHODS)
        counts = ("batch_size", "validations", "stardist_width", "cellpose_width")
        require_each(self, counts, is_count, "must be at least 1; leave it out for the default")
        require(is_count(self.worst, 0), "worst", self.worst, "must be at least 0")
        fits = is_count(self.crop_size) and self.crop_size % 16 == 0
        require(fits, "crop_size", self.crop_size, "must be a multiple of 16, as StarDist needs it")
        positive = ("minutes", "learning_rate", "cellpose_diameter")
        require_each(self, positive, lambda value: is_number(value) and value > 0, "must be above 0")
        if self.network.suffix != ".json" or not self.network.is_file():
            raise ValueError(f"network is {self.network}, but must be a JSON file of config values; give its path.")
        for path in (self.data / f"{part}.parquet" for part in PARTS):
            if not path.is_file():
                raise ValueError(f"data is {self.data}, but there is no {path.name}; give a folder that has it.")

    def config(self, name: str, method: str) -> dict[str, Any]:
        """All values that the cases of a method on a set depend on, as JSON stores them."""
        config: dict[str, Any] = {
            "minutes": self.minutes,
            "crop_size": self.crop_size,
            "grey": name in self.grey,
            "files": content_hash(self.data / f"{part}.parquet" for part in PARTS),
        }
        if method == "stardist":
            config |= {"width": self.stardist_width}
        elif method == "cellpose":
            config |= {"width": self.cellpose_width, "diameter": self.cellpose_diameter}
        else:
            values = json.loads(self.network.read_text(encoding="utf-8"))
            config |= {"network": {key: value for key, value in values.items() if not key.startswith("_")}}
            config |= {
                key: getattr(self, key)
                for key in ("batch_size", "learning_rate", "optimizer", "validations", "percentiles")
            }
            config |= {"augmentation": asdict(self.augmentation)}
            config |= {"mixed_precision": settled_precision("auto", best_device("auto"))}
        return json.loads(json.dumps(config))

    def cases(self) -> "list[Case]":
        """All cases, in the order of the sets; numbers of labels above the size of a set are left out.

        Raises:
            ValueError: a set has no row, or fewer than each number of labels.
        """
        made = []
        for name in self.sets:
            images = pyarrow.parquet.read_metadata(source(self, name, "train")).num_rows
            made += [
                Case(name, method, count, seed, self.config(name, method))
                for seed in self.seeds
                for count in label_counts(self.labels, images, name)
                for method in self.methods
            ]
        return made


@dataclass(frozen=True)
class Case:
    """One training and its test.

    Attributes:
        data: name of the set.
        method: the way to find objects.
        labels: number of labelled images.
        seed: seed of the training.
        config: as `Instances.config` gives it.
    """

    data: str
    method: str
    labels: int
    seed: int
    config: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its folder, relative to the output folder."""
        return f"{self.data}/{self.method}-{self.labels}-seed{self.seed}-{short_hash(self.config)}"


def source(options: Instances, name: str, part: str) -> Path:
    """Returns the Parquet file of a part of a set, which is written where it is a subset.

    Raises:
        ValueError: no row belongs to the subset.
    """
    whole = options.data / f"{part}.parquet"
    if name == ALL:
        return whole
    path = options.output / name / f"{part}-{content_hash([whole])}.parquet"
    if not path.is_file():
        table = pyarrow.parquet.read_table(whole)
        values = table["modality"] if "modality" in table.column_names else None
        chosen = None if values is None else table.filter(pyarrow.compute.equal(values, name))
        if chosen is None or not chosen.num_rows:
            raise ValueError(f"sets names {name!r}, but {whole} has no such row in a column modality; name another.")
        with written_aside(path) as aside:
            pyarrow.parquet.write_table(chosen, aside)
    return path


def labelled(options: Instances, name: str, part: str) -> MaskedDataset:
    """Opens all images of a part of a set, whole, with their masks and instance maps."""
    channels = 1 if name in options.grey else 3
    masked = MaskedOptions(
        data=str(source(options, name, part)),
        image_column="image",
        mask_column="mask",
        instances_column="instances",
        channels=channels,
    )
    return load_labelled(masked, num_classes=2, channels=channels, pixel_range=PixelRange.full("uint8"))
