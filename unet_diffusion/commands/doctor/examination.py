"""Examination of a data set: the facts of its rows, judged as a training run would use them."""

import sys
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from datasets import Dataset, IterableDataset

from unet_diffusion.commands.doctor.findings import SEVERITIES, Finding, Report, about, judged
from unet_diffusion.commands.doctor.image_findings import duplicate_findings, image_findings
from unet_diffusion.commands.doctor.mask_findings import agreed_encoding, mask_findings, seen_in
from unet_diffusion.commands.doctor.row_facts import RowFacts, facts_of_stream, gather_facts
from unet_diffusion.commands.doctor.summary import Section, Summary
from unet_diffusion.commands.doctor.understanding import describe_images, describe_masks
from unet_diffusion.data import sets
from unet_diffusion.data.columns import class_names
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked import sets as masked_sets
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.meaning import encoding_of_part
from unet_diffusion.data.masked.unlabelled import image_column_of
from unet_diffusion.data.names import SPLIT_FOLDERS

PartName = Literal["train", "validation"]
TITLES = {"train": "data", "validation": "validation", "unlabelled": "unlabelled"}  # in the summary


@dataclass(frozen=True)
class Examined:
    """The rows of one part of a data set, with their facts."""

    part: PartName | Literal["unlabelled"]
    name: str  # of the source and the split
    notes: tuple[str, ...]  # notes on the files
    facts: list[RowFacts]
    streamed: bool = False  # the facts are only of the first rows of a stream
    orphans: tuple[Path, ...] = ()  # masks without an image
    class_names: tuple[str, ...] = ()  # of the files of masks, if there is one for each class
    found: tuple[Finding, ...] = ()  # on its classes and groups


def present(config: DataConfig | MaskedDataConfig, unlabelled: str | None = None, quiet: bool = False) -> Summary:
    """Examines the data of a run before anything else, and prints a summary, warnings and notes.

    Args:
        config: names the data.
        unlabelled: a source of further images, which need no masks.
        quiet: print nothing; set it in all processes of a run but one.

    Returns:
        The summary, to be saved in the folder of the run.

    Raises:
        ValueError: `examine` finds errors or questions, which are all listed, or there is no such source.
    """
    report = examine(config, unlabelled=unlabelled)
    if not quiet:
        show("\n".join(map(str, [report.summary, *report.advice])))
    if report.refusal:
        raise ValueError(report.refusal)
    return report.summary


def examine(config: DataConfig | MaskedDataConfig, errors_only: bool = False, unlabelled: str | None = None) -> Report:
    """Examines every image and mask of the split to train on and of the validation set, if one is named.

    The facts of each row are kept beside the decoded images, so a second examination is quick. Only the first rows of a
    stream are examined. Images of the source `unlabelled` are examined too, but not for duplicates, since they often
    include the images with masks.

    Raises:
        ValueError: the source, a split or a column does not exist.
    """
    parts: tuple[PartName, ...] = ("train", "validation") if config.names_validation else ("train",)
    examined = [_open(config, part) for part in parts]
    further = [_open_unlabelled(config, unlabelled)] if unlabelled is not None else []
    sections, found = _judge_images(config, [*examined, *further])
    if isinstance(config, MaskedDataConfig):
        config = masked_sets.with_class_names(config, examined[0].class_names)
        of_masks, found_in_masks = _judge_masks(config, examined)
        sections, found = sections + of_masks, found + found_in_masks
    found += duplicate_findings({_name_of(each, examined): each.facts for each in examined})
    kept = [finding for finding in found if finding.severity in ("error", "question") or not errors_only]
    kept.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(Summary(tuple(sections)), tuple(kept))


