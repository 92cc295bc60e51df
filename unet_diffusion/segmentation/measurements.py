"""A table of objects: where they are, how large, of which class, and how bright."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_diffusion.segmentation.objects import add_sums

DIGITS = "%.8g"  # of measurements in CSV files


def object_table(
    objects: np.ndarray,
    image: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] | None = None,
    pixel_size: tuple[float, float] | None = None,
) -> dict[str, np.ndarray]:
    """Measures objects, as `skimage.measure.regionprops` does.

    Args:
        objects: integer (H, W), 1..n and 0 for the background, as `find_objects` returns them.
        image: stored values (C, H, W).
        probabilities: of each class, (K, H, W).
        class_names: of the K classes; by default their indices.
        pixel_size: height and width of a pixel in micrometres, or None.

    Returns:
        Columns with an entry for each object: `object`, its number in `objects`; `class`, the index of its class (the
        one with the largest mean probability in it), and `class_name`; `area` in pixels; `y` and `x` of its centre,
        where 0 is the middle of the first row and column; `top`, `left`, `bottom` and `right`, the rows and columns of
        its box, without `bottom` and `right` themselves; `major_axis`, `minor_axis` and `eccentricity` of the ellipse
        with the same second moments; `solidity`, its share of its convex hull; `confidence`, the mean probability of
        its class; and `mean_0`, ..., the mean stored value of each channel. With a pixel size there are also `area_um2`
        in square micrometres and, in micrometres, `diameter_um` of a circle of this area, `major_axis_um` and
        `minor_axis_um`. Numbers that no pixel has are left out.
    """
    measured = ObjectMeasurements(int(objects.max(initial=0)), len(image), len(probabilities))
    measured.add(objects, image, probabilities)
    return measured.table(class_names, pixel_size)


class ObjectMeasurements:
    """Measures objects block by block; the result does not depend on how the image is cut into blocks.

    Memory grows with the number of objects and with the rows that they span.

    Args:
        count: the largest number of an object.
        channels: number of channels of the image.
        num_classes: number of classes, background included.
    """

    def __init__(self, count: int, channels: int, num_classes: int) -> None:
        self.area, self.moments = np.zeros(count), np.zeros((5, count), dtype=np.int64)
        self.box = np.full((4, count), np.iinfo(np.int64).max)  # top, left, and the negatives of bottom and right
        self.brightness, self.chances = np.zeros((channels, count)), np.zeros((num_classes - 1, count))
        self.extents = [np.zeros((4, 0), dtype=np.int32)]

    def add(
        self, objects: np.ndarray, image: np.ndarray, probabilities: np.ndarray, top: int = 0, left: int = 0
    ) -> None:
        """Adds a block.

        Args:
            objects: the objects' numbers, (h, w), 0 for the background.
            image: stored values (C, h, w).
            probabilities: of each class, (K, h, w).
            top: row of the image at which the block starts.
            left: column at which it starts.
        """
        inside = np.flatnonzero(objects)
        numbers = objects.ravel()[inside].astype(np.int64)
        rows, columns = np.divmod(inside, objects.shape[1])
        add_sums(self.area, numbers, None)
        for total, values in zip((*self.brightness, *self.chances), (*image, *probabilities[1:])):
            add_sums(total, numbers, values.ravel()[inside])
        extents = _extents(numbers - 1, rows, columns)
        box = np.full_like(self.box, np.iinfo(np.int64).max)
        for side, values in zip(box, (extents[1], extents[2], -extents[1] - 1, -extents[3] - 1)):
            np.minimum.at(side, extents[0], values)
        there = np.unique(extents[0])
        y, x = rows - box[0][numbers - 1], columns - box[1][numbers - 1]  # small numbers, so that sums are exact
        sums = np.zeros((6, self.area.size))
        for total, values in zip(sums, (y, x, y * y, y * x, x * x, None)):
            add_sums(total, numbers, values)
        self.moments[:, there] += _shifted(sums[:, there].astype(np.int64), box[0][there] + top, box[1][there] + left)
        box[:, there] += np.array([[top], [left], [-top], [-left]])
        self.box = np.minimum(self.box, box)
        self.extents.append((extents + np.array([[0], [top], [left], [left]])).astype(np.int32))

    def table(
        self, class_names: Sequence[str] | None = None, pixel_size: tuple[float, float] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the columns of `object_table`."""
        (there,) = np.nonzero(self.area)
        area, box = self.area[there], self.box[:, there]
        names = map(str, range(len(self.chances) + 1)) if class_names is None else class_names
        means = self.chances[:, there] / area
        classes = means.argmax(axis=0)
        sums = np.concatenate([self.moments[:, there], area[None].astype(np.int64)])
        y, x, *squares = _shifted(sums, -box[0], -box[1]) / area
        moments = (squares[0] - y * y, squares[1] - y * x, squares[2] - x * x)
        major, minor = _ellipse_axes(*moments)
        ratio = np.divide(minor, major, out=np.ones_like(major), where=major > 0)
        return {
            "object": there + 1,
            "class": classes + 1,
            "class_name": np.array(list(names), dtype=object)[classes + 1],
            "area": area.astype(np.int64),
            "y": y + box[0],
            "x": x + box[1],
            "top": box[0],
            "left": box[1],
            "bottom": -box[2],
            "right": -box[3],
            "major_axis": major,
            "minor_axis": minor,
            "eccentricity": np.sqrt(1 - ratio**2),
            "solidity": area / self._hull_areas()[there],
            "confidence": means[classes, np.arange(len(classes))],
            **{f"mean_{channel}": values / area for channel, values in enumerate(self.brightness[:, there])},
            **({} if pixel_size is None else _in_micrometres(area, moments, *pixel_size)),
        }

    def _hull_areas(self) -> np.ndarray:
        """Returns the area of each object's convex hull in pixels; 1 for numbers that no pixel has."""
        numbers, rows, left, right = _joined_extents(np.concatenate(self.extents, axis=1))
        areas = np.ones(self.area.size)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        rows, left, right = rows.tolist(), left.tolist(), right.tolist()
        for number, start, stop in zip(numbers[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)]):
            areas[number] = hull_area(rows[start:stop], left[start:stop], right[start:stop])
        return areas


