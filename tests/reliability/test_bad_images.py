"""Each bad image, mask or data set ends in a sentence that says the value, the rule and the fix."""

import io
import os
import shutil
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tifffile
from PIL import Image

from tests.reliability.sandbox import Attempt, Sandbox, as_nobody, cases, encoded, without_rights
from unet_diffusion.data.sources import open_source
from unet_diffusion.files import check_output
from unet_diffusion.images.decoding import decode_image, pixel_limit
from unet_diffusion.images.large_images import open_image

PROMISE = "Bad input"


def bomb(side: int = 40_000) -> bytes:
    """Returns a PNG of a few kilobytes that states far more pixels than memory should hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side + 1) * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def npy(shape: tuple[int, ...], values: bytes = b"") -> bytes:
    """Returns a `.npy` file that states this shape, and holds these values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + values


def wide_tiff() -> bytes:
    """Returns a TIFF of 5 channels, which Pillow does not read, that states 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((4, 4, 5), np.uint8), planarconfig="contig", photometric="minisblack")
    data = bytearray(buffer.getvalue())
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12):
        tag, kind = struct.unpack("<HH", data[entry : entry + 4])
        if tag in (256, 257):  # width and height
            data[entry + 8 : entry + 12] = struct.pack("<I" if kind == 4 else "<HH", *((60_000, 0)[: 3 - kind // 2]))
    return bytes(data)


def image(name: str, content: bytes) -> Attempt:
    """Trains on six images, one of which has this content."""

    def attempt(sandbox: Sandbox) -> None:
        images = sandbox.images() / "images"
        (images / "3.png").unlink()
        (images / name).write_bytes(content)
        sandbox.train(images)

    return attempt


def mask(value: int | bytes | None, side: int = 16, *options: object) -> Attempt:
    """Trains on six images, one of which has another mask: of one value, with this content, or none."""

    def attempt(sandbox: Sandbox) -> None:
        data = sandbox.images()
        path = data / "masks" / "3.png"
        path.unlink()
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            Image.new("L", (side, side), value).save(path)
        sandbox.train_masks(data, *options)

    return attempt


def _nan_tiff(sandbox: Sandbox) -> None:
    values = np.zeros((16, 16), np.float32)
    values[3, 4] = np.nan
    tifffile.imwrite(sandbox.folder / "nan.tif", values)
    sandbox.segment(sandbox.folder / "nan.tif")


def _large(name: str, content: bytes) -> Attempt:
    return lambda sandbox: open_image(sandbox.write(name, content))


def _limit_by_variable(sandbox: Sandbox) -> None:
    """Sets the variable that raises the limit to something that is not a number."""
    os.environ["UNET_DIFFUSION_MAX_PIXELS"] = "many"
    try:
        sandbox.segment(sandbox.write("a.png", encoded("PNG")))
    finally:
        del os.environ["UNET_DIFFUSION_MAX_PIXELS"]


def _parquet(content: str) -> Attempt:
    def attempt(sandbox: Sandbox) -> None:
        rows = [{"bytes": encoded("PNG"), "path": None}] * 9
        columns = {"number": [1, 2]} if content == "numbers" else {"image": rows, "label": [0, 1, 7] * 3}
        path = sandbox.folder / "set" / "a.parquet"
        path.parent.mkdir()
        if content == "labels":
            names = datasets.ClassLabel(names=["cat", "dog"])
            schema = datasets.Features({"image": datasets.Image(), "label": names}).arrow_schema
            pa.parquet.write_table(pa.Table.from_pydict(columns, schema=schema), path)
        else:
            pa.parquet.write_table(pa.table(columns), path)
        if content == "truncated":
            path.write_bytes(path.read_bytes()[:200])
        sandbox.train(path.parent, "--image-column", "image" if content != "numbers" else "number")

    return attempt


def _saved_to_disk(sandbox: Sandbox) -> None:
    datasets.Dataset.from_dict({"image": [encoded("PNG")] * 4}).save_to_disk(sandbox.folder / "saved")
    file = next((sandbox.folder / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    sandbox.train(sandbox.folder / "saved", "--image-column", "image")


def _other_names(sandbox: Sandbox) -> None:
    data = sandbox.images()
    for letter, path in zip("abcdef", sorted((data / "masks").iterdir())):
        path.rename(path.with_name(f"mask-{letter}.png"))
    sandbox.train_masks(data)


def _two_masks(sandbox: Sandbox) -> None:
    data = sandbox.images()
    shutil.copy(data / "masks" / "3.png", data / "masks" / "3.bmp")
    sandbox.train_masks(data)


def _pipe(sandbox: Sandbox) -> None:
    os.mkfifo(sandbox.folder / "pipe.png")
    sandbox.segment(sandbox.folder / "pipe.png")


def _folder_without_rights(sandbox: Sandbox) -> None:
    with as_nobody() as folder:
        for name in ("open", "closed"):
            (folder / name).mkdir()
            (folder / name / "a.png").write_bytes(encoded("PNG"))
        (folder / "closed").chmod(0)
        try:
            without_rights(lambda: open_source(folder))
        finally:
            (folder / "closed").chmod(0o755)


def _output_without_rights(sandbox: Sandbox) -> None:
    with as_nobody() as folder:
        folder.chmod(0o555)
        without_rights(lambda: check_output(folder / "masks"))


def _empty_folder(sandbox: Sandbox) -> None:
    (sandbox.folder / "nothing").mkdir()
    sandbox.train(sandbox.folder / "nothing")


def _chained_url(sandbox: Sandbox) -> None:
    """A table that names a file system built on another."""
    path = sandbox.folder / "set" / "a.parquet"
    path.parent.mkdir()
    rows = [{"bytes": None, "path": "reference://a::http://example.org/a.json"}] * 3
    pa.parquet.write_table(pa.table({"image": rows}), path)
    sandbox.train(path.parent, "--image-column", "image")


def _damaged_cache(sandbox: Sandbox) -> None:
    images = sandbox.images() / "images"
    sandbox.train(images)
    file = next((sandbox.folder / "cache").rglob("pixels.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    sandbox.train(images)


SKIPPABLE = ("1 of the 6 images", "max_broken=0.01", "repair or remove them, or raise max_broken")
TOO_LARGE = ("above the limit of 89478485", "UNET_DIFFUSION_MAX_PIXELS")
IMAGES = [
    (
        "truncated JPEG among the training images",
        image("3.jpg", encoded("JPEG")[:200]),
        r"3\.jpg cannot be decoded",
        *SKIPPABLE,
    ),
    ("zero-byte file", image("3.png", b""), r"3\.png is empty \(0 bytes\)", *SKIPPABLE),
    ("text file named .png", image("3.png", b"hello"), r"3\.png.*not an image of .*begins with b'hello'", *SKIPPABLE),
    ("decompression bomb, PNG of 1.6 gigapixels", image("3.png", bomb()), *TOO_LARGE, *SKIPPABLE),
    (
        "decompression bomb, TIFF of 3.6 gigapixels",
        lambda sandbox: sandbox.segment(sandbox.write("a.tif", wide_tiff())),
        r"60000x60000 pixels of 5 channels",
        *TOO_LARGE,
    ),
    ("limit of pixels that is not a number", _limit_by_variable, "'many'", "number of pixels"),
    (".npy that states a terapixel", image("3.npy", npy((10**6, 10**6))), "truncated.*1000000, 1000000", *SKIPPABLE),
    (".npy cut short", image("3.npy", npy((16, 16), bytes(9))), r"truncated.*\(16, 16\)", *SKIPPABLE),
    ("large .npy cut short", _large("a.npy", npy((16, 16), bytes(9))), r"a\.npy cannot be read", "damaged"),
    ("large TIFF that is text", _large("a.tif", b"hello"), r"a\.tif cannot be read: not a TIFF", "damaged"),
    ("float TIFF with NaN", _nan_tiff, r"nan\.tif has pixels that are NaN"),
    (
        "colour image for a grey network",
        lambda sandbox: sandbox.segment(sandbox.write("a.png", encoded("PNG", 16, "RGB"))),
        "the image has 3 channels",
        "the network takes 1",
        r"convert it to 1 channel \(grey\)",
    ),
    ("named pipe as an image", _pipe, r"pipe\.png is a folder, a pipe or a device", "give an image file"),
    ("empty folder", _empty_folder, "nothing has no image", r"no file ends in .*\.png"),
    ("folder without rights among others", _folder_without_rights, "closed cannot be listed", "make it readable"),
    ("output folder without rights", _output_without_rights, "cannot be written to", "change its rights, or choose"),
    ("damaged cache", _damaged_cache, "the cache .* is damaged", "delete that folder"),
]
SETS = [
    ("mask of another size", mask(1, 8), r"3\.png\): mask 8x8, image 16x16", "another size"),
    ("mask with an unknown value", mask(7, 16, "--num-classes", 2), r"3\.png\): 7", r"the classes, which are 0\.\.1"),
    ("mask with very many values", mask(200), "would be 201 classes", "State their meaning by mask_encoding"),
    ("damaged mask", mask(encoded("PNG")[:30]), r"3\.png cannot be decoded", "cannot be used: 1"),
    ("image without a mask", mask(None), "have no mask: 1", r"3\.png"),
    ("masks of other names", _other_names, "no image of .* has a mask", "must be equal except for the ending"),
    ("two masks for one image", _two_masks, r"3\.bmp and .*3\.png have the same name", "remove or rename one"),
    ("300 classes", mask(1, 16, "--num-classes", 300), "num_classes is 300", "from 2 to 255"),
    ("Parquet without images", _parquet("numbers"), "'number'", "holds no images", r"Columns: number"),
    ("truncated Parquet", _parquet("truncated"), "data is .*set'", "damaged or incomplete; get it again"),
    ("label beyond the classes", _parquet("labels"), "label is 7", "must be from 0 to 1", "repair or remove them"),
    ("truncated save_to_disk folder", _saved_to_disk, "data is .*saved'", "damaged or incomplete; get it again"),
    ("image at a chained URL", _chained_url, "reference://a::http", "fetched by http", "download it first"),
]


@pytest.mark.parametrize(("attempt", "says"), cases(IMAGES + SETS))
def test_bad_images_masks_and_data_sets(attempt, says, sandbox, request, record_property):
    record_property("fault", request.node.callspec.id)
    record_property("figure", sandbox.refusal(attempt, *says))


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
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    for pages, fits in ((200, False), (20, True)):  # 40x40 = 1,600 pixels, of 50 and 5 times 4 channels
        tifffile.imwrite(tmp_path / "a.tif", np.zeros((pages, 40, 40), np.uint8), compression="zlib")
        if fits:
            assert decode_image(tmp_path / "a.tif", axes="CHW").shape == (40, 40, 20)
        else:
            with pytest.raises(ValueError, match="40x40 pixels of 200 channels, above the limit of 10000"):
                decode_image(tmp_path / "a.tif", axes="CHW")
