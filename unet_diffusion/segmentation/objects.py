"""Objects from the maps of a network: where one ends and the next begins, and a table of what they are.

SciPy and scikit-image are imported where they are used, since an exported pipeline that gives masks needs neither.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unet_diffusion.checks import require

SMOOTHING = 0.08  # sigma of the Gaussian over the height, in diameters of an object
LOWEST_PASS = {"mask": 0.87, "maps": 0.8}  # of the lower of two summits that belong to one object, by measurement
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows down and columns to the right; the others are their opposites
Window = tuple[slice, slice]


def find_objects(
    probabilities: np.ndarray,
    boundary: np.ndarray | None = None,
    distance: np.ndarray | None = None,
    *,
    diameter: float | None = None,
    min_area: int = 0,
    max_hole: int = 0,
) -> np.ndarray:
    """Finds the objects in the class probabilities of an image, and separates those that touch.

    Each object is a summit of a height: of the distance to the edge of the mask or, where the network has learnt maps
    of objects, of the distance and of 1 - boundary, multiplied where there are both. The height is smoothed by a
    Gaussian of 0.08 diameters, and every pixel belongs to the summit that the steepest ascent leads to (a watershed;
    Meyer 1994 calls it topographic). Two summits are one object if the pass between them reaches 0.87 of the lower one,
    or 0.8 with maps: the dynamics of Grimaud 1992 as a ratio, so that it holds for small objects and large ones.

    Without maps, an object ends where the class changes. With maps, it may hold pixels of several classes, but summits
    around which different classes are the most probable are never one object.

    Args:
        probabilities: of each class, (K, H, W), K >= 2, where class 0 is the background. A pixel belongs to an object
            if another class is the most probable.
        boundary: probability that a pixel lies on the inner boundary of an object, (H, W), in [0, 1].
        distance: of each pixel of an object from its boundary, (H, W), about 0 there and 1 in its middle.
        diameter: of usual objects, in pixels; None takes twice the median, over the connected parts of the mask, of the
            largest distance from the edge.
        min_area: objects of fewer pixels are left out.
        max_hole: holes of at most this many pixels are filled. A hole is background that does not reach the border of
            the image, also by corners.

    Returns:
        int32 (H, W): 0 for the background, 1..n for the objects, in the order of their first pixels, row by row. Each
        object is connected (corners count).

    Raises:
        ValueError: maps of another size, fewer than two classes, or a number out of its range.
    """
    _check_maps(probabilities, (boundary, distance), diameter, min_area, max_hole)
    classes = probabilities.argmax(axis=0)
    holes = _holes(classes > 0, max_hole)
    classes[holes] = probabilities[1:, holes].argmax(axis=0) + 1
    has_maps = boundary is not None or distance is not None
    regions = _connected(classes > 0 if has_maps else classes)
    depth = None if has_maps and diameter is not None else _depth(classes, has_maps)
    if diameter is None:
        assert depth is not None
        diameter = _usual_diameter(regions, depth)
    if not has_maps:
        assert depth is not None
        height = depth
    else:
        height = (classes > 0).astype(np.float32)  # 0 outside, where no boundary is learnt
        height = height if boundary is None else height * (1 - boundary)
        height = height if distance is None else height * distance
    objects = _ordered(_split(_smoothed(height, SMOOTHING * diameter), regions, probabilities, has_maps))
    if min_area > 1 and (np.bincount(objects.ravel())[1:] < min_area).any():
        kept = np.bincount(objects.ravel()) >= min_area
        objects = _ordered(np.where(kept[objects], objects, 0))
        objects = _filled(objects, _holes(objects > 0, max_hole))
    return objects


def one_hot(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns a mask of class indices (H, W) as probabilities of 0 and 1, float32 (K, H, W); others are background."""
    classes = np.arange(num_classes).reshape(-1, 1, 1)
    return (np.where(mask < num_classes, mask, 0) == classes).astype(np.float32)


