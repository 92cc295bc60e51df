"""Labels in the columns of a data set: which column holds them, and the names of their classes."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from unet_diffusion.data.folders import counted, some
from unet_diffusion.images.no_class import NO_LABEL

PLAIN_DEFAULTS = ("label", "cls")  # the second is the ending of labels in WebDataset files
FEWEST_JUDGED = 8  # labels; among fewer, each may well have its own class
MOST_DISTINCT = 0.9  # share of the labels; above it, the values are taken for names of the rows


@dataclass(frozen=True)
class LabelColumn:
    """The column of the labels.

    Attributes:
        column: name of the column.
        key: name of the value inside a cell, if the cells are dictionaries.
        feature: kind of the values.
        stated: whether the user has named it.
    """

    column: str
    feature: Any
    key: str | None = None
    stated: bool = False

    @property
    def name(self) -> str:
        """Returns the column's name as a value of `label_column`, such as "label" or "json.label"."""
        return self.column if self.key is None else f"{self.column}.{self.key}"

    @property
    def kind(self) -> str:
        """Returns the type of the values for messages, such as "int64"."""
        return _kind(self.feature)

    @property
    def is_plain(self) -> bool:
        """Returns whether the values are numbers or strings, whose classes have to be found."""
        return self.kind.startswith(("int", "uint", "float")) or self.kind in ("string", "large_string", "bool")


def find_label(features: Features, stated: str | None, source: str) -> LabelColumn | None:
    """Finds the column of the labels.

    It is the stated column, else `label`, else the only one of type ClassLabel, else `cls`, else the only value `label`
    inside dictionaries. Only a stated column may hold neither ClassLabel nor plain values.

    Raises:
        ValueError: the stated column does not exist.
    """
    if stated is not None:
        found = _column(features, stated)
        if found is None:
            raise ValueError(f"label_column is {stated!r}, but {source} has no such column. {listing(features)}")
        return LabelColumn(found.column, found.feature, found.key, stated=True)
    of_class = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    nested = [f"{name}.label" for name, feature in features.items() if isinstance(feature, dict) and "label" in feature]
    lists = (["label"], of_class, ["cls"], nested)
    candidates = [_column(features, names[0]) for names in lists if len(names) == 1]
    return next((each for each in candidates if each is not None and _may_be_labels(each)), None)


def listing(features: Features) -> str:
    """Returns a sentence that lists the columns and their types."""
    return "Columns: " + ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items()) + "."


