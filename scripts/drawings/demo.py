"""Takes the screenshots of docs/demo.md: the page of a run, used in a real browser.

Needs selenium, and Chromium with its driver on this machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 90  # seconds for a run to load and for a job to end, on a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # commands, the first that is installed is used
COLOURS = 256  # of a screenshot, so that it stays small


@dataclass
class Screenshot:
    """Use the page of a run in a browser as a visitor would, and take a screenshot."""

    run: Path
    """Folder of the run."""
    output: Path
    """The PNG to write."""
    examples: Path | None = None
    """Folder of example images; without it images are generated."""
    pick: int = 0
    """Index of the example to use."""
    count: int = 32
    """Number of images to generate."""
    width: int = 1240
    """Width of the window in pixels."""
    height: int = 860
    """Height of the window in pixels."""


@contextmanager
def served(run: Path, *arguments: str) -> Iterator[str]:
    """Yields the address of the page of a run, which a process of its own serves.

    Raises:
        RuntimeError: the process ended; the message is its standard error.
    """
    program = "from unet_diffusion.cli import main; main()"
    command = [sys.executable, "-c", program, "demo", str(run), "--device", "cpu", *arguments]
    with TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # the address, or nothing once the command has ended
            if "http" not in line:
                process.wait(timeout=PATIENCE)
                errors.seek(0)
                raise RuntimeError(errors.read())
            yield line.split(" at ")[1].split(";")[0]
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE)


def installed_browser() -> str | None:
    """Returns the path of Chromium, or of a browser that is built on it, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser(downloads: Path, width: int = 1240, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Yields a headless Chromium of this machine, which records each request in its performance log.

    Args:
        downloads: folder for files that are downloaded.
        width: width of the window in pixels.
        height: height of the window in pixels.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = installed_browser() or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: webdriver.Chrome, condition: Callable[[webdriver.Chrome], Any]) -> Any:
    """Waits until the condition is true and returns its value."""
    return WebDriverWait(driver, PATIENCE).until(condition)


def find(driver: webdriver.Chrome, selector: str) -> Any:
    """Waits for the first element of a CSS selector."""
    return wait(driver, lambda page: (page.find_elements(By.CSS_SELECTOR, selector) or [None])[0])


def images(driver: webdriver.Chrome, name: str) -> list[str]:
    """The addresses of all loaded images in the named component."""
    found = driver.find_elements(By.CSS_SELECTOR, f"#{name} img")
    loaded = "return arguments[0].complete && arguments[0].naturalWidth > 0"
    return [image.get_attribute("src") for image in found if driver.execute_script(loaded, image)]


def enter(driver: webdriver.Chrome, name: str, value: float) -> None:
    """Types a number into the named component and leaves it."""
    select = Keys.CONTROL + "a" + Keys.NULL  # releases the control key
    find(driver, f"#{name} input[type=number]").send_keys(select, str(value), Keys.TAB)


def draw(options: Screenshot) -> Path:
    """Writes the screenshot and returns its path."""
    arguments = [] if options.examples is None else ["--examples", str(options.examples)]
    with (
        TemporaryDirectory() as folder,
        served(options.run, *arguments) as address,
        browser(Path(folder), options.width, options.height) as driver,
    ):
        driver.get(address)
        if options.examples is None:
            find(driver, "#generate")
            enter(driver, "count", options.count)
            find(driver, "#generate").click()
            wait(driver, lambda page: len(images(page, "generated")) >= options.count)
        else:
            wait(driver, lambda page: len(images(page, "examples")) > options.pick)
            driver.find_elements(By.CSS_SELECTOR, "#examples button img")[options.pick].click()
            result = "overlay" if driver.find_elements(By.ID, "overlay") else "large"
            wait(driver, lambda page: images(page, result))
        wait(driver, lambda page: not page.find_elements(By.CSS_SELECTOR, ".progress-text, .eta-bar, .generating"))
        shot = Path(folder) / "shot.png"
        driver.save_screenshot(str(shot))
        with Image.open(shot) as image:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").quantize(COLOURS).save(options.output, optimize=True)
    return options.output


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(draw(tyro.cli(Screenshot)))
