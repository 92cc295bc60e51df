"""What a run knows about its data, kept in its folder as `data.json`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unet_diffusion.files import write_json
from unet_diffusion.saved_index import read_object

FILE = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Attributes:
        summary: what was understood, as the lines that are printed before any work.
        fingerprint: hash of the content of all images (and masks) and of how they are prepared; it does not depend on
            where the files lie.
        trained: content hash of each image that is trained on.
        held_out: content hash of each image that is held out for validation.
        mask_encoding: meaning of the values of masks, as `MaskEncoding.to_dict` gives it; None without masks.
    """

    summary: tuple[str, ...] = ()
    fingerprint: str = ""
    trained: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    mask_encoding: dict[str, Any] | None = None

    def write(self, run: Path) -> None:
        """Writes `data.json` into the folder of a run."""
        write_json(run / FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> "DataRecord | None":
        """Returns the record of a run; None for a run, or a pipeline, that has none."""
        if not (run / FILE).is_file():
            return None
        fields = read_object(run / FILE)
        lists = ("summary", "trained", "held_out")
        values: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in fields.items()}
        return cls(**values)
