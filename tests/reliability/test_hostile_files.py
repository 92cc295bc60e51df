"""No pickle is read, no code of a run is executed, and nothing is written outside of the output folder."""

import pickle
import re
import sys
from pathlib import Path

import pytest

from tests.support.scripts import SCRIPTS

sys.path.append(str(SCRIPTS))  # as when the script is run

from fault_checks import attacks  # noqa: E402
from fault_checks.attempts import Place, save_models, try_case  # noqa: E402
from fault_checks.hostile_files import CASES, checks  # noqa: E402

import unet_diffusion  # noqa: E402

PACKAGE = Path(unet_diffusion.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.given)
def test_crafted_files_are_refused_or_passed_over_and_their_payload_never_runs(case, models, tmp_path):
    outcome = try_case(case, Place(tmp_path, models))
    assert not (tmp_path / attacks.MARKER).exists()
    assert outcome.held, outcome.sentence or "accepted"


@pytest.mark.parametrize("payload", [attacks.raw, attacks.saved, attacks.objects])
def test_the_payload_runs_where_a_pickle_is_read(payload, models, tmp_path):
    import io

    import numpy as np
    import torch

    read = {
        attacks.raw: pickle.load,
        attacks.saved: lambda file: torch.load(file, weights_only=False),
        attacks.objects: lambda file: np.load(file, allow_pickle=True),
    }[payload]
    content = payload(Place(tmp_path, models))
    assert not (tmp_path / attacks.MARKER).exists()
    read(io.BytesIO(content))
    assert (tmp_path / attacks.MARKER).is_file()


def test_the_table_tells_of_a_payload_that_ran(models, monkeypatch, tmp_path):
    def unpickles(place: Place) -> None:
        pickle.loads(attacks.raw(place))

    case = type(CASES[0])("unpickles", unpickles)
    monkeypatch.setattr("fault_checks.hostile_files.CASES", [case])
    control, found = checks(True, tmp_path)
    assert control.held and not found.held and found.figure == "THE PAYLOAD RAN"


def test_the_package_calls_nothing_that_unpickles_or_runs_text():
    """But `torch.load` for the weights that come with a package, which is told to read nothing but tensors."""
    pattern = re.compile(
        r"pickle\.load|allow_pickle=True|joblib|yaml\.|(?<![\w.])(eval|exec)\(|torch\.load\((?!.*weights_only=True)"
    )
    places = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "pipelines").glob("*.py")]
    assert len(places) > 50
    found = [
        f"{path.name}: {line.strip()}"
        for path in places
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert not found