def object_classes(objects: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the class of each object, which has the largest mean probability within it, and this probability.

    Args:
        objects: integer (H, W), 1..n and 0 for the background.
        probabilities: of each class, (K, H, W), where class 0 is the background, which no object is.

    Returns:
        int64 (n,) in 1..K-1, and float64 (n,) in [0, 1].
    """
    means = _means(objects, probabilities[1:])
    classes = means.argmax(axis=0)
    return classes + 1, means[classes, np.arange(len(classes))]


def object_table(
    objects: np.ndarray, image: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Measures objects, through `skimage.measure.regionprops_table`.

    Args:
        objects: integer (H, W), 1..n and 0 for the background, as `find_objects` returns them.
        image: stored values (C, H, W).
        probabilities: of each class, (K, H, W).
        class_names: of the K classes; by default their indices.

    Returns:
        Columns with an entry for each object: `object`, its number in `objects`; `class`, its index, and `class_name`
        (`object_classes`); `area` in pixels; `y` and `x` of its centre, where 0 is the middle of the first row and
        column; `top`, `left`, `bottom` and `right`, the rows and columns of its box, without `bottom` and `right`
        themselves; `major_axis`, `minor_axis` and `eccentricity` of the ellipse with the same second moments;
        `solidity`, the share of its convex hull; `confidence`, the mean probability of its class; and `mean_0`, ... of
        the stored values of each channel.
    """
    import warnings

    from skimage.measure import regionprops_table

    properties = ("area", "centroid", "bbox", "axis_major_length", "axis_minor_length", "eccentricity", "solidity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects of a pixel or a line have no hull in Qhull; their solidity is 1
        found = regionprops_table(objects, properties=("label", *properties))
    classes, confidence = object_classes(objects, probabilities)
    names = np.array(list(map(str, range(len(probabilities))) if class_names is None else class_names), dtype=object)
    means = {f"mean_{channel}": values for channel, values in enumerate(_means(objects, image))}
    return {
        "object": found["label"],
        "class": classes,
        "class_name": names[classes],
        "area": found["area"].astype(np.int64),
        "y": found["centroid-0"],
        "x": found["centroid-1"],
        **{name: found[f"bbox-{side}"] for side, name in enumerate(("top", "left", "bottom", "right"))},
        "major_axis": found["axis_major_length"],
        "minor_axis": found["axis_minor_length"],
        "eccentricity": found["eccentricity"],
        "solidity": found["solidity"],
        "confidence": confidence,
        **means,
    }


def joined_tables(tables: Sequence[dict[str, np.ndarray]]) -> Any:
    """Returns tables of objects as one pandas DataFrame, with the place of each table in the column `image`."""
    import pandas

    frames = [pandas.DataFrame({"image": np.full(len(table["object"]), i), **table}) for i, table in enumerate(tables)]
    return pandas.concat(frames, ignore_index=True)


def _check_maps(
    probabilities: np.ndarray,
    maps: tuple[np.ndarray | None, ...],
    diameter: float | None,
    min_area: int,
    max_hole: int,
) -> None:
    """Raises a ValueError for wrong arguments of `find_objects`."""
    if probabilities.ndim != 3 or len(probabilities) < 2 or 0 in probabilities.shape:
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, but must be (K, H, W) of at least 2 classes; give those "
            "of one image."
        )
    height, width = probabilities.shape[1:]
    for name, given in zip(("boundary", "distance"), maps):
        if given is not None and given.shape != (height, width):
            raise ValueError(
                f"{name} has shape {given.shape}, but probabilities are of {height}x{width}; give the same."
            )
    valid = diameter is None or (diameter > 0 and math.isfinite(diameter))
    require(valid, "diameter", diameter, "must be a positive number of pixels, or None")
    require(min_area >= 0, "min_area", min_area, "must be 0 pixels or more")
    require(max_hole >= 0, "max_hole", max_hole, "must be 0 pixels or more")


def _connected(classes: np.ndarray) -> np.ndarray:
    """Labels the parts of one class that are connected by edges: int (H, W), 0 for class 0."""
    from skimage.measure import label

    return label(classes, background=0, connectivity=1)


def _holes(foreground: np.ndarray, largest: int) -> np.ndarray:
    """Returns the holes of at most so many pixels, bool (H, W); background is connected by corners too."""
    from skimage.measure import label

    if largest == 0:
        return np.zeros(foreground.shape, dtype=bool)
    parts = label(~foreground, connectivity=2)
    small = np.bincount(parts.ravel()) <= largest
    small[0] = False
    for side in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        small[side] = False
    return small[parts]


def _filled(objects: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Gives each pixel of a hole to the nearest object."""
    from scipy import ndimage

    if not holes.any():
        return objects
    rows, columns = ndimage.distance_transform_edt(objects == 0, return_distances=False, return_indices=True)
    return np.where(holes, objects[rows, columns], objects)


def _depth(classes: np.ndarray, as_one: bool) -> np.ndarray:
    """Returns the distance to the nearest pixel of another class, float32 (H, W), or to the background if `as_one`."""
    from scipy import ndimage

    depth = np.zeros(classes.shape, dtype=np.float32)
    for each in [classes > 0] if as_one else [classes == label for label in np.unique(classes) if label]:
        if each.all():  # there is no other pixel to measure the distance to
            return np.full(classes.shape, max(classes.shape) / 2, dtype=np.float32)
        np.maximum(depth, ndimage.distance_transform_edt(each), out=depth, casting="same_kind")
    return depth


def _usual_diameter(regions: np.ndarray, depth: np.ndarray) -> float:
    """Returns twice the median of the largest depths of all regions, in pixels; 1 if there is none."""
    deepest = np.zeros(int(regions.max()) + 1, dtype=np.float32)
    np.maximum.at(deepest, regions.ravel(), depth.ravel())
    return 2 * float(np.median(deepest[1:])) if len(deepest) > 1 else 1.0


def _smoothed(height: np.ndarray, sigma: float) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(height.astype(np.float32, copy=False), sigma, mode="nearest")


def _split(height: np.ndarray, regions: np.ndarray, probabilities: np.ndarray, has_maps: bool) -> np.ndarray:
    """Labels the objects of regions (H, W), 0 for the background, with numbers that are not consecutive."""
    basins, summits = _basins(height, regions)
    if not len(summits):
        return basins
    classes, _ = object_classes(basins, probabilities)
    passes = _passes(height, regions, basins)
    roots = _merged(passes, summits.tolist(), classes.tolist(), LOWEST_PASS["maps" if has_maps else "mask"])
    return np.append(0, roots + 1)[basins]


def _steps(shape: tuple[int, ...]) -> Iterator[tuple[Window, Window]]:
    """Yields the windows of all pixels that have a neighbour in a direction, and of these neighbours."""
    rows, columns = shape
    for down, right in NEIGHBOURS:
        left, right = max(-right, 0), max(right, 0)
        yield (
            (slice(0, rows - down), slice(left, columns - right)),
            (slice(down, rows), slice(right, columns - left)),
        )


def _basins(height: np.ndarray, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follows the steepest ascent from each pixel; of equal heights, it leads to the pixel that comes later.

    Returns:
        int (H, W), the number of the summit of each pixel, from 1 up, 0 for the background; and the heights of the
        summits.
    """
    places = np.arange(height.size, dtype=np.int64).reshape(height.shape)
    upwards, highest = places.copy(), height.copy()
    for first, second in _steps(height.shape):
        same = (regions[first] == regions[second]) & (regions[first] > 0)
        for here, there, later in ((first, second, True), (second, first, False)):
            up = same & (height[there] >= highest[here] if later else height[there] > highest[here])
            np.copyto(highest[here], height[there], where=up)
            np.copyto(upwards[here], places[there], where=up)
    inside, leads_to = np.flatnonzero(regions), upwards.reshape(-1)
    reached = leads_to[inside]
    while not np.array_equal(reached, further := leads_to[reached]):
        leads_to[inside] = reached = further
    summits = inside[reached == inside]
    numbers = np.zeros(height.size, dtype=np.int64)
    numbers[summits] = np.arange(1, len(summits) + 1)
    numbers[inside] = numbers[reached]
    return numbers.reshape(height.shape), height.ravel()[summits]


def _passes(height: np.ndarray, regions: np.ndarray, basins: np.ndarray) -> list[tuple[int, int, float]]:
    """Returns pairs of neighbouring basins, counted from 0, with the height of the pass between them; highest first."""
    count = int(basins.max()) + 1
    pairs, heights = [], []
    for first, second in _steps(height.shape):
        meet = (basins[first] != basins[second]) & (regions[first] == regions[second])
        one, other = basins[first][meet], basins[second][meet]
        pairs.append(np.minimum(one, other) * count + np.maximum(one, other))
        heights.append(np.minimum(height[first][meet], height[second][meet]))
    pair, level = np.concatenate(pairs), np.concatenate(heights)
    order = np.lexsort((pair, -level))
    _, firsts = np.unique(pair[order], return_index=True)
    chosen = order[np.sort(firsts)]  # of each pair the highest, and the highest pair first
    one, other = np.divmod(pair[chosen], count)
    return list(zip((one - 1).tolist(), (other - 1).tolist(), level[chosen].tolist()))


def _merged(
    passes: list[tuple[int, int, float]], summits: list[float], classes: list[int], lowest: float
) -> np.ndarray:
    """Joins basins over passes, the highest first; returns the basin with the highest summit of each one's object."""
    leader = list(range(len(summits)))

    def find(basin: int) -> int:
        while leader[basin] != basin:
            leader[basin] = basin = leader[leader[basin]]
        return basin

    for one, other, level in passes:
        one, other = sorted((find(one), find(other)), key=lambda basin: (summits[basin], basin))
        if one != other and classes[one] == classes[other] and level >= lowest * summits[one]:
            leader[one] = other
    return np.array([find(basin) for basin in range(len(summits))], dtype=np.int64)


def _ordered(labels: np.ndarray) -> np.ndarray:
    """Numbers labels (H, W) 1..n in the order of their first pixels, int32; 0 stays."""
    places = np.flatnonzero(labels)[::-1]
    values = labels.ravel()[places]
    firsts = np.full(int(labels.max()) + 1, -1)
    firsts[values] = places  # the last one counts, which is the first in the image
    used = np.flatnonzero(firsts >= 0)
    numbers = np.zeros(len(firsts), dtype=np.int32)
    numbers[used[np.argsort(firsts[used])]] = np.arange(1, len(used) + 1)
    return numbers[labels]


def _means(objects: np.ndarray, maps: Any) -> np.ndarray:
    """Returns the means of maps (M, H, W) over objects 1..n, float64 (M, n)."""
    labels = objects.ravel()
    sizes = np.bincount(labels, minlength=1)[1:]
    sums = [np.bincount(labels, weights=each.ravel(), minlength=1)[1:] for each in maps]
    return np.stack(sums) / sizes
