"""Where results go: a folder that is checked before any work is done for it."""

import os
from pathlib import Path

from unet_diffusion.data.folders import readable


def check_output(folder: Path) -> None:
    """Raises a ValueError unless a folder can be written in, or made if it is not there yet.

    Its name is text, since model cards tell it.
    """
    if readable(str(folder)) != str(folder):
        raise ValueError(f"output is {readable(str(folder))}, a name that is no UTF-8 text; choose another.")
    for place in (folder, *folder.absolute().parents):
        if os.path.lexists(place):
            break
    if not place.is_dir():
        raise ValueError(f"output is {folder}, but {place} is no folder; choose another.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"output is {folder}, but {place} cannot be written in; change its rights, or choose another.")
