"""Bad input ends in a sentence that names the value, the rule and the fix; what is only unusual gives right values."""

import sys

import pytest

from tests.support.scripts import SCRIPTS

sys.path.append(str(SCRIPTS))  # as when the script is run

from fault_checks.attempts import Case, Place, save_models, try_case  # noqa: E402
from fault_checks.bad_input import CASES, checks  # noqa: E402

from unet_diffusion.files import check_output
from unet_diffusion.images.decoding import decode_image, pixel_limit
from unet_diffusion.saved_index import read_object, saved_components


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.given)
def test_each_bad_input_ends_in_a_sentence_and_each_unusual_one_in_right_values(case, models, tmp_path):
    outcome = try_case(case, Place(tmp_path, models))
    assert outcome.held, outcome.sentence or "accepted"


def test_the_table_can_fail(models, tmp_path):
    def fails(_: Place) -> None:
        raise KeyError("of a library")

    def refuses(_: Place) -> None:
        raise ValueError("wrong <_io.BytesIO object at 0x7f00>")

    place = Place(tmp_path, models)
    assert not try_case(Case("a traceback", fails, ("library",)), place).held
    assert not try_case(Case("a foreign sentence", refuses, ("wrong",)), place).held
    assert not try_case(Case("bad input that is accepted", lambda _: None, ("wrong",)), place).held
    assert not try_case(Case("good input that is refused", refuses), place).held
    assert try_case(Case("good input", lambda _: None), place).held


def test_there_are_more_than_30_refusals_and_the_table_has_a_line_for_each_case(monkeypatch, tmp_path):
    assert len({case.given for case in CASES if case.says}) > 30
    monkeypatch.setattr("fault_checks.bad_input.CASES", CASES[:2])
    found = list(checks(True, tmp_path))
    assert [finding.check for finding in found] == [case.given for case in CASES[:2]]
    assert all(finding.held and "max_broken" in finding.figure for finding in found)


def test_a_broken_image_among_many_is_named_in_a_warning(models, tmp_path):
    case = next(case for case in CASES if case.given.startswith("one zero-byte file of 200"))
    outcome = try_case(case, Place(tmp_path, models))
    assert outcome.held
    assert any("row 123: " in text and "3.png is empty" in text for text in outcome.warnings)  # in order of names


def test_the_limit_of_pixels_is_set_by_the_environment_and_counts_groups_of_four_channels(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert pixel_limit() == 100
    monkeypatch.setenv("UNET_DIFFUSION_MAX_PIXELS", "120")
    assert pixel_limit() == 120
    for wrong in ("-1", "0", "1e9", ""):
        monkeypatch.setenv("UNET_DIFFUSION_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match="the number of pixels"):
            pixel_limit()


def test_many_channels_count_against_the_limit_of_pixels(monkeypatch, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    np = pytest.importorskip("numpy")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    for pages, fits in ((200, False), (20, True)):  # 40x40 = 1,600 pixels, of 50 and 5 times 4 channels
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((pages, 40, 40), np.uint8), compression="zlib")
        if fits:
            assert decode_image(tmp_path / "a.tif").shape == (40, 40, 20)
        else:
            with pytest.raises(ValueError, match="40x40 pixels of 200 channels, above the limit of 10000"):
                decode_image(tmp_path / "a.tif")


def test_a_run_names_its_components_and_json_files_hold_keys(models, tmp_path):
    found = saved_components(models / "generation")
    assert found["unet"] == ("unet_diffusion.unet", "UNet") and found["scheduler"][1] == "DDPMScheduler"
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(ValueError, match="holds a int, but must hold keys and values"):
        read_object(tmp_path / "a.json")


def test_output_folders_that_can_be_made_are_accepted_and_not_made(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder; choose another"):
        check_output(tmp_path / "file" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="link is not a folder"):
        check_output(tmp_path / "link")
