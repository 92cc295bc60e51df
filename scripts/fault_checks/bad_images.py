"""Bad images, masks and data sets: what a user is told of each."""

import io
import os
import shutil
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tifffile
from fault_checks.attempts import Case, Place, as_nobody, without_rights
from PIL import Image

from unet_diffusion.data.sources import open_source
from unet_diffusion.files import check_output
from unet_diffusion.images.large_images import open_image

HALF = ("--max-broken", 0.5)


def encoded(kind: str, side: int = 16, mode: str = "L") -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 7 if mode == "L" else 0).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int = 40_000) -> bytes:
    """A PNG of a few kilobytes that states far more pixels than memory is wise to hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side + 1) * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def npy(shape: tuple[int, ...], values: bytes = b"") -> bytes:
    """A `.npy` file with a header of its own and whatever follows it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + values


def wide_tiff() -> bytes:
    """A TIFF of 5 channels, which Pillow does not read, that states 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((4, 4, 5), np.uint8), planarconfig="contig", photometric="minisblack")
    data = bytearray(buffer.getvalue())
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12):
        tag, kind = struct.unpack("<HH", data[entry : entry + 4])
        if tag in (256, 257):  # width and height
            data[entry + 8 : entry + 12] = struct.pack("<I" if kind == 4 else "<HH", *((60_000, 0)[: 3 - kind // 2]))
    return bytes(data)


def image(name: str, content: bytes, *options: object) -> "Case | object":
    """Trains on six images of which one has other content."""

    def attempt(place: Place) -> None:
        images = place.images() / "images"
        (images / "3.png").unlink()
        (images / name).write_bytes(content)
        place.train(images, *options)

    return attempt


def mask(value: int | bytes | None, side: int = 16, *options: object) -> "Case | object":
    """Trains on six images of which one has another mask: of one value, other bytes, or none."""

    def attempt(place: Place) -> None:
        data = place.images()
        path = data / "masks" / "3.png"
        path.unlink()
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            Image.new("L", (side, side), value).save(path)
        place.train_masks(data, *options)

    return attempt


def _nan_tiff(place: Place) -> None:
    values = np.zeros((16, 16), np.float32)
    values[3, 4] = np.nan
    tifffile.imwrite(place.folder / "nan.tif", values)
    place.segment(place.folder / "nan.tif")


def _large(name: str, content: bytes):
    return lambda place: open_image(place.write(name, content))


def limit_by_variable(place: Place) -> None:
    """A bad number in the variable that raises the limit."""
    os.environ["UNET_DIFFUSION_MAX_PIXELS"] = "many"
    try:
        place.segment(place.write("a.png", encoded("PNG")))
    finally:
        del os.environ["UNET_DIFFUSION_MAX_PIXELS"]


def _parquet(content: str):
    def attempt(place: Place) -> None:
        rows = [{"bytes": encoded("PNG"), "path": None}] * 9
        columns = {"number": [1, 2]} if content == "numbers" else {"image": rows, "label": [0, 1, 7] * 3}
        path = place.folder / "set" / "a.parquet"
        path.parent.mkdir()
        if content == "labels":
            names = datasets.ClassLabel(names=["cat", "dog"])
            schema = datasets.Features({"image": datasets.Image(), "label": names}).arrow_schema
            pa.parquet.write_table(pa.Table.from_pydict(columns, schema=schema), path)
        else:
            pa.parquet.write_table(pa.table(columns), path)
        if content == "truncated":
            path.write_bytes(path.read_bytes()[:200])
        place.train(path.parent, "--image-column", "image" if content != "numbers" else "number")

    return attempt


def _saved_to_disk(place: Place) -> None:
    datasets.Dataset.from_dict({"image": [encoded("PNG")] * 4}).save_to_disk(place.folder / "saved")
    file = next((place.folder / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    place.train(place.folder / "saved", "--image-column", "image")


def _other_names(place: Place) -> None:
    data = place.images()
    for path in (data / "masks").iterdir():
        path.rename(path.with_name(f"mask-of-{path.name}"))
    place.train_masks(data)


def _two_masks(place: Place) -> None:
    data = place.images()
    shutil.copy(data / "masks" / "3.png", data / "masks" / "3.bmp")
    place.train_masks(data)


def _pipe(place: Place) -> None:
    os.mkfifo(place.folder / "pipe.png")
    place.segment(place.folder / "pipe.png")


def _folder_without_rights(place: Place) -> None:
    with as_nobody() as folder:
        for name in ("open", "closed"):
            (folder / name).mkdir()
            (folder / name / "a.png").write_bytes(encoded("PNG"))
        (folder / "closed").chmod(0)
        try:
            without_rights(lambda: open_source(folder))
        finally:
            (folder / "closed").chmod(0o755)


def _output_without_rights(place: Place) -> None:
    with as_nobody() as folder:
        folder.chmod(0o555)
        without_rights(lambda: check_output(folder / "masks"))


def _empty_folder(place: Place) -> None:
    (place.folder / "nothing").mkdir()
    place.train(place.folder / "nothing")


def chained_url(place: Place) -> None:
    """A table that names a file system built on another."""
    path = place.folder / "set" / "a.parquet"
    path.parent.mkdir()
    rows = [{"bytes": None, "path": "reference://a::http://example.org/a.json"}] * 3
    pa.parquet.write_table(pa.table({"image": rows}), path)
    place.train(path.parent, "--image-column", "image")


def _damaged_cache(place: Place) -> None:
    images = place.images() / "images"
    place.train(images)
    file = next((place.folder / "cache").rglob("pixels.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    place.train(images)


SKIPPABLE = ("1 of the 6 images", "max_broken=0.01", "repair or remove them, or raise max_broken")
TOO_LARGE = ("above the limit of 89478485", "UNET_DIFFUSION_MAX_PIXELS")
IMAGES = [
    Case(
        "truncated JPEG among the training images",
        image("3.jpg", encoded("JPEG")[:200]),
        (r"3\.jpg cannot be decoded", *SKIPPABLE),
    ),
    Case("zero-byte file", image("3.png", b""), (r"3\.png is empty \(0 bytes\)", *SKIPPABLE)),
    Case(
        "text file named .png", image("3.png", b"hello"), (r"3\.png.*not an image; it begins with b'hello'", *SKIPPABLE)
    ),
    Case("decompression bomb, PNG of 1.6 gigapixels", image("3.png", bomb()), (*TOO_LARGE, *SKIPPABLE)),
    Case(
        "decompression bomb, TIFF of 3.6 gigapixels",
        lambda place: place.segment(place.write("a.tif", wide_tiff())),
        (r"60000x60000 pixels of 5 channels", *TOO_LARGE),
    ),
    Case("limit of pixels that is no number", limit_by_variable, ("'many'", "number of pixels")),
    Case(
        ".npy that states a terapixel",
        image("3.npy", npy((10**6, 10**6))),
        ("truncated.*1000000, 1000000", *SKIPPABLE),
    ),
    Case(".npy cut short", image("3.npy", npy((16, 16), bytes(9))), (r"truncated.*\(16, 16\)", *SKIPPABLE)),
    Case("large .npy cut short", _large("a.npy", npy((16, 16), bytes(9))), (r"a\.npy cannot be read", "damaged")),
    Case("large TIFF that is text", _large("a.tif", b"hello"), (r"a\.tif cannot be read: not a TIFF", "damaged")),
    Case("float TIFF with NaN", _nan_tiff, (r"nan\.tif has pixels that are NaN",)),
    Case(
        "colour image for a grey network",
        lambda place: place.segment(place.write("a.png", encoded("PNG", 16, "RGB"))),
        ("the image has 3 channels", "the network takes 1", 'convert\\("L"\\)'),
    ),
    Case("named pipe as an image", _pipe, (r"pipe\.png is a folder, a pipe or a device", "give an image file")),
    Case("empty folder", _empty_folder, ("nothing has no image", r"no file ends in .*\.png")),
    Case("folder without rights among others", _folder_without_rights, ("closed cannot be listed", "make it readable")),
    Case(
        "output folder without rights", _output_without_rights, ("cannot be written to", "change its rights, or choose")
    ),
    Case("damaged cache", _damaged_cache, ("the cache .* is damaged", "delete that folder")),
]
SETS = [
    Case("mask of another size", mask(1, 8), (r"3\.png\): mask 8x8, image 16x16", "another size")),
    Case(
        "mask with an unknown value",
        mask(7, 16, "--num-classes", 2),
        (r"3\.png\): 7", r"the classes, which are 0\.\.1"),
    ),
    Case("mask with very many values", mask(200), ("would be 201 classes", "State their meaning by mask_encoding")),
    Case("damaged mask", mask(encoded("PNG")[:30]), (r"3\.png cannot be decoded", "cannot be used: 1")),
    Case("image without a mask", mask(None), ("have no mask: 1", r"3\.png")),
    Case("masks of other names", _other_names, ("no image of .* has a mask", "must be equal except for the ending")),
    Case("two masks for one image", _two_masks, (r"3\.bmp and .*3\.png have the same name", "remove or rename one")),
    Case("300 classes", mask(1, 16, "--num-classes", 300), ("num_classes is 300", "from 2 to 255")),
    Case("Parquet without images", _parquet("numbers"), ("'number'", "holds no images", r"Columns: number")),
    Case("truncated Parquet", _parquet("truncated"), ("data is .*set'", "damaged or incomplete; get it again")),
    Case(
        "label beyond the classes", _parquet("labels"), ("label is 7", "must be from 0 to 1", "repair or remove them")
    ),
    Case("truncated save_to_disk folder", _saved_to_disk, ("data is .*saved'", "damaged or incomplete; get it again")),
    Case("image by a chained URL", chained_url, ("reference://a::http", "fetched by http", "download it first")),
]
