"""Findings about the images of a data set, with or without masks."""

from collections import Counter, defaultdict

from unet_diffusion.commands.doctor.findings import Finding, Severity, about, asked
from unet_diffusion.commands.doctor.row_facts import RowFacts
from unet_diffusion.data.config import DataConfig, ImageOptions
from unet_diffusion.data.folders import counted
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.sets import unclear_range
from unet_diffusion.data.streaming import FEWEST_ROWS_JUDGED

FEWEST_EXPOSURES = 10  # images from which ranges of values are compared
UNLIKE = 3  # times as wide: from here on, two ranges are called different
FEW_LEVELS = 256  # of the 65536 levels of a 16-bit image; 8 bits have no more


def unusable_severity(facts: list[RowFacts], config: ImageOptions) -> Severity:
    """Returns "warning" if a run would leave out the unusable rows, "error" if `max_broken` allows only fewer."""
    kind = _kind(facts, config)
    unusable = sum(
        not fact.usable or (fact.mask_size != (0, 0) and fact.mask_size != fact.size) or _kind([fact], config) != kind
        for fact in facts
    )
    streamed = isinstance(config, DataConfig) and config.streaming
    judged = max(len(facts), FEWEST_ROWS_JUDGED) if streamed else len(facts)
    return "error" if unusable > config.max_broken * judged else "warning"


def image_findings(facts: list[RowFacts], name: str, config: ImageOptions, one_size: bool) -> list[Finding]:
    """Returns the findings about the images of one split; `one_size` means that a run needs images of one size."""
    severity = unusable_severity(facts, config)
    broken = [fact for fact in facts if fact.image_problem is not None]
    problems = [fact.told(fact.image_problem) for fact in broken if fact.image_question is None]
    fix = f"; max_broken={config.max_broken} allows fewer: repair or remove them, or raise max_broken."
    sentence = f"{{count}} of the {len(facts)} images of {name} cannot be read{fix if severity == 'error' else '.'}"
    if len(problems) == len(facts):
        sentence = f"{name} has no usable image among {len(facts)}."
    found = about(severity, sentence, problems)
    found += asked("image", name, [(fact.image_question, fact.told(fact.image_problem)) for fact in broken])
    usable = [fact for fact in facts if fact.image_problem is None]
    if not usable:
        return found or [Finding("error", f"{name} has no images.")]
    return (
        found + _kinds(usable, name, config, severity) + _sizes(usable, name, one_size) + _values(usable, name, config)
    )


def duplicate_findings(parts: dict[str, list[RowFacts]]) -> list[Finding]:
    """Returns the findings about images that are equal pixel by pixel, within a split and across splits."""
    places: dict[str, list[tuple[str, RowFacts]]] = defaultdict(list)
    for part, facts in parts.items():
        for fact in facts:
            if fact.digest:
                places[fact.digest].append((part, fact))
    inside: list[str] = []
    across: list[str] = []
    contradicting: list[str] = []
    for same in places.values():
        if len(same) == 1:
            continue
        text = " = ".join(f"{fact.name} of {part}" for part, fact in same)
        (across if len({part for part, _ in same}) > 1 else inside).append(text)
        if len({fact.mask_digest for _, fact in same if fact.mask_digest}) > 1:
            contradicting.append(text)
    return [
        *about(
            "warning",
            "duplicates across splits, equal pixel by pixel: {count}. Validation would judge images that were trained "
            "on; remove them from one split.",
            across,
        ),
        *about(
            "warning",
            "duplicates inside a split, equal pixel by pixel: {count}. They count more in training; keep one of each.",
            inside,
        ),
        *about("warning", "duplicates whose masks contradict each other: {count}.", contradicting),
    ]


def _kind(facts: list[RowFacts], config: ImageOptions) -> tuple[int | None, str]:
    """Returns the channels and the dtype of the first image that can be read; the others must have the same."""
    first = next((fact for fact in facts if fact.image_problem is None), None)
    if first is None:
        return 0, ""
    return (first.channels if config.channels is None else None), first.dtype


