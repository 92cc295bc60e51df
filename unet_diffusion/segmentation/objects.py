"""Objects from the maps of a network: where one ends and the next begins, also in images larger than memory.

SciPy and scikit-image are imported where they are used, since an exported pipeline that gives masks needs neither.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from unet_diffusion.checks import require
from unet_diffusion.segmentation.blocks import NEIGHBOURS, Parts, Window, blocks, connected_parts, grown, steps

SMOOTHING = 0.08  # sigma of the Gaussian over the height, in diameters of an object
# As a share of the lower of two summits that belong to one object, by measurement, for no map, one and two. The height
# of two maps is a product, so its passes are lower.
LOWEST_PASS = (0.9, 0.8, 0.6)
SLIGHT = 0.05  # descent to a pass that never separates, for heights from maps (0 to 1), whose noise is not more
SLIGHT_OF_MASK = 0.6  # the same in pixels for a mask, whose width changes where a slanted edge has a step
HALO = 64  # pixels around a block in which its distances to the edge of the mask are first looked for
BAND = 64  # rows whose distances are computed at once
LARGEST_WINDOW = 2**25  # pixels of a block with its surroundings, unless the image is one block


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

    Each object is a summit of a height. Without object maps, the height is the distance to the edge of the mask. If the
    network has learnt object maps, it is the distance or 1 - boundary, or their product if there are both; beside the
    background, the boundary then counts only as far as the distance is below 1. The height
    is smoothed by a Gaussian of 0.08 diameters, and every pixel belongs to the summit that the steepest ascent leads to
    (a watershed; Meyer 1994 calls it topographic). Two summits are one object if the pass between them reaches 0.9 of
    the lower summit, 0.8 with one map, or 0.6 with both. These are the dynamics of Grimaud 1992 as a ratio, so that
    they suit small and large objects. A pass less than 0.05 below the lower summit, or 0.6 pixels without maps, also
    joins, so that noise and the steps of slanted edges separate nothing in objects that are a few pixels wide.

    Without maps, an object ends where the class changes. With maps, it may hold pixels of several classes, but summits
    around which different classes are the most probable are never one object.

    Args:
        probabilities: of each class, (K, H, W), K >= 2, where class 0 is the background. A pixel belongs to an object
            if another class is the most probable.
        boundary: probability that a pixel lies on the inner boundary of an object, (H, W), in [0, 1].
        distance: of each pixel of an object from its boundary, (H, W), about 0 there and 1 in its middle.
        diameter: the diameter of usual objects, in pixels. None takes the largest distance from the edge in each
            connected part of the mask, and twice the median of these.
        min_area: objects of fewer pixels are left out.
        max_hole: holes of at most this many pixels are filled. A hole is background that is not connected to the border
            of the image, not even by corners.

    Returns:
        int32 (H, W): 0 for the background, 1..n for the objects, in the order of their first pixels, row by row. Each
        object is connected (corners count). Parts of the mask that meet at corners alone are different objects.

    Raises:
        ValueError: the maps have another size, there are fewer than two classes, or a number is out of its range.
    """
    search = ObjectSearch(probabilities, boundary, distance, np.zeros, max(probabilities.shape))
    return search.find(diameter, min_area, max_hole)[0]


