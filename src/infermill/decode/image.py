"""Image files -> uint8 RGB arrays of the network's size.

    bytes ─► header: format, pixel count ─► simplejpeg | Pillow ─► upright RGB ─► resize ─► centre crop

The profile `exact` gives, bit for bit, what the pipeline gives that networks are usually trained with:

    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    image.resize((width, height), filter).crop(box)

but for these: 16-bit grey is scaled (`>> 8`) where Pillow clips it; JPEG data that are damaged are refused where
Pillow makes up the rest; damaged EXIF counts as upright; samples of 12 or 32 bits, signed or floating point, whose
range is not known, are refused. Alpha is dropped. Of several pictures in a file, the first one counts.

The profile `fast` reduces images with SIMD, and decodes a JPEG at 1/2, 1/4 or 1/8 of its size where that leaves at
least twice the resized size. Measured on photos, its values (0 to 255) differ from those of `exact` by at most 1
(bilinear, one value in seven) or 9 (bicubic, lanczos); where JPEGs are decoded smaller, by at most 9, and by 0.3 to
1.2 on average. Other filters, and enlarging, are the same in both.
"""

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from infermill.decode import png
from infermill.decode.resize import Picture, check_pixels, divisor_of, fit, with_size
from infermill.errors import BadInputError
from infermill.models.card import Preprocess
from infermill.types import MAX_PIXELS, DecodeProfile, FailureCode

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Row = NDArray[Any]
"Pixels [height, width, 3], or where sizes are asked for, a record of them and the size of the upright image."
Decode = Callable[["ReadableBuffer"], Row]

_JPEG = b"\xff\xd8\xff"
# Classes, because Image.open warns from half of its limit on.
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    _JPEG: JpegImageFile,  # and MPO, whose first picture is a JPEG like any other
    png.MAGIC: PngImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+"), TiffImageFile),
}
_LOOKS_LIKE = {
    rb"(?i)<(!doctype html|html|head|body)": "HTML",
    rb"<(\?xml|svg|Error>)": "XML",
    rb"[{\[]": "JSON",
    rb"%PDF": "PDF",
    rb"8BPS": "a Photoshop document",
    rb"(?s)....ftyp(hei|hev|mif|msf)": "HEIC",
    rb"(?s)....ftypavi": "AVIF",
    rb"(?s)....ftyp|RIFF": "sound or video",
    rb"(?s)....jP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"(?s)....JXL |\xff\x0a": "JPEG XL",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x1f\x8b": "gzip",
    rb"[^\0-\x08\x0e-\x1f\x7f]+\Z": "text",
}
# What Pillow raises on damaged files. MemoryError is not among them: it says more about the machine.
_DAMAGE = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SIDEWAYS = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}


def image_decoder(
    preprocess: Preprocess, profile: DecodeProfile = "exact", max_pixels: int = MAX_PIXELS, *, sized: bool = False
) -> Decode:
    """A function from the bytes of an image file to uint8 RGB [height, width, 3], resized and cropped; with `sized`,
    to a record of these `pixels` and the `size` (width, height) of the upright image.

    It may be called from many threads at once; the GIL is released while pixels are decoded and resized.
    It raises BadInputError with the stage `decode` and the code `empty`, `unsupported`, `truncated`, `corrupt` or
    `too_large`, and nothing else.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from infermill.models.card import Crop, Preprocess, Resize
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (500, 375), "teal").save(file, "JPEG")
        >>> decode = image_decoder(Preprocess(resize=Resize(shorter=256), crop=Crop(center=(224, 224))))
        >>> decode(file.getvalue()).shape
        (224, 224, 3)
    """

    def decode(data: "ReadableBuffer") -> Row:
        content = bytes(data)
        if content.startswith(_JPEG):
            picture = _read_jpeg(content, preprocess, profile, max_pixels)
        else:
            picture = _read_plain_png(content, max_pixels)
        picture = picture or _read(content, max_pixels)
        pixels = fit(picture, preprocess, profile, max_pixels)
        return with_size(pixels, picture) if sized else pixels

    return decode