def _kinds(usable: list[RowFacts], name: str, config: ImageOptions, severity: Severity) -> list[Finding]:
    channels = Counter(fact.channels for fact in usable)
    first = usable[0]
    others = [f"{fact.name}: {fact.channels} channels" for fact in usable if fact.channels != first.channels]
    if config.channels is None:
        sentence = (
            f"images of {name} with another number of channels than the first, which has {first.channels}: {{count}} "
            f"(found: {', '.join(map(str, sorted(channels)))}). Give channels=1 or 3 to convert them."
        )
        found = about(severity, sentence, others)
    else:
        sentence = f"images of {name} with other channels than the first, converted to {config.channels}: {{count}}."
        found = about("note", sentence, others)
    dtypes = [f"{fact.name}: {fact.dtype}" for fact in usable if fact.dtype != first.dtype]
    sentence = (
        f"images of {name} with another dtype than the first, {first.dtype}: {{count}}. Store all with one dtype."
    )
    return found + about(severity, sentence, dtypes)


def _sizes(usable: list[RowFacts], name: str, one_size: bool) -> list[Finding]:
    sizes = Counter(fact.size for fact in usable)
    if len(sizes) == 1:
        return []
    examples = [f"{width}x{height}: {counted(count, 'image')}" for (width, height), count in sizes.most_common()]
    if not one_size:
        return [Finding("note", f"the images of {name} have {len(sizes)} different sizes.", tuple(examples))]
    fix = "give image_size to resize them, or crop_size to train on pieces of one size"
    return [Finding("error", f"the sizes of the images of {name} differ ({len(sizes)}); {fix}.", tuple(examples))]


def _values(usable: list[RowFacts], name: str, config: ImageOptions) -> list[Finding]:
    low, high = min(fact.low for fact in usable), max(fact.high for fact in usable)
    dtype = usable[0].dtype
    constant = [f"{fact.name}: {fact.low:g} everywhere" for fact in usable if fact.low == fact.high]
    found = about(
        "warning", f"images of {name} that are constant, with the same value at every pixel: {{count}}.", constant
    )
    further = [f"{fact.name}: {fact.unread_pages} more" for fact in usable if fact.unread_pages]
    sentence = f"images of {name} with further frames or pages, of which only the first is read: {{count}}."
    found += about("note", sentence, further)
    stated = config.value_range is not None or config.percentiles is not None
    problem = None if stated else unclear_range(name, dtype, low, high)
    if problem is not None:
        found.append(Finding("error" if dtype == "float32" else "question", problem))
    few = [f"{f.name}: {f.levels} levels" for f in usable if f.dtype == "uint16" and 1 < f.levels <= FEW_LEVELS]
    if config.value_range is not None and config.value_range[1] - config.value_range[0] < FEW_LEVELS:
        few = []  # it is known
    found += about("note", f"16-bit images of {name} with no more levels than 8 bits hold: {{count}}.", few)
    if isinstance(config, MaskedOptions) and config.image_percentiles is None:
        found += _exposures(usable, name)
    if config.value_range is not None:
        bottom, top = config.value_range
        outside = [f"{f.name}: {f.low:g} to {f.high:g}" for f in usable if f.low < bottom or f.high > top]
        sentence = (
            f"images of {name} with values outside value_range {bottom:g} to {top:g}, which are clipped: {{count}}."
        )
        found += about("warning", sentence, outside)
    return found


def _exposures(usable: list[RowFacts], name: str) -> list[Finding]:
    """Finds sets whose ranges of values differ a lot; giving each image its own range evens this out."""
    ranked = sorted(usable, key=lambda fact: fact.high - fact.low)
    narrow, wide = (ranked[int(share * (len(ranked) - 1))] for share in (0.1, 0.9))
    spans = [fact.high - fact.low for fact in (narrow, wide)]
    if len(usable) < FEWEST_EXPOSURES or spans[0] <= 0 or spans[1] < UNLIKE * spans[0]:
        return []
    sentence = (
        f"in a tenth of the images of {name} the values span {spans[0]:g} or less, in another tenth {spans[1]:g} or "
        "more. If these are exposures of like objects, percentiles 1 99.8 with percentiles_of image gives each image a "
        "range of its own."
    )
    return [Finding("note", sentence, tuple(f"{f.name}: {f.low:g} to {f.high:g}" for f in (narrow, wide)))]