def joined_tables(tables: Sequence[dict[str, np.ndarray]]) -> Any:
    """Joins tables of objects to one pandas DataFrame; its column `image` holds each table's place in the sequence."""
    import pandas  # here, as SciPy in `objects`

    frames = [as_frame({"image": np.full(len(table["object"]), i), **table}) for i, table in enumerate(tables)]
    return pandas.concat(frames, ignore_index=True) if frames else as_frame({"image": np.zeros(0, dtype=np.int64)})


def as_frame(table: dict[str, np.ndarray]) -> Any:
    """Returns a table of objects as a pandas DataFrame."""
    import pandas

    return pandas.DataFrame(table)


def table_as_csv(table: Any) -> bytes:
    """Returns the content of the CSV file of a DataFrame."""
    return table.to_csv(index=False, lineterminator="\n", float_format=DIGITS).encode()


def hull_area(rows: list[int], left: list[int], right: list[int]) -> int:
    """Counts the pixels of the convex hull of an object, as `skimage.morphology.convex_hull_image` does.

    It is the hull of the middles of the four edges of each pixel, and a pixel belongs to it if its own middle does. All
    this is computed in whole numbers.

    Args:
        rows: of the object, ascending.
        left: its first column in each of them.
        right: its last column in each of them.
    """
    ends = _furthest(rows, right)
    starts = _furthest(rows, [-column for column in left])
    return sum(ends) + sum(starts) + len(ends)


def _furthest(rows: list[int], columns: list[int]) -> list[int]:
    """Returns the last column of the convex hull in each row, given the last column of the object."""
    points: list[tuple[int, int]] = []  # row and column in half pixels; the hull turns only one way
    before, last = rows[0] - 1, columns[0]
    for row, column in zip(rows, columns):
        if row - 1 > before:
            _add_to_hull(points, (2 * before + 1, 2 * last))
            last = column
        _add_to_hull(points, (2 * row - 1, 2 * max(last, column)))
        _add_to_hull(points, (2 * row, 2 * column + 1))
        before, last = row, column
    _add_to_hull(points, (2 * rows[-1] + 1, 2 * columns[-1]))
    result, place = [], 0
    for row in range(2 * rows[0], 2 * rows[-1] + 1, 2):
        while points[place + 1][0] < row:
            place += 1
        (y, x), (further_y, further_x) = points[place], points[place + 1]
        result.append((x * (further_y - y) + (further_x - x) * (row - y)) // (2 * (further_y - y)))
    return result


def _add_to_hull(points: list[tuple[int, int]], point: tuple[int, int]) -> None:
    """Adds a point at the end, and removes points that are then inside the hull."""
    y, x = point
    while len(points) > 1:
        (first_y, first_x), (last_y, last_x) = points[-2:]
        if (last_x - first_x) * (y - first_y) > (x - first_x) * (last_y - first_y):
            break
        points.pop()
    points.append(point)


def _extents(numbers: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns number, row, first and last column of each object in each row, given sorted pixels; int64 (4, m)."""
    starts = (np.diff(numbers, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
    ends = np.append(starts[1:], True)[: len(starts)]
    return _joined_extents(np.stack([numbers[starts], rows[starts], columns[starts], columns[ends]]))


def _joined_extents(extents: np.ndarray) -> np.ndarray:
    """Joins extents of the same object in the same row; sorts by object, then by row."""
    number, row, left, right = extents[:, np.lexsort((extents[1], extents[0]))]
    (starts,) = np.nonzero((np.diff(number, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0))
    if not len(starts):
        return extents
    return np.stack(
        [number[starts], row[starts], np.minimum.reduceat(left, starts), np.maximum.reduceat(right, starts)]
    )


def _shifted(sums: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the sums of y, x, yy, yx and xx after a shift, given these and the number of pixels, (6, n)."""
    y, x, yy, yx, xx, pixels = sums
    return np.stack(
        [
            y + down * pixels,
            x + right * pixels,
            yy + 2 * down * y + down * down * pixels,
            yx + down * x + right * y + down * right * pixels,
            xx + 2 * right * x + right * right * pixels,
        ]
    )


def _in_micrometres(
    area: np.ndarray, moments: tuple[np.ndarray, np.ndarray, np.ndarray], high: float, wide: float
) -> dict[str, np.ndarray]:
    """Returns the columns in micrometres; pixels need not be square."""
    yy, yx, xx = moments
    major, minor = _ellipse_axes(yy * high * high, yx * high * wide, xx * wide * wide)
    areas = area * high * wide
    names = {"area_um2": areas, "diameter_um": np.sqrt(4 * areas / np.pi)}
    return {**names, "major_axis_um": major, "minor_axis_um": minor}


def _ellipse_axes(yy: np.ndarray, yx: np.ndarray, xx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the axes of the ellipses with these second central moments (per pixel)."""
    middle, spread = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    smaller = np.maximum(middle - spread, 0)
    return 4 * np.sqrt(middle + spread), 4 * np.sqrt(smaller)