def one_hot(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns a mask of class indices (H, W) as probabilities 0 and 1, float32 (K, H, W); others are background."""
    classes = np.arange(num_classes).reshape(-1, 1, 1)
    return (np.where(mask < num_classes, mask, 0) == classes).astype(np.float32)


class ObjectSearch:
    """Finds the objects of `find_objects` block by block, in maps that may be larger than memory.

    The result does not depend on the blocks, and objects may be as large as the image. Basins, passes between them and
    holes are collected over all blocks, and only then are basins joined to objects. Memory grows with the number of
    basins, not with the image. The surroundings of a block are read as far as the distance to the edge of the mask
    requires.

    Args:
        probabilities: (K, H, W), an array or anything else from which windows can be read.
        boundary: (H, W), in the same way, or None.
        distance: (H, W), in the same way, or None.
        create: returns an array of zeros of a given shape and type, to which windows can be assigned. It is called up
            to 9 times for maps (H, W).
        side: of the blocks, in pixels.

    Raises:
        ValueError: the maps have another size, or there are fewer than two classes.
    """

    def __init__(
        self,
        probabilities: Any,
        boundary: Any,
        distance: Any,
        create: Callable[[tuple[int, int], np.dtype], Any],
        side: int,
    ) -> None:
        _check_maps(probabilities.shape, (boundary, distance))
        self.probabilities, self.boundary, self.distance = probabilities, boundary, distance
        self.lowest_pass = LOWEST_PASS[(boundary is not None) + (distance is not None)]
        self.has_maps = boundary is not None or distance is not None
        self.slight = SLIGHT if self.has_maps else SLIGHT_OF_MASK
        self.num_classes, height, width = probabilities.shape
        self.shape, self.side, self.create = (height, width), side, create
        self.integers = np.dtype(np.int32 if height * width < 2**31 else np.int64)

    def find(self, diameter: float | None, min_area: int, max_hole: int) -> tuple[Any, int]:
        """Returns the objects as `find_objects` does, in an array from `create`, and their number.

        Raises:
            ValueError: a number is out of its range; or, in an image of several blocks, a part of the mask is so wide
                that its middle is about 2,000 pixels from its edge.
        """
        _check_numbers(diameter, min_area, max_hole)
        self._find_classes(max_hole)
        self.regions = self._connected(
            lambda window: self._foreground(window) if self.has_maps else self.classes[window]
        )
        self.depth = None
        if not self.has_maps or diameter is None:
            self.depth = self.create(self.shape, np.dtype(np.float32))
            for block in self._blocks():
                self.depth[block] = self._depth_of(block)
        self.heights = self.create(self.shape, np.dtype(np.float32))
        sigma = SMOOTHING * (self._usual_diameter() if diameter is None else diameter)
        for block in self._blocks():
            self.heights[block] = self._smoothed(block, sigma)
        basins = self._basins()
        objects = self._without_small(self._joined(basins), min_area, max_hole)
        return self._ordered(objects)

    def _blocks(self) -> Iterator[Window]:
        return blocks(self.shape, self.side)

    def _integers(self) -> Any:
        return self.create(self.shape, self.integers)

    def _foreground(self, window: Window) -> np.ndarray:
        return np.asarray(self.classes[window]) > 0

    def _connected(self, read: Callable[[Window], np.ndarray], corners: bool = False) -> Parts:
        return connected_parts(read, self.shape, self.side, self._integers(), corners)

    def _find_classes(self, max_hole: int) -> None:
        """Finds the most probable class of each pixel; pixels in holes get that of the nearest object."""
        from scipy import ndimage

        self.classes = self.create(self.shape, np.min_scalar_type(self.num_classes))
        for block in self._blocks():
            self.classes[block] = self.probabilities[:, *block].argmax(axis=0)
        for block, holes in self._holes(self._foreground, max_hole):
            window, inner = grown(block, math.isqrt(max_hole) + 2, self.shape)
            classes = self.probabilities[:, *window].argmax(axis=0)  # as they were before any hole was filled
            rows, columns = ndimage.distance_transform_edt(classes == 0, return_distances=False, return_indices=True)
            self.classes[block] = np.where(holes, classes[rows, columns][inner], classes[inner])

    def _holes(self, foreground: Callable[[Window], np.ndarray], largest: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Yields the blocks that have pixels in holes of at most `largest` pixels, and these pixels."""
        if largest == 0:
            return
        parts = self._connected(lambda window: ~foreground(window), corners=True)
        small = parts.sizes <= largest
        small[0] = False
        everything, last = slice(None), slice(-1, None)
        for border in ((slice(1), everything), (last, everything), (everything, slice(1)), (everything, last)):
            small[parts[border]] = False
        for block in self._blocks():
            if (holes := small[parts[block]]).any():
                yield block, holes

    def _depth_of(self, block: Window) -> np.ndarray:
        """Returns the distance of a block's pixels to the nearest pixel of another class; with maps, of background.

        A distance is certain if no pixel outside the window that was read can be nearer.
        """
        halo = 0 if self.side >= max(self.shape) else HALO
        while True:
            window, inner = grown(block, halo, self.shape)
            classes = np.asarray(self.classes[window])
            depth = _depth(classes, self.has_maps)
            if classes.shape == self.shape:
                return depth[inner]
            has_edge = not _is_one(classes, self.has_maps)
            if has_edge and (depth[inner] <= _reach(window, inner, self.shape) - 1).all():  # 1 for the quarters
                return depth[inner]
            if classes.size > LARGEST_WINDOW:
                place = f"rows {block[0].start} to {block[0].stop}, columns {block[1].start} to {block[1].stop}"
                raise ValueError(
                    f"the mask has pixels in {place} that are more than {halo} pixels from its edge, which is too much "
                    "for objects in an image of this size; shrink the image, or find them in parts of it."
                )
            halo *= 2

    def _usual_diameter(self) -> float:
        """Returns twice the median of the largest depths of all regions, in pixels; 1 if there is none."""
        assert self.depth is not None
        deepest = np.zeros(len(self.regions.sizes), dtype=np.float32)
        for block in self._blocks():
            np.maximum.at(deepest, self.regions[block].ravel(), np.asarray(self.depth[block]).ravel())
        return 2 * float(np.median(deepest[1:])) if len(deepest) > 1 else 1.0

    def _smoothed(self, block: Window, sigma: float) -> np.ndarray:
        """Returns the height of a block's pixels, smoothed by a Gaussian."""
        from scipy import ndimage

        radius = int(4 * sigma + 0.5)
        window, inner = grown(block, radius + 1, self.shape)  # 1 for the neighbours of a pixel
        if self.has_maps:
            height = _height_of_maps(
                self._foreground(window),
                None if self.boundary is None else self.boundary[window],
                None if self.distance is None else self.distance[window],
            )
        else:
            assert self.depth is not None
            height = np.asarray(self.depth[window])
        height = height.astype(np.float32, copy=False)
        return ndimage.gaussian_filter(height, sigma, mode="nearest", radius=radius)[inner]

    def _basins(self) -> Parts:
        """Finds the summit that the steepest ascent leads to from each pixel.

        An ascent that leaves a block goes on in the neighbouring one. Summits are numbered by position, row by row.
        """
        labels, count = self._integers(), 0
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for block in self._blocks():
            window, inner = grown(block, 1, self.shape)
            height = np.asarray(self.heights[window])
            numbers, rows, columns = _ascents(height, self.regions[window], inner)
            labels[block] = np.where(numbers > 0, numbers + count, 0)
            count += len(rows)
            outside = np.ones(height.shape, dtype=bool)
            outside[inner] = False
            places = (rows + window[0].start) * self.shape[1] + columns + window[1].start
            found.append((places, outside[rows, columns]))
        places, leaves = (np.concatenate(each) for each in zip(*found))
        leads_to = np.arange(count + 1)
        (left,) = np.nonzero(leaves)
        if len(left):
            leads_to[left + 1] = labels[np.divmod(places[left], self.shape[1])]
        while not np.array_equal(leads_to, further := leads_to[leads_to]):
            leads_to = further
        (summits,) = np.nonzero(~leaves)
        summits = summits[np.argsort(places[summits])]
        numbers = np.zeros(count + 1, dtype=np.int64)
        numbers[summits + 1] = np.arange(1, len(summits) + 1)
        self.summits = np.divmod(places[summits], self.shape[1])
        return Parts(labels, numbers[leads_to], np.zeros(0, dtype=np.int64))

    def _joined(self, basins: Parts) -> Parts:
        """Joins the basins of each object, whose numbers are not consecutive."""
        count = len(self.summits[0])
        if not count:
            return basins
        heights = np.asarray(self.heights[self.summits])
        sums, sizes = np.zeros((self.num_classes - 1, count)), np.zeros(count)
        pairs, levels = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
        for block in self._blocks():
            numbers = basins[block]
            for values, total in zip((*self.probabilities[1:, *block], None), (*sums, sizes)):
                add_sums(total, numbers, values)
            window, _ = grown(block, 1, self.shape)
            pair, level = _passes(np.asarray(self.heights[window]), self.regions[window], basins[window], count + 1)
            pairs.append(pair)
            levels.append(level)
        pair, level = _highest(np.concatenate(pairs), np.concatenate(levels))
        one, other = np.divmod(pair, count + 1)
        passes = list(zip((one - 1).tolist(), (other - 1).tolist(), level.tolist()))
        classes = (sums / sizes).argmax(axis=0)
        roots = _merged(passes, heights.tolist(), classes.tolist(), self.lowest_pass, self.slight)
        return Parts(basins.labels, np.append(0, roots + 1)[basins.numbers], basins.sizes)

    def _without_small(self, objects: Parts, min_area: int, max_hole: int) -> Parts:
        """Removes objects of fewer than `min_area` pixels, and fills the holes that this makes in other objects."""
        if min_area <= 1:
            return objects
        sizes = np.zeros(int(objects.numbers.max()))
        for block in self._blocks():
            add_sums(sizes, objects[block], None)
        kept = np.append(0, np.where(sizes >= min_area, np.arange(1, len(sizes) + 1), 0))
        if ((sizes > 0) & (sizes < min_area)).any():
            objects = Parts(objects.labels, kept[objects.numbers], objects.sizes)
            objects = self._filled(objects, max_hole)
        return objects

    def _filled(self, objects: Parts, max_hole: int) -> Parts:
        """Gives each pixel of a hole to the nearest object, which cannot be further away than the hole allows."""
        from scipy import ndimage

        filled = None
        for block, holes in self._holes(lambda window: objects[window] > 0, max_hole):
            if filled is None:
                filled = self._integers()
                for each in self._blocks():
                    filled[each] = objects[each]
            window, inner = grown(block, math.isqrt(max_hole) + 2, self.shape)
            near = objects[window]
            rows, columns = ndimage.distance_transform_edt(near == 0, return_distances=False, return_indices=True)
            filled[block] = np.where(holes, near[rows, columns][inner], near[inner])
        return objects if filled is None else Parts(filled, np.arange(int(objects.numbers.max()) + 1), objects.sizes)

    def _ordered(self, objects: Parts) -> tuple[Any, int]:
        """Numbers the objects 1..n in the order of their first pixels."""
        nowhere = self.shape[0] * self.shape[1]
        firsts = np.full(int(objects.numbers.max()) + 1, nowhere)
        for block in self._blocks():
            found = objects[block]
            rows, columns = (each[::-1] for each in np.nonzero(found))
            here = np.full(len(firsts), nowhere)
            here[found[rows, columns]] = (rows + block[0].start) * self.shape[1] + columns + block[1].start
            firsts = np.minimum(firsts, here)  # of several places, the one that is assigned last is the first
        (used,) = np.nonzero(firsts < nowhere)
        numbers = np.zeros(len(firsts), dtype=np.int32)
        numbers[used[np.argsort(firsts[used])]] = np.arange(1, len(used) + 1)
        result = self.create(self.shape, np.dtype(np.int32))
        for block in self._blocks():
            result[block] = numbers[objects[block]]
        return result, len(used)


def _check_maps(shape: tuple[int, ...], maps: tuple[Any, ...]) -> None:
    """Raises a ValueError for wrong maps of `find_objects`, given the shape of the probabilities."""
    if len(shape) != 3 or shape[0] < 2 or 0 in shape:
        raise ValueError(
            f"probabilities have shape {shape}, but must be (K, H, W) of at least 2 classes; give those of one image."
        )
    height, width = shape[1:]
    for name, given in zip(("boundary", "distance"), maps):
        if given is not None and given.shape != (height, width):
            raise ValueError(
                f"{name} has shape {given.shape}, but probabilities are of {height}x{width}; give the same."
            )


def _check_numbers(diameter: float | None, min_area: int, max_hole: int) -> None:
    """Raises a ValueError for wrong numbers of `find_objects`."""
    valid = diameter is None or (diameter > 0 and math.isfinite(diameter))
    require(valid, "diameter", diameter, "must be a positive number of pixels, or None")
    require(min_area >= 0, "min_area", min_area, "must be 0 pixels or more")
    require(max_hole >= 0, "max_hole", max_hole, "must be 0 pixels or more")


def add_sums(totals: np.ndarray, numbers: np.ndarray, values: np.ndarray | None) -> None:
    """Adds to totals (n,) the sums of values over objects 1..n (without values, the pixel counts); 0 is no object."""
    weights = None if values is None else values.ravel()
    totals += np.bincount(numbers.ravel(), weights, minlength=len(totals) + 1)[1:]


def _depth(classes: np.ndarray, as_one: bool) -> np.ndarray:
    """Returns the distance to the nearest pixel of another class, float32 (H, W), or to the background if `as_one`.

    It is measured between quarters of pixels and is that of the deepest quarter, so that it grows by half a pixel where
    an object becomes one pixel wider. Between whole pixels it would grow by up to one.
    """
    from scipy import ndimage

    depth = np.zeros(classes.shape, dtype=np.float32)
    for each in [classes > 0] if as_one else [classes == label for label in np.unique(classes) if label]:
        if each.all():  # no other pixel to measure the distance to
            return np.full(classes.shape, max(classes.shape) / 2, dtype=np.float32)
        quarters = each.repeat(2, axis=0).repeat(2, axis=1)
        nearest = ndimage.distance_transform_edt(quarters, return_distances=False, return_indices=True)
        columns = np.arange(quarters.shape[1])
        for top in range(0, len(depth), BAND):  # at once, the distances would take several times the memory
            band = slice(2 * top, 2 * (top + BAND))
            rows = np.arange(len(quarters))[band, None]
            squares = (nearest[0, band] - rows) ** 2 + (nearest[1, band] - columns) ** 2
            deepest = np.sqrt(squares.reshape(-1, 2, len(columns) // 2, 2).max(axis=(1, 3))) / 2
            np.maximum(depth[top : top + BAND], deepest, out=depth[top : top + BAND], casting="same_kind")
    return depth


def _height_of_maps(foreground: np.ndarray, boundary: np.ndarray | None, distance: np.ndarray | None) -> np.ndarray:
    """Returns the height of pixels (H, W) from the maps of objects, 0 outside of objects, where no boundary is learnt.

    A pixel beside the background is a boundary in any case, which tells nothing about another object. So if there is
    also a distance, its boundary counts only as far as the distance is low. Otherwise objects that are one or two
    pixels wide would be boundary alone.
    """
    from scipy import ndimage

    if boundary is None or distance is None:
        return foreground * (distance if boundary is None else 1 - boundary)
    inside = ndimage.binary_erosion(foreground, np.ones((3, 3)), border_value=1)
    return foreground * distance * (1 - boundary * np.where(inside, 1, np.clip(1 - distance, 0, 1)))


def _is_one(classes: np.ndarray, as_one: bool) -> bool:
    """Returns whether all pixels have one class that is not background; with `as_one`, classes may differ."""
    lowest = classes.min()
    return bool(lowest > 0 and (as_one or lowest == classes.max()))


def _reach(window: Window, inner: Window, shape: tuple[int, int]) -> np.ndarray:
    """Returns the distance of each pixel of `inner` to the nearest one outside of the window (but in the image)."""
    sides = []
    for large, small, end in zip(window, inner, shape):
        places = np.arange(small.start, small.stop)
        before = places + 1 if large.start > 0 else np.inf
        after = large.stop - large.start - places if large.stop < end else np.inf
        sides.append(np.minimum(before, after) * np.ones(len(places)))
    return np.minimum(sides[0][:, None], sides[1])


def _ascents(height: np.ndarray, regions: np.ndarray, inner: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follows the steepest ascent from each pixel of `inner` within its region, until it ends or leaves `inner`.

    Of pixels of equal height, the ascent leads to the later one.

    Returns:
        int (h, w) of `inner`: the number, from 1 up, of the pixel where the ascent ends, 0 for the background; and the
        rows and columns of these pixels, which may be just outside `inner`.
    """
    places = np.arange(height.size, dtype=np.int64).reshape(height.shape)
    upwards, highest = places.copy(), height.copy()
    for first, second in steps(height.shape, NEIGHBOURS):
        same = (regions[first] == regions[second]) & (regions[first] > 0)
        for here, there, later in ((first, second, True), (second, first, False)):
            up = same & (height[there] >= highest[here] if later else height[there] > highest[here])
            np.copyto(highest[here], height[there], where=up)
            np.copyto(upwards[here], places[there], where=up)
    upwards[0 : inner[0].start] = places[0 : inner[0].start]
    upwards[inner[0].stop :] = places[inner[0].stop :]
    upwards[:, 0 : inner[1].start] = places[:, 0 : inner[1].start]
    upwards[:, inner[1].stop :] = places[:, inner[1].stop :]
    inside, leads_to = np.flatnonzero(regions), upwards.reshape(-1)
    reached = leads_to[inside]
    while not np.array_equal(reached, further := leads_to[reached]):
        leads_to[inside] = reached = further
    foreground = regions[inner] > 0
    reached = upwards[inner][foreground]
    is_end = np.zeros(height.size, dtype=bool)
    is_end[reached] = True
    ends = np.flatnonzero(is_end)
    order = np.zeros(height.size, dtype=np.int64)
    order[ends] = np.arange(1, len(ends) + 1)
    numbers = np.zeros(foreground.shape, dtype=np.int64)
    numbers[foreground] = order[reached]
    return numbers, *np.divmod(ends, height.shape[1])


def _passes(height: np.ndarray, regions: np.ndarray, basins: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of neighbouring basins, as lower number times `factor` plus higher number, and their passes."""
    pairs, heights = [], []
    for first, second in steps(height.shape, NEIGHBOURS):
        meet = (basins[first] != basins[second]) & (regions[first] == regions[second])
        one, other = basins[first][meet].astype(np.int64), basins[second][meet].astype(np.int64)
        pairs.append(np.minimum(one, other) * factor + np.maximum(one, other))
        heights.append(np.minimum(height[first][meet], height[second][meet]))
    return _highest(np.concatenate(pairs), np.concatenate(heights))


def _highest(pair: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pair once, with its highest level, and the highest pair first."""
    order = np.lexsort((pair, -level))
    _, firsts = np.unique(pair[order], return_index=True)
    chosen = order[np.sort(firsts)]
    return pair[chosen], level[chosen]


def _merged(
    passes: list[tuple[int, int, float]], summits: list[float], classes: list[int], lowest: float, slight: float
) -> np.ndarray:
    """Joins basins over passes, highest first; returns, for each basin, its object's basin of the highest summit."""
    leader = list(range(len(summits)))

    def find(basin: int) -> int:
        while leader[basin] != basin:
            leader[basin] = basin = leader[leader[basin]]
        return basin

    for one, other, level in passes:
        one, other = sorted((find(one), find(other)), key=lambda basin: (summits[basin], basin))
        reaches = level >= min(lowest * summits[one], summits[one] - slight)
        if one != other and classes[one] == classes[other] and reaches:
            leader[one] = other
    return np.array([find(basin) for basin in range(len(summits))], dtype=np.int64)
