"""A page to try a run in a browser, served from this machine."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unet_diffusion.commands.demo.images import find_examples
from unet_diffusion.commands.demo.jobs import load_abilities
from unet_diffusion.commands.options.demo import Demo
from unet_diffusion.training.stopping import stop_requests

MAX_UPLOAD = "1gb"
POLL = 0.2  # seconds
LOCAL = ("localhost", "127.0.0.1")
FOLDER = "GRADIO_TEMP_DIR"  # environment variable of the folder where Gradio keeps files


def demo(options: Demo) -> str:
    """Serves the page until Ctrl-C or SIGTERM, then returns a sentence that it is closed.

    Uploads and results are kept for an hour, in a temporary folder that is deleted when the page closes. Nothing is
    loaded from the internet or sent to it.

    Raises:
        ValueError: there is no finished run, or the examples do not fit it.
        ImportError: without the extra `demo`.
        OSError: the page cannot be served on the address.
    """
    abilities = load_abilities(options.run, options.device)
    examples = [] if options.examples is None else find_examples(options.examples, abilities.reader)
    folders = TemporaryDirectory(prefix="unet-diffusion-demo-", dir=os.environ.get(FOLDER))
    # before Gradio is imported
    with folders as folder, _environment(**{FOLDER: folder, "GRADIO_ANALYTICS_ENABLED": "False"}):
        try:
            from unet_diffusion.commands.demo.page import launch_options, page  # Gradio is an extra, and slow
        except ImportError as error:
            raise ImportError('the page needs Gradio: pip install "unet-diffusion[demo]"') from error
        blocks = page(options.run, abilities, examples, Path(folder))
        address = serve(blocks, options, launch_options())
        with stop_requests() as stop:
            # printed here, since the result appears only when the page is closed
            print(f"The page is at {address}; Ctrl-C ends it.", flush=True)
            while not stop:
                time.sleep(POLL)
        blocks.close(verbose=False)
    return "The page is closed."


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def without_proxy(host: str) -> str:
    """Returns `NO_PROXY` with this machine in it: Gradio asks for its own page, which no proxy can reach."""
    return ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host, *LOCAL]))


def serve(blocks: Any, options: Demo, look: dict[str, Any]) -> str:
    """Starts the server of a page in the background; returns its address."""
    try:
        with _environment(**dict.fromkeys(("NO_PROXY", "no_proxy"), without_proxy(options.host))):
            _, address, _ = blocks.launch(
                server_name=options.host,
                server_port=options.port,
                max_file_size=MAX_UPLOAD,
                prevent_thread_lock=True,
                quiet=True,
                **look,
            )
    except OSError as error:
        port = "any port from 7860" if options.port is None else f"port {options.port}"
        raise OSError(
            f"the page cannot be served on {options.host} and {port}; choose another port, or a host of this machine."
        ) from error
    return address