def _kind(feature: Any) -> str:
    """Returns the type of a column's values for messages, such as "int64" or "List"."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def labelled(
    dataset: Dataset | IterableDataset, label: LabelColumn, origin: str, max_images: int | None = None
) -> tuple[Dataset | IterableDataset, tuple[str, ...]]:
    """Returns a data set with a column `label` of type ClassLabel or without labels, and notes on the classes.

    Plain values become classes: the sorted values that occur, without spaces around them, each its own name. -1 and
    missing or empty values are no label. Floats must be whole numbers, since tables keep integers as floats if some are
    missing. A column that was not stated is left out, with a note, if it can hardly hold labels.

    Args:
        dataset: with the column of the labels.
        label: the column.
        origin: subject of the note on the classes, such as "the subfolders are the classes".
        max_images: number of first rows that will be used, whose classes the note counts; None for all.

    Raises:
        ValueError: a stated column holds other values, or plain values while streaming.
    """
    problem = _problem(label, streaming=isinstance(dataset, IterableDataset))
    if problem is not None:
        return _without(dataset, label, problem)
    if isinstance(dataset, IterableDataset):
        note = f"{origin}: {some(label.feature.names)}"
        return _renamed(dataset, label), (note,)
    values = dataset.select_columns([label.column])[label.column][:]
    if label.key is not None:
        values = [None if cell is None else cell[label.key] for cell in values]
    fractions = [value for value in values if isinstance(value, float) and _is_fraction(value)]
    if fractions:
        problem = f"it holds numbers such as {fractions[0]:g}, and labels are ClassLabel, integers or strings"
        return _without(dataset, label, problem)
    values = [value.strip() if isinstance(value, str) else value for value in values]
    if label.kind.startswith("float"):
        values = [None if value is None or math.isnan(value) else int(value) for value in values]
    if isinstance(label.feature, ClassLabel) and label.key is not None:
        values = [None if value in (None, NO_LABEL) else label.feature.int2str(value) for value in values]
    elif isinstance(label.feature, ClassLabel):
        names = label.feature.names
        used = values[:max_images]
        counts = Counter(names[value] for value in used if value is not None and 0 <= value < len(names))
        return _renamed(dataset, label), (_note(origin, names, counts, len(used)),)
    classes = sorted({value for value in values if not _is_none(value)})
    labels = len(values) - sum(map(_is_none, values))
    if not classes:
        return _without(dataset, label, "it holds no label")
    if labels >= FEWEST_JUDGED and len(classes) > MOST_DISTINCT * labels:
        problem = f"its {labels} values are {len(classes)} different ones, like names of the rows"
        if not label.stated:
            return _without(dataset, label, problem)
    indices = {value: index for index, value in enumerate(classes)}
    names = [str(value) for value in classes]
    encoded = [NO_LABEL if _is_none(value) else indices[value] for value in values]
    kept = dataset.remove_columns(label.column)
    used = encoded[:max_images]
    counts = Counter(names[index] for index in used if index != NO_LABEL)
    with_label = kept.add_column("label", encoded, feature=ClassLabel(names=names))
    return with_label, (_note(origin, names, counts, len(used)),)


def _column(features: Features, name: str) -> LabelColumn | None:
    if name in features:
        return LabelColumn(name, features[name])
    column, _, key = name.partition(".")
    inside = features.get(column)
    return LabelColumn(column, inside[key], key) if isinstance(inside, dict) and key in inside else None


def _may_be_labels(label: LabelColumn) -> bool:
    """Returns whether a column named like labels may hold them in some form; an image would be a mask instead."""
    return isinstance(label.feature, (ClassLabel, Value)) and label.kind != "binary"


def _problem(label: LabelColumn, streaming: bool) -> str | None:
    if isinstance(label.feature, ClassLabel) and label.key is None:
        return None
    if not label.is_plain and not isinstance(label.feature, ClassLabel):
        inside = label.feature if isinstance(label.feature, dict) else {}
        plain = [each.name for key in inside if (each := LabelColumn(label.column, inside[key], key)).is_plain]
        fix = f"; name a value inside of it, such as {plain[0]!r}" if plain else ""
        return f"it holds {label.kind}, and labels are ClassLabel, integers or strings{fix}"
    if streaming:
        return f"it holds {label.kind}, whose classes are not known before all rows are read; leave out streaming"
    return None


def _without(
    dataset: Dataset | IterableDataset, label: LabelColumn, problem: str
) -> tuple[Dataset | IterableDataset, tuple[str, ...]]:
    if label.stated:
        raise ValueError(f"label_column is {label.name!r}, but {problem}.")
    return dataset.remove_columns(label.column), (f"the column {label.name} is not taken for labels: {problem}",)


def _renamed(dataset: Dataset | IterableDataset, label: LabelColumn) -> Dataset | IterableDataset:
    return dataset if label.column == "label" else dataset.rename_column(label.column, "label")


def _is_fraction(value: float) -> bool:
    return not (math.isnan(value) or value.is_integer())


def _is_none(value: Any) -> bool:
    return value in (None, "", "-1") or (value == -1 and value is not True)


def _note(origin: str, names: list[str], counts: Counter[str], rows: int) -> str:
    unit = " image" if counts[names[0]] == 1 else " images"
    listed = [f"{name} ({counts[name]}{'' if position else unit})" for position, name in enumerate(names)]
    unlabelled = rows - counts.total()
    without = f"; {counted(unlabelled, 'image')} without a label" if unlabelled else ""
    return f"{origin}: {some(listed)}{without}"
