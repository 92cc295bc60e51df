"""The page of a run, served by the command and used in a real browser."""

import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.demo_runs import NAMES, Reports, save_enlarging_run, save_image, save_joint_run
from unet_diffusion.commands.demo.images import heat
from unet_diffusion.commands.demo.jobs import enlarge_image, generate_images, load_abilities, segment_image
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.saved_runs import load_pipeline

pytest.importorskip("gradio", reason="the extra demo is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # a warning of diffusers about NumPy 2
]


@pytest.fixture(scope="module")
def visit():
    """Serves a page and uses it."""
    from scripts.drawings import demo  # not before it is known that selenium is there

    if not (demo.installed_browser() and shutil.which("chromedriver")):
        pytest.skip("there is no Chromium with its driver")
    return demo


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(visit, downloads):
    with visit.browser(downloads) as driver:
        yield driver


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory) -> Path:
    return save_joint_run(tmp_path_factory.mktemp("browser") / "joint")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for i in range(2):
        save_image(folder / f"{i}.png", 9 + i, 12)
    return folder


@pytest.fixture(scope="module")
def joint_address(visit, joint_run, examples):
    with visit.served(joint_run, "--examples", str(examples)) as address:
        yield address


@pytest.fixture
def joint_page(visit, driver, joint_address):
    driver.get_log("performance")  # drops earlier requests
    driver.get(joint_address)
    visit.find(driver, "#generate")
    return driver


