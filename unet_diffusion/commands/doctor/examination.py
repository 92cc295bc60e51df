"""Examination of a data set: the facts of its rows, judged as a training run would use them."""

from typing import Literal

from datasets import Dataset, IterableDataset

from unet_diffusion.commands.doctor.findings import SEVERITIES, Finding, Report, about
from unet_diffusion.commands.doctor.image_findings import duplicate_findings, image_findings
from unet_diffusion.commands.doctor.mask_findings import agreed_encoding, mask_findings
from unet_diffusion.commands.doctor.row_facts import RowFacts, gather_facts
from unet_diffusion.data import sets
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked import sets as masked_sets
from unet_diffusion.data.masked.config import MaskedDataConfig


def refuse_errors(config: DataConfig | MaskedDataConfig) -> None:
    """Raises a ValueError with all errors that `examine` finds; trainers call it before anything else."""
    errors = examine(config, errors_only=True).errors
    if errors:
        raise ValueError("\n".join(["the data cannot be trained on.", *map(str, errors)]))


def examine(config: DataConfig | MaskedDataConfig, errors_only: bool = False) -> Report:
    """Examines every image and mask of the split to train on and of the validation set, if one is named.

    The facts of each row are kept beside the decoded images, so that a second examination is quick. Sources are read
    whole, even if a run would stream them.

    Raises:
        ValueError: the source, a split or a column does not exist.
    """
    parts: dict[str, list[RowFacts]] = {}
    found: list[Finding] = []
    rows: Dataset | IterableDataset
    reading = config.mask_reading if isinstance(config, MaskedDataConfig) else None
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for part in splits if config.names_validation else splits[:1]:
        one_size = config.image_size is None and config.crop_size is None
        if isinstance(config, MaskedDataConfig):
            opened = masked_sets.open_part(config, part)
            rows, name = opened.rows, opened.name
            names = [path.name for path in opened.orphans]
            found += about("warning", f"masks of {name} that have no image: {{count}}.", names)
            one_size = one_size and part == "train"
            config = masked_sets.with_class_names(config, opened)
        else:
            plain = sets.open_part(config, part)
            rows, name = plain.rows, plain.name
        assert isinstance(rows, Dataset)
        facts = parts[name] = gather_facts(rows, reading, config.cache_dir)
        found += image_findings(facts, name, config, one_size)
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
    kept.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(tuple(kept), tuple(examined))
