"""Metadata files beside images, as in an imagefolder of `datasets`: a table with a column `file_name`.

The other columns are labels, captions and the like; a column `NAME_file_name` names another image of the same row, such
as its mask.
"""

import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, Features

from unet_diffusion.data.folders import ImageFiles, counted, hash_of, some, states_of, stored_path
from unet_diffusion.files import readable

FILE_NAME = "file_name"
LEADING_ZERO = r"^0\d"
WHOLE = r"\.0*$"  # the end of a whole number among floats


def open_metadata(images: ImageFiles, file: Path) -> tuple[Dataset, tuple[str, ...], Callable[[], str]]:
    """Opens the rows of a metadata file with undecoded columns of images.

    Returns the rows, notes on them, and a function that returns a hash of the table and of the sizes of its images.

    `file_name` becomes the column `image`, and `NAME_file_name` the column `NAME`. Paths are relative to the metadata
    file. If that file lies above the folder of a split, the rows whose image is in the split's folder are taken.

    Raises:
        ValueError: the file cannot be read, has no column `file_name` or two of one name, or names files that do not
            exist.
    """
    table = _read(file)
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{file} has several columns {some(twice)}, but each must have its own name; rename them.")
    if FILE_NAME not in table.column_names:
        raise ValueError(
            f"{file} has no column file_name, which names the image of each row; its columns are "
            f"{', '.join(table.column_names)}. Rename the column, or move the file away."
        )
    paths = {name: _paths(table, name, file) for name in table.column_names if _names_files(name)}
    if file.parent != images.home:
        inside = [path is not None and path.is_relative_to(images.home) for path in paths[FILE_NAME]]
        table = table.filter(pyarrow.array(inside))
        paths = {name: [path for path, keep in zip(each, inside) if keep] for name, each in paths.items()}
    if not len(table):
        raise ValueError(f"{file} names no image of {images.home}; add rows, or move the file away.")
    _check_present(paths, file)
    columns: dict[str, Any] = {}
    features = Features()
    for name in table.column_names:
        if _names_files(name):
            column = "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")
            columns[column] = [path and {"bytes": None, "path": stored_path(path)} for path in paths[name]]
            features[column] = datasets.Image(decode=False)
    rows = Dataset.from_dict(columns, features=features)
    others = Dataset(table.select([name for name in table.column_names if not _names_files(name)]))
    for name in others.column_names:
        if name in columns:
            raise ValueError(f"{file} has a column {name} beside the one of files of that name; rename it.")
    if others.column_names:
        rows = datasets.concatenate_datasets([rows, others], axis=1)
    used = {path for each in paths.values() for path in each if path is not None}
    cells, states = table.to_pylist(), states_of(sorted(used))
    fingerprint = hash_of(cells, states)
    rows = Dataset(rows.data, info=rows.info, fingerprint=fingerprint)
    unlisted = len(set(images.files) - used)
    notes = [f"{file.name} names the images: {counted(len(rows), 'row')}"]
    if unlisted:
        notes.append(f"images that {file.name} does not name were left out: {unlisted}")
    return rows, tuple(notes), partial(hash_of, cells, [state[1] for state in states])


def _read(file: Path) -> pyarrow.Table:
    try:
        return READERS[file.suffix](io.BytesIO(file.read_bytes()))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {readable(str(error))}; correct it, or move it away.") from error


def _read_csv(file: io.BytesIO) -> pyarrow.Table:
    """Reads a table whose columns are separated by commas, semicolons (as by Excel in many countries) or tabs.

    Dates and times stay text, and so do numbers such as 007, 1.10 beside 1.1, or integers of many digits where they are
    written differently but have one value, so that they are two classes or groups.
    """
    try:
        header = file.read().decode().partition("\n")[0]
    except UnicodeDecodeError as error:
        raise ValueError("its text is not UTF-8; save it as UTF-8") from error
    separated = pyarrow.csv.ParseOptions(delimiter=max(",;\t", key=header.count))
    file.seek(0)
    table = pyarrow.csv.read_csv(file, parse_options=separated)
    text = dict.fromkeys(table.column_names, pyarrow.string())
    as_text = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=True)
    file.seek(0)
    texts = pyarrow.csv.read_csv(file, parse_options=separated, convert_options=as_text)
    for place, name in enumerate(table.column_names):
        written = pyarrow.compute.utf8_trim_whitespace(texts.column(place))
        if _loses_text(table.column(place), written):
            table = table.set_column(place, name, written)
    return table.rename_columns([name.strip() for name in table.column_names])


def _loses_text(values: pyarrow.ChunkedArray, written: pyarrow.ChunkedArray) -> bool:
    """Returns whether a column of a CSV file has to stay text, since its values do not tell how they are written."""
    if pyarrow.types.is_integer(values.type):
        return pyarrow.compute.any(pyarrow.compute.match_substring_regex(written, LEADING_ZERO)).as_py()
    if pyarrow.types.is_floating(values.type):
        texts = pyarrow.compute.replace_substring_regex(written, WHOLE, "")
        return pyarrow.compute.count_distinct(texts).as_py() > pyarrow.compute.count_distinct(values).as_py()
    return pyarrow.types.is_temporal(values.type)


READERS: dict[str, Callable[[io.BytesIO], pyarrow.Table]] = {
    ".jsonl": pyarrow.json.read_json,
    ".csv": _read_csv,
    ".parquet": pyarrow.parquet.read_table,
}


def _names_files(column: str) -> bool:
    return column == FILE_NAME or column.endswith(f"_{FILE_NAME}")


def _paths(table: pyarrow.Table, column: str, file: Path) -> list[Path | None]:
    names = table[column].to_pylist()
    for row, name in enumerate(names):
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{column} in row {row} of {file} is {name!r}, but must be the path of a file.")
        if not name and column == FILE_NAME:
            raise ValueError(f"{column} in row {row} of {file} is empty; give the path of its image, or drop the row.")
    return [file.parent / name if name else None for name in names]


def _check_present(paths: dict[str, list[Path | None]], file: Path) -> None:
    missing = [str(path) for each in paths.values() for path in each if path is not None and not path.is_file()]
    if missing:
        raise ValueError(
            f"{file} names {counted(len(missing), 'file')} that cannot be found: {some(missing)}. Its paths "
            "must be relative to its own folder; add the files, or drop their rows."
        )