def prepare(
    image: Image.Image,
    preprocess: Preprocess,
    profile: DecodeProfile = "exact",
    max_pixels: int = MAX_PIXELS,
    *,
    sized: bool = False,
) -> Row:
    """What `image_decoder` makes of a Pillow image of any mode: uint8 RGB [height, width, 3]; raises BadInputError.

    Example:
        >>> from infermill.models.card import Crop
        >>> prepare(Image.new("L", (3, 5), 7), Preprocess(crop=Crop(center=(1, 1)))).tolist()
        [[[7, 7, 7]]]
    """
    check_pixels(*image.size, max_pixels)
    with _pillow(b"", max_pixels):
        picture = _upright_rgb(image)
    pixels = fit(picture, preprocess, profile, max_pixels)
    return with_size(pixels, picture) if sized else pixels


def prepare_array(
    array: NDArray[Any],
    preprocess: Preprocess,
    profile: DecodeProfile = "exact",
    max_pixels: int = MAX_PIXELS,
    *,
    sized: bool = False,
) -> Row:
    """Resize and crop a uint8 array, RGB [height, width, 3] or grey [height, width], to uint8 RGB [height, width, 3].

    Raises BadInputError with the code `unsupported` for another shape or dtype, `empty` where there are no pixels,
    `too_large` where there are too many.

    Example:
        >>> from infermill.models.card import Resize
        >>> prepare_array(np.zeros((9, 9), np.uint8), Preprocess(resize=Resize(exact=(4, 6)))).shape
        (4, 6, 3)
    """
    if array.dtype != np.uint8 or array.ndim not in {2, 3} or array.shape[2:] not in {(), (3,)}:
        wanted = "uint8 [height, width, 3] or [height, width]"
        _refuse("unsupported", f"an array {array.dtype} {list(array.shape)}, where {wanted} is wanted")
    if array.size == 0:
        _refuse("empty", f"an array without pixels: {list(array.shape)}")
    check_pixels(array.shape[1], array.shape[0], max_pixels)
    rgb = array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    picture = Picture(rgb, rgb.shape[1], rgb.shape[0])
    pixels = fit(picture, preprocess, profile, max_pixels)
    return with_size(pixels, picture) if sized else pixels


def _refuse(code: FailureCode, message: str) -> NoReturn:
    raise BadInputError("decode", code, message)


