"""Bad input: each of many bad files and options ends in a sentence for the user, unusual ones in the right values."""

from collections.abc import Iterator
from pathlib import Path

from fault_checks.attempts import Case, Place, in_one_line, save_models, try_case
from fault_checks.bad_images import IMAGES, SETS
from fault_checks.bad_runs import RUNS
from fault_checks.finding import Finding
from fault_checks.odd_images import ODD

PROMISE = "Bad input"
CASES: list[Case] = [*IMAGES, *SETS, *RUNS, *ODD]


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """A finding for every case; all of them take seconds, so that none is left out of the reduced run."""
    models = save_models(work / "models")
    for number, case in enumerate(CASES):
        place = Place(work / f"{number:02d}", models)
        place.folder.mkdir()
        outcome = try_case(case, place)
        sentence = in_one_line(outcome.sentence).replace(str(work), "")
        yield Finding(PROMISE, case.given, sentence or "accepted", outcome.held)
