"""The values seen in the masks of a set, before anything is known about their meaning."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from unet_diffusion.images.masks import COLOURED, Colour


@dataclass(frozen=True)
class SeenMasks:
    """The values of some masks.

    Attributes:
        counts: of each mask, the pixels of each key.
        palette: colours of the keys that palette files state.
        lossy: for each mask, the format of its file if the format changes values, such as "JPEG", or else "".
        objects: of each mask, whether its values look like numbers of objects (`reading.numbers_objects`).
    """

    counts: Sequence[Mapping[int, int]]
    palette: Mapping[int, Colour] = field(default_factory=dict)
    lossy: Sequence[str] = ()
    objects: Sequence[bool] = ()

    @classmethod
    def of(cls, *masks: Collection[int], palette: Mapping[int, Colour] | None = None) -> "SeenMasks":
        """Returns the values of masks whose keys alone are known, as if each key had one pixel."""
        return cls([dict.fromkeys(mask, 1) for mask in masks], palette or {})

    @property
    def keys(self) -> list[int]:
        """Returns all keys, ascending."""
        return sorted(set().union(*self.counts))

    @property
    def totals(self) -> Counter[int]:
        """Returns the pixels of each key in all masks."""
        totals: Counter[int] = Counter()
        for counts in self.counts:
            totals.update(counts)
        return totals

    @property
    def formats(self) -> list[str]:
        """Returns the file formats that changed values."""
        return sorted({name for name in self.lossy if name})

    @property
    def coloured(self) -> bool:
        """Returns whether some masks are in colour."""
        return any(key >= COLOURED for key in self.keys)

    @property
    def two_valued(self) -> bool:
        """Returns whether each mask holds at most one value above 0."""
        return all(sum(key > 0 for key in counts) <= 1 for counts in self.counts)

    def largest_of_exact(self) -> Iterator[int]:
        """Yields the largest key of each mask whose file keeps values exactly."""
        for place, counts in enumerate(self.counts):
            if not (self.lossy and self.lossy[place]):
                yield max(counts, default=0)


def highest_of_run(keys: Collection[int]) -> int | None:
    """Returns n if the keys above 0 are exactly 1..n, or else None; 0 if there are none."""
    positive = [key for key in keys if key > 0]
    return len(positive) if max(positive, default=0) == len(positive) else None