def _read_jpeg(data: bytes, preprocess: Preprocess, profile: DecodeProfile, max_pixels: int) -> Picture | None:
    """Decode with simplejpeg; None where it objects, and Pillow has to decide."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(width, height, max_pixels)
        turn = _TURNS.get(_jpeg_orientation(data))
        size = (height, width) if turn in _SIDEWAYS else (width, height)
        divisor = 1 if profile == "exact" else divisor_of(*size, turn, preprocess)
        mode = "CMYK" if color_space in {"CMYK", "YCCK"} else "RGB"
        pixels = simplejpeg.decode_jpeg(data, mode, min_height=-(-height // divisor), min_width=-(-width // divisor))
    except KeyError:
        # Chroma subsampling that simplejpeg has no name for, such as 4:4:1.
        return None
    except ValueError as error:
        if "Premature end of JPEG file" in str(error):
            _refuse("truncated", "the JPEG data end before the image does")
        if "Corrupt JPEG data" in str(error) and "extraneous" not in str(error):
            _refuse("corrupt", str(error))
        return None
    if mode == "CMYK":
        # Adobe stores it inverted, and everybody after it.
        pixels = np.asarray(Image.frombytes("CMYK", pixels.shape[1::-1], pixels, "raw", "CMYK;I").convert("RGB"))
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    return Picture(pixels, *size, divisor)


def _read_plain_png(data: bytes, max_pixels: int) -> Picture | None:
    if (size := png.plain_size(data)) is None:
        return None
    check_pixels(*size, max_pixels)
    pixels = png.decode_plain(data, size)
    return None if pixels is None else Picture(pixels, *size)


def _jpeg_orientation(data: bytes) -> int:
    """The orientation; Pillow is asked only where the header holds metadata (APP1), or is not plain."""
    at = 2
    while data[at : at + 2] != b"\xff\xda":
        if data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] in {b"\xe1", b"\xff"}:
            with _pillow(data, MAX_PIXELS):
                return _orientation(JpegImageFile(io.BytesIO(data)))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 1


def _read(data: bytes, max_pixels: int) -> Picture:
    if not data:
        _refuse("empty", "0 bytes")
    reader = next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)
    if reader is None or (reader is WebPImageFile and data[8:12] != b"WEBP"):
        head = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip()
        look = next((f"looks like {name}" for pattern, name in _LOOKS_LIKE.items() if re.match(pattern, head)), None)
        _refuse("unsupported", look or f"no image format that begins with {data[:8].hex(' ')}")
    with _pillow(data, max_pixels):
        image = reader(io.BytesIO(data))
        check_pixels(*image.size, max_pixels)
        return _upright_rgb(image)


def _upright_rgb(image: Image.Image) -> Picture:
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        if tags.get(BITSPERSAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC_INTERPRETATION, 1) != 1:
            _refuse("unsupported", "grey TIFF of 12 bits, or of 16 bits with 0 as white")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        _refuse("unsupported", "samples of 32 bits, or signed, whose range is not known")
    if "transparency" in image.info:
        # Its conversion can fail, and it is dropped anyway.
        image = image.copy()
        del image.info["transparency"]
    rgb = image.convert("RGB")
    upright = rgb if turn is None else rgb.transpose(turn)
    return Picture(np.asarray(upright), *upright.size)


def _orientation(image: Image.Image) -> int:
    try:
        return cast(int, image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


class _StrictAndSilent:
    """Holds three settings of the process while any thread reads with Pillow: truncated files are errors, though
    another library may have said otherwise; there are no warnings, such as those about metadata; and what Pillow
    itself refuses as too large is not smaller than what is allowed here. Raised and not switched off, its limit still
    holds for what is allocated before the size is known here: the canvas of a WebP, a tile of a TIFF.

    Threads are counted: if each saved and restored by itself, one would restore what another one had set.
    """

    _silence = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._was_tolerant = False
        self._had_limit: int | None = None

    @contextmanager
    def hold(self, max_pixels: int) -> Iterator[None]:
        """Hold them in this thread."""
        # Not by warnings.filterwarnings, after which the process shows anew the warnings that it shows once.
        filters = cast(list[Any], warnings.filters)
        with self._lock:
            self._threads += 1
            if ImageFile.LOAD_TRUNCATED_IMAGES:
                self._was_tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = True, False
            limit = Image.MAX_IMAGE_PIXELS  # half of what it refuses
            if limit is not None and 2 * limit < max_pixels:
                self._had_limit, Image.MAX_IMAGE_PIXELS = self._had_limit or limit, -(-max_pixels // 2)
            if filters[:1] != [self._silence]:
                filters.insert(0, self._silence)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        filters = cast(list[Any], warnings.filters)
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                filters[:] = [entry for entry in filters if entry != self._silence]
                if self._was_tolerant:
                    self._was_tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = False, True
                if self._had_limit is not None:
                    self._had_limit, Image.MAX_IMAGE_PIXELS = None, self._had_limit


_STRICT_AND_SILENT = _StrictAndSilent()


@contextmanager
def _pillow(data: bytes, max_pixels: int) -> Iterator[None]:
    """Pillow at work on `data`: what it raises becomes BadInputError."""
    with _STRICT_AND_SILENT.hold(max_pixels):
        try:
            yield
        except Image.DecompressionBombError as error:
            _refuse("too_large", str(error))
        except _DAMAGE as error:
            message = str(error) or type(error).__name__
            if re.search("cannot handle|nsupported|not supported|unknown pixel mode|not available", message):
                _refuse("unsupported", message)
            _refuse("truncated" if "runcated" in message or _ends_early(data) else "corrupt", message)


def _ends_early(data: bytes) -> bool:
    """Whether a file is shorter than it says, where that can be told without decoding it."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data.startswith(b"RIFF"):
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    if data[2:4] in {b"*\0", b"\0*"}:
        order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
        directory = int.from_bytes(data[4:8], order)
        entries = int.from_bytes(data[directory : directory + 2], order)
        return directory + 2 + 12 * entries + 4 > len(data)
    return data.startswith(_JPEG) and b"\xff\xd9" not in data