def requests(driver) -> list[str]:
    """The addresses that the browser has requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [each["params"]["request"]["url"] for each in asked]


def open_tab(visit, driver, label: str) -> None:
    visit.wait(driver, lambda page: [tab for tab in tabs(page) if tab.text == label])[0].click()


def tabs(driver) -> list:
    return [tab for tab in driver.find_elements("css selector", "button[role=tab]") if tab.is_displayed()]


def choose(visit, driver, name: str, label: str) -> None:
    """Picks an entry of the menu in the named component."""
    visit.find(driver, f"#{name} input").click()
    menu = visit.wait(driver, lambda page: page.find_elements("css selector", "[role=option]"))
    next(entry for entry in menu if entry.get_attribute("aria-label") == label).click()
    visit.wait(driver, lambda page: not page.find_elements("css selector", "[role=option]"))


def upload(visit, driver, path: Path) -> None:
    """Gives the page a file, which replaces the earlier one."""
    for button in driver.find_elements("css selector", "#upload button[aria-label=Clear]"):
        button.click()
    visit.find(driver, "#upload input[type=file]").send_keys(str(path))


def message(visit, driver) -> str:
    """The error message of the page, which is then closed."""
    shown = visit.find(driver, ".toast-message-text")
    said = visit.wait(driver, lambda page: shown.text)  # empty while it fades in
    visit.find(driver, ".toast-close").click()
    visit.wait(driver, lambda page: not page.find_elements("css selector", ".toast-message-text"))
    return said


def fetched(address: str, folder: Path) -> np.ndarray:
    """The pixels that the page shows."""
    target = folder / "shown.png"
    with urllib.request.urlopen(address) as answer:
        target.write_bytes(answer.read())
    return np.asarray(Image.open(target).convert("RGB"))


def changed(visit, driver, name: str, before: list[str]) -> str:
    """The address of the image in a component, after it has changed."""
    return visit.wait(driver, lambda page: [a for a in visit.images(page, name) if a not in before])[0]


def test_images_are_generated_as_chosen(visit, joint_page, joint_run, tmp_path):
    assert [tab.text for tab in tabs(joint_page)] == ["Generate", "Segment"]
    visit.enter(joint_page, "count", 3)
    visit.enter(joint_page, "steps", 2)
    choose(visit, joint_page, "sampler", "euler")
    visit.enter(joint_page, "seed", 5)
    choose(visit, joint_page, "class", "right")
    visit.enter(joint_page, "guidance", 2.5)
    visit.find(joint_page, "#generate").click()
    visit.wait(joint_page, lambda page: len(visit.images(page, "generated")) == 3)
    shown = [fetched(address, tmp_path) for address in visit.images(joint_page, "generated")]
    pipe = load_abilities(joint_run, "cpu").generation
    expected = generate_images(pipe, 3, 2, "euler", 5, "1", 2.5, Reports())  # right is class 1
    assert np.array_equal(shown, [np.asarray(image.convert("RGB")) for image in expected])
    outside = [
        address for address in requests(joint_page) if not re.match(r"http://127\.0\.0\.1:|data:|blob:", address)
    ]
    assert outside == []


def test_a_number_out_of_bounds_is_reported(visit, joint_page):
    visit.enter(joint_page, "steps", 5000)
    visit.find(joint_page, "#generate").click()
    assert "5000" in message(visit, joint_page)


def test_an_upload_is_segmented_blended_and_downloaded(visit, joint_page, joint_run, downloads, tmp_path):
    path = save_image(tmp_path / "upload.png", 20, 30)
    pipe = load_pipeline(SegmentationPipeline, joint_run)
    found = pipe(path)
    expected = found.masks[0]
    open_tab(visit, joint_page, "Segment")
    upload(visit, joint_page, path)
    first = changed(visit, joint_page, "overlay", [])
    factor = 384 // 30
    half = np.asarray(pipe.overlay(path, expected, 0.5))
    assert np.array_equal(fetched(first, tmp_path)[::factor, ::factor], half)
    entropy = fetched(changed(visit, joint_page, "uncertainty", []), tmp_path)
    assert np.array_equal(entropy[::factor, ::factor], np.asarray(heat(found.uncertainty[0])))
    assert all(name in visit.find(joint_page, "#legend").text for name in NAMES)

    visit.enter(joint_page, "opacity", 1)
    second = changed(visit, joint_page, "overlay", [first])
    opaque = np.asarray(pipe.overlay(path, expected, 1.0))
    assert np.array_equal(fetched(second, tmp_path)[::factor, ::factor], opaque)

    visit.find(joint_page, "#mask").click()
    visit.wait(joint_page, lambda page: (downloads / "upload-mask.png").exists())
    with Image.open(downloads / "upload-mask.png") as mask:
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), np.asarray(expected))


def test_objects_are_outlined_counted_and_downloaded(visit, joint_page, joint_run, downloads, tmp_path):
    path = save_image(tmp_path / "many.png", 20, 30)
    found = segment_image(load_abilities(joint_run, "cpu").segmentation, path, tmp_path, Reports(), instances=True)
    open_tab(visit, joint_page, "Segment")
    upload(visit, joint_page, path)
    first = changed(visit, joint_page, "overlay", [])
    assert "object" not in visit.find(joint_page, "#legend").text
    visit.find(joint_page, "#objects input[type=checkbox]").click()
    second = changed(visit, joint_page, "overlay", [first])
    assert np.array_equal(fetched(second, tmp_path), np.asarray(found.overlay(0.5)))
    visit.wait(joint_page, lambda page: "object" in visit.find(page, "#legend").text)
    said = visit.find(joint_page, "#legend").text
    assert all(f"{count} object" in said for count in found.objects.counts[1:])
    for name, file in (("labels", found.objects.label_file), ("table", found.objects.table_file)):
        visit.find(joint_page, f"#{name}").click()
        visit.wait(joint_page, lambda page, target=downloads / file.name: target.exists())
        assert (downloads / file.name).read_bytes() == file.read_bytes()


def test_an_example_is_segmented(visit, joint_page, joint_run, examples, tmp_path):
    open_tab(visit, joint_page, "Segment")
    visit.wait(joint_page, lambda page: len(visit.images(page, "examples")) == 2)
    visit.enter(joint_page, "opacity", 0.25)
    joint_page.find_elements("css selector", "#examples button img")[1].click()
    shown = fetched(changed(visit, joint_page, "overlay", []), tmp_path)
    pipe, path = load_pipeline(SegmentationPipeline, joint_run), examples / "1.png"
    assert np.array_equal(shown[::32, ::32], np.asarray(pipe.overlay(path, pipe(path).masks[0], 0.25)))


def test_wrong_files_are_reported_and_the_page_goes_on(visit, joint_page, tmp_path):
    open_tab(visit, joint_page, "Segment")
    (tmp_path / "notes.txt").write_text("no image")
    upload(visit, joint_page, tmp_path / "notes.txt")
    what = "it is not an image of a format that is read; it begins with b'no image'."
    assert message(visit, joint_page) == f"Notes.txt cannot be decoded: {what}"
    upload(visit, joint_page, save_image(tmp_path / "colour.png", channels=3))
    assert "The image has 3 channels, but the network takes 1" in message(visit, joint_page)
    upload(visit, joint_page, save_image(tmp_path / "right.png"))
    changed(visit, joint_page, "overlay", [])


def test_a_small_image_is_enlarged_beside_its_bicubic_version(visit, driver, tmp_path, monkeypatch):
    run, kept = save_enlarging_run(tmp_path / "enlarging"), tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(kept))
    path = save_image(tmp_path / "small.png", 6, 8, channels=3)
    pipe = load_abilities(run, "cpu").super_resolution
    with visit.served(run) as address:
        driver.get(address)
        visit.enter(driver, "steps", 2)
        assert [tab.text for tab in tabs(driver)] == ["Super-resolution"]
        visit.find(driver, "#enlarge").click()
        assert message(visit, driver) == "There is no image yet; upload one."
        upload(visit, driver, path)
        expected = enlarge_image(pipe, path, 2, "sde-dpm-solver++", 0, tmp_path, Reports())
        for name, image in (("large", expected.large), ("bicubic", expected.bicubic)):
            assert np.array_equal(fetched(changed(visit, driver, name, []), tmp_path), np.asarray(image))
        choose(visit, driver, "sampler", "ddpm")
        visit.enter(driver, "seed", 1)
        before = visit.images(driver, "large")
        visit.find(driver, "#enlarge").click()
        expected = enlarge_image(pipe, path, 2, "ddpm", 1, tmp_path, Reports())
        assert np.array_equal(fetched(changed(visit, driver, "large", before), tmp_path), np.asarray(expected.large))
        assert list(kept.rglob("small.png")) and list(kept.rglob("small-large.png"))
    assert list(kept.iterdir()) == []  # uploads and results are deleted with the page


def test_a_taken_port_is_reported(visit, joint_run, joint_address):
    port = joint_address.rstrip("/").rpartition(":")[2]
    sentence = f"cannot be served on 127.0.0.1 and port {port}; choose another port"
    with pytest.raises(RuntimeError, match=sentence), visit.served(joint_run, "--port", port):
        pass
