"""Facts about pixels that Pillow does not report, from the bytes of a file: bits per channel, and lossy compression."""

import re
import struct

LOSSY = frozenset({"JPEG", "MPO", "AVIF", "HEIF"})  # Pillow's names of formats that rarely keep every value
LOSSY_TIFF = frozenset({6, 7, 33003, 33004, 33005, 34712, 34892, 50001, 50002, 52546})  # JPEG, JPEG 2000, WebP, JPEG XL
IRREVERSIBLE = 0  # the JPEG 2000 wavelet that rounds; 1 is the one that does not
UNREAD = {  # first bytes of files that are not an image, or of a format that is not read, and what can be done
    rb".{4}ftyp(hei|hev|mif1|msf1)": "it is a HEIC image, which is not read; convert it to PNG or JPEG",
    rb".{4}ftypavi": "it is an AVIF image, which this Pillow does not read; install pillow 11.3 or newer",
    rb"\xff\n|\0\0\0\x0cJXL ": "it is a JPEG XL image, which is not read; convert it to PNG or TIFF",
    rb"v/1\x01|#\?RADIANCE": "it is an OpenEXR or Radiance image, which is not read; convert it to TIFF of floats",
    rb".{128}DICM": "it is a DICOM image, which is not read; convert it to TIFF, or save its pixels as .npy",
    rb"%!PS|\xc5\xd0\xd3\xc6": "it is PostScript, which is a program and not read; convert it to PNG or TIFF",
    rb"PK\x03\x04": "it is an archive, such as .npz, and not an image; save each array in a .npy file of its own",
    rb"\x1f\x8b": "it is compressed by gzip, as .nii.gz is; save each image or slice as TIFF or .npy",
    rb"\x89HDF": "it is an HDF5 file; save each image as TIFF or .npy",
    rb"version https://git-lfs": "it is a pointer of Git LFS instead of the image; run git lfs pull",
    rb"\s*<(!DOCTYPE html|html)": "it is a web page, as a download that failed leaves; download it again",
}


def unread_format(data: bytes) -> str | None:
    """Returns the kind of a file that cannot be read, and what can be done, if its first bytes tell the kind."""
    return next((what for begins, what in UNREAD.items() if re.match(begins, data, re.DOTALL | re.IGNORECASE)), None)


def bits_per_channel(kind: str | None, data: bytes) -> int:
    """Returns the bits per channel in a JPEG 2000 or AVIF file; 8 for other formats, or if the file does not say."""
    if kind == "JPEG2000":
        siz, _ = _jpeg2000(data)
        return max(((depth & 127) + 1 for depth in siz[38::3]), default=8)
    if kind == "AVIF":  # AV1 in ISOBMFF, section 2.3.3: high_bitdepth and twelve_bit
        flags = [found[1][0] for found in re.finditer(rb"av1C..(.)", data, re.DOTALL)]
        return max((8 + 2 * bool(each & 0x40) + 2 * bool(each & 0x20) for each in flags), default=8)
    return 8


def is_lossy(kind: str | None, data: bytes | None) -> bool:
    """Returns whether a file keeps its values only approximately; if its bytes cannot tell, it counts as such.

    Args:
        kind: Pillow's name of the format.
        data: the bytes of the file; None if they are not known.
    """
    if kind == "WEBP":
        return data is None or "VP8 " in _webp_chunks(data, 12)
    if kind == "JPEG2000":
        _, cod = _jpeg2000(data or b"")
        return len(cod) < 12 or cod[11] == IRREVERSIBLE
    return kind in LOSSY


def _jpeg2000(data: bytes) -> tuple[bytes, bytes]:
    """Returns the contents of the SIZ and COD markers of a codestream, from their lengths on, or empty bytes."""
    segments = {0x51: b"", 0x52: b""}
    place = data.find(b"\xff\x4f\xff\x51") + 2  # SOC, then SIZ
    while place > 1 and place + 4 <= len(data) and not segments[0x52]:
        marker, length = data[place + 1], struct.unpack_from(">H", data, place + 2)[0]
        segments[marker] = data[place + 2 : place + 2 + length]
        place += 2 + length
    return segments[0x51], segments[0x52]


def _webp_chunks(data: bytes, place: int) -> list[str]:
    """Returns the names of the chunks of a WebP file, including those inside the frames of an animation."""
    names = []
    while place + 8 <= len(data):
        name, length = data[place : place + 4].decode("latin-1"), struct.unpack_from("<I", data, place + 4)[0]
        names.append(name)
        place += 24 if name == "ANMF" else 8 + length + length % 2  # a frame starts with 16 bytes, then chunks
    return names
