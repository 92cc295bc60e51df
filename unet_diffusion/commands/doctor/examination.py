"""Examination of a data set: the facts of its rows, judged as a training run would use them."""

from typing import Literal

from datasets import Dataset

from unet_diffusion.commands.doctor.facts import RowFacts, gather_facts
from unet_diffusion.commands.doctor.findings import Finding, Report, about, sort_findings
from unet_diffusion.commands.doctor.images import duplicate_findings, image_findings
from unet_diffusion.commands.doctor.masks import agreed_encoding, mask_findings
from unet_diffusion.data import sets
from unet_diffusion.data.config import DataConfig, ImageOptions
from unet_diffusion.data.masked import sets as masked_sets
from unet_diffusion.data.masked.config import MaskedDataConfig


def refuse_errors(config: ImageOptions) -> None:
    """Raises a ValueError with all errors that `examine` finds; trainers call it before anything else."""
    errors = examine(config, errors_only=True).errors
    if errors:
        raise ValueError("\n".join(["the data cannot be trained on.", *map(str, errors)]))


def examine(config: ImageOptions, errors_only: bool = False) -> Report:
    """Examines every image and mask of the split to train on and of the validation set, if one is named.

    The facts of each row are kept beside the decoded images, so that a second examination is quick. Sources are read
    whole, even if a run would stream them.

    Args:
        config: a `DataConfig`, or a `MaskedDataConfig` for images with masks.
        errors_only: leave out warnings and notes.

    Raises:
        ValueError: there is no such source, split or column.
    """
    parts: dict[str, list[RowFacts]] = {}
    found: list[Finding] = []
    reading = config.mask_reading if isinstance(config, MaskedDataConfig) else None
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for part in splits if config.names_validation else splits[:1]:
        dataset, name, orphans = _open(config, part)
        facts = gather_facts(dataset, reading, config.cache_dir)
        parts[name] = facts
        found += about("warning", f"masks of {name} that have no image: {{count}}.", orphans)
        found += image_findings(facts, name, config, _needs_one_size(config, part))
    if isinstance(config, MaskedDataConfig):
        encoding = None
        try:
            encoding = agreed_encoding(next(iter(parts.values())), config)
        except ValueError as error:
            found.append(Finding("error", str(error)))
        for name, facts in parts.items():
            found += mask_findings(facts, name, config, encoding)
    found += duplicate_findings(parts)
    kept = [finding for finding in found if finding.severity == "error" or not errors_only]
    examined = [f"{len(facts)} images{' with masks' if reading else ''} of {name}" for name, facts in parts.items()]
    return Report(sort_findings(kept), tuple(examined))


def _open(config: ImageOptions, part: Literal["train", "validation"]) -> tuple[Dataset, str, list[str]]:
    """Opens the rows of a split; returns them with the split's name and the masks without an image."""
    if isinstance(config, MaskedDataConfig):
        dataset, orphans, name = masked_sets.open_part(config, part)
        return dataset, name, [path.name for path in orphans]
    assert isinstance(config, DataConfig)
    rows, name = sets.open_part(config, part)
    assert isinstance(rows, Dataset)
    return rows, name, []


def _needs_one_size(config: ImageOptions, part: str) -> bool:
    if config.image_size is not None:
        return False
    assert isinstance(config, (DataConfig, MaskedDataConfig))
    whole = isinstance(config, MaskedDataConfig) and part == "validation"
    return config.crop_size is None and not whole