def show(text: str) -> None:
    """Prints text at once; a name that the terminal cannot show must not stop a run from starting."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _open(config: DataConfig | MaskedDataConfig, part: PartName) -> Examined:
    if isinstance(config, MaskedDataConfig):
        of_masks = masked_sets.open_part(config, part)
        facts = gather_facts(of_masks.rows, config.mask_reading, config.cache_dir, config.axes)
        return Examined(
            part,
            of_masks.name,
            of_masks.notes,
            facts,
            orphans=of_masks.orphans,
            class_names=of_masks.class_names,
            found=tuple(_one_group(of_masks.rows, facts, config)),
        )
    streamed, found = config.streaming and part == "train", []
    opened = sets.open_part(config, part, streamed)
    if streamed:
        facts = facts_of_stream(opened.rows, opened.name, config.axes)
    else:
        assert isinstance(opened.rows, Dataset)
        facts = gather_facts(opened.rows, None, config.cache_dir, config.axes)
        found += _one_group(opened.rows, facts, config)
    cut = config.max_images is not None and part == "train"
    found += _without_images(opened.rows, opened.name, config.max_images) if cut else []
    return Examined(part, opened.name, opened.notes, facts, streamed, found=tuple(found))


def _one_group(rows: Dataset, facts: list[RowFacts], config: DataConfig | MaskedDataConfig) -> list[Finding]:
    """Finds that all images belong to one group, so that none can be held out."""
    if "group" not in rows.features:
        return []
    usable = [(group, fact.digest) for group, fact in zip(rows["group"], facts) if fact.usable]
    groups, digests = [group for group, _ in usable], [digest for _, digest in usable]
    if len(set(sets.joined_groups(groups, digests))) != 1:
        return []
    return [Finding("error", sets.only_one_group(config.group_column, groups))]


def _without_images(rows: Dataset | IterableDataset, name: str, max_images: int | None) -> list[Finding]:
    """Finds classes that have no image among the first ones; for a stream that would have to be read, none."""
    names = class_names(rows)
    if names is None or not isinstance(rows, Dataset):
        return []
    present = set(rows.select_columns(["label"])["label"][:])
    absent = [each for index, each in enumerate(names) if index not in present]
    sentence = (
        f"max_images is {max_images}, but the first images of {name} leave out {len(absent)} of its {len(names)} "
        "classes; raise max_images, or give data with fewer images of each class."
    )
    return about("warning", sentence, absent)


def _open_unlabelled(config: DataConfig | MaskedDataConfig, source: str) -> Examined:
    image = image_column_of(source, config) if isinstance(config, MaskedDataConfig) else config.image_column
    images = DataConfig(data=source, image_column=image, axes=config.axes, cache_dir=config.cache_dir)
    return replace(_open(images, "train"), part="unlabelled")


def _judge_images(
    config: DataConfig | MaskedDataConfig, examined: list[Examined]
) -> tuple[list[Section], list[Finding]]:
    sections: list[Section] = []
    found: list[Finding] = []
    for each in examined:
        notes = each.notes + _ranges(config) + _held_out(config, each)
        sections.append(describe_images(TITLES[each.part], each.name, each.facts, notes, each.streamed))
        any_size = isinstance(config, MaskedDataConfig) and each.part == "validation"
        one_size = config.image_size is None and config.crop_size is None and not any_size
        found += image_findings(each.facts, each.name, config, one_size)
        found += each.found
    return sections, found


def _judge_masks(config: MaskedDataConfig, examined: list[Examined]) -> tuple[list[Section], list[Finding]]:
    encoding, found = _encoding(examined[0].facts, config)
    sections: list[Section] = []
    for each in examined:
        of_part, unclear = _encoding_of(config, each, encoding)
        found += unclear
        sections.append(describe_masks(*_mask_source(config, each), each.facts, of_part, config.class_names))
        found += _of_another_split(config, each)
        orphans = [path.name for path in each.orphans]
        found += about("warning", f"masks of {each.name} that have no image: {{count}}.", orphans)
        found += mask_findings(each.facts, each.name, config, of_part, learned=each.part == "train")
    return sections, found


def _name_of(part: Examined, examined: list[Examined]) -> str:
    """Returns the name of a part; the name is distinct even if another part has the same images."""
    return part.name if part is examined[0] or part.name != examined[0].name else f"{part.name} for validation"


def _ranges(config: DataConfig | MaskedDataConfig) -> tuple[str, ...]:
    """Returns a note on the range of values, if each image has its own."""
    if config.image_percentiles is None:
        return ()
    low, high = config.image_percentiles
    return (f"each image is stretched, its percentiles {low:g} and {high:g} to the ends of the range",)


def _held_out(config: DataConfig | MaskedDataConfig, examined: Examined) -> tuple[str, ...]:
    named = config.names_validation or examined.part != "train"
    if named or config.validation_fraction == 0 or examined.streamed:
        return ()
    if len({fact.digest for fact in examined.facts if fact.usable}) < 2:
        return ("none of them is held out for validation, since there is one image or all are equal",)
    what = "of them" if config.group_column is None else "of the groups"
    return (f"about {100 * config.validation_fraction:g}% {what} are held out for validation",)


def _mask_source(config: MaskedDataConfig, examined: Examined) -> tuple[str, str]:
    """Returns a name for the masks of a part, and their place."""
    if examined.part == "train":
        return "masks", config.masks or examined.name
    return "validation masks", config.validation_masks or config.masks or examined.name


def _of_another_split(config: MaskedDataConfig, examined: Examined) -> list[Finding]:
    """Finds masks whose folder names another split than that of the images: images in train, masks in val."""
    of_train = examined.part == "train"
    images, masks = (config.data, config.masks) if of_train else (config.validation_data, config.validation_masks)
    if not isinstance(images, str) or not isinstance(masks, str):
        return []
    parts = [Path(folder).expanduser().resolve().parts for folder in (images, masks)]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*parts)))
    splits = [
        {SPLIT_FOLDERS[part.lower()] for part in each[shared:] if part.lower() in SPLIT_FOLDERS} for each in parts
    ]
    if not all(splits) or splits[0] & splits[1]:
        return []
    sentence = f"the images lie in {images}, but their masks in {masks}, which names another split; check the pairs."
    return [Finding("warning", sentence)]


def _encoding_of(
    config: MaskedDataConfig, part: Examined, encoding: MaskEncoding | None
) -> tuple[MaskEncoding | None, list[Finding]]:
    """Returns the encoding of one part, given that of the training masks."""
    if encoding is None or not any(fact.keys for fact in part.facts):
        return encoding, []
    try:
        return encoding_of_part(config, encoding, seen_in(part.facts)), []
    except ValueError as error:
        return None, [judged(error, f"masks of {part.name}: ")]


def _encoding(facts: list[RowFacts], config: MaskedDataConfig) -> tuple[MaskEncoding | None, list[Finding]]:
    """Returns the encoding of the masks, or None and the reason why it is unclear."""
    if not any(fact.keys for fact in facts):
        return None, []  # no mask can be used; other findings report this
    try:
        return agreed_encoding(facts, config), []
    except ValueError as error:
        return None, [judged(error)]
