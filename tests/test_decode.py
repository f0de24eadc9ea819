import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.Image import Resampling

from infermill.decode.image import image_decoder, prepare, prepare_array
from infermill.errors import BadInputError
from infermill.models.card import Crop, Filter, Preprocess, Resize
from infermill.types import MAX_PIXELS, DecodeProfile, FailureCode
from tests.images import BAD, GOOD, encoded, exif_bytes, jpeg_bytes, photo, tolerance

Pixels = NDArray[np.uint8]
PROFILES = get_args(DecodeProfile)
FILTERS = get_args(Filter)
AS_STORED = Preprocess()
CLASSIC = Preprocess(resize=Resize(shorter=256), crop=Crop(center=(224, 224)))
PILLOW_REFUSES = {"jpeg EXIF that is none"}


def shown(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """The reference: torchvision's Resize and CenterCrop, and Ultralytics' LetterBox but for OpenCV, written with plain
    Pillow calls on whole images.
    """
    width, height = image.size
    resize = preprocess.resize
    if resize is not None:
        if resize.exact is not None:
            height, width = resize.exact
        elif resize.letterbox is not None:
            ratio = min(resize.letterbox[0] / height, resize.letterbox[1] / width)
            width, height = max(round(width * ratio), 1), max(round(height * ratio), 1)
        elif resize.shorter is not None and width <= height:
            width, height = resize.shorter, int(resize.shorter * height / width)
        elif resize.shorter is not None:
            width, height = int(resize.shorter * width / height), resize.shorter
        image = image.resize((width, height), Resampling[resize.filter.upper()])
    if resize is not None and resize.letterbox is not None:
        box = Image.new("RGB", resize.letterbox[::-1], (resize.fill,) * 3)
        box.paste(image, (round((box.width - width) / 2 - 0.1), round((box.height - height) / 2 - 0.1)))
        image = box
    if preprocess.crop is not None:
        crop_height, crop_width = preprocess.crop.center
        left, top = max((crop_width - width) // 2, 0), max((crop_height - height) // 2, 0)
        padded = Image.new("RGB", (max(width, crop_width), max(height, crop_height)))
        padded.paste(image, (left, top))
        left = round((padded.width - crop_width) / 2.0)
        top = round((padded.height - crop_height) / 2.0)
        image = padded.crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(image)


def pillow_reads(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def noise(seed: int, width: int, height: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def refusal(data: bytes, profile: DecodeProfile = "exact", max_pixels: int = MAX_PIXELS) -> tuple[FailureCode, str]:
    with pytest.raises(BadInputError) as caught:
        image_decoder(AS_STORED, profile, max_pixels)(data)
    assert caught.value.failure.stage == "decode"
    return caught.value.failure.code, caught.value.failure.message


pixels = st.integers(1, 40) | st.integers(1, 400)
resizes = st.builds(Resize, shorter=st.integers(1, 90), filter=st.sampled_from(FILTERS)) | st.builds(
    Resize, exact=st.tuples(pixels, pixels), filter=st.sampled_from(FILTERS)
)
crops = st.builds(Crop, center=st.tuples(st.integers(1, 120), st.integers(1, 120)))
letterboxes = st.builds(
    Resize, letterbox=st.tuples(pixels, pixels), filter=st.sampled_from(FILTERS), fill=st.integers(0, 255)
)
preprocesses = st.builds(Preprocess, resize=st.none() | resizes, crop=st.none() | crops) | st.builds(
    Preprocess, resize=letterboxes
)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", GOOD)
def test_every_variant_shows_the_image(name: str, profile: DecodeProfile) -> None:
    data, reference = GOOD[name]
    array = image_decoder(AS_STORED, profile)(data)
    assert array.dtype == np.uint8
    assert array.shape == (reference.height, reference.width, 3)
    assert np.abs(array.astype(int) - np.asarray(reference)).max() <= tolerance(name)


@pytest.mark.parametrize("name", [name for name in GOOD if "16-bit grey" not in name and name not in PILLOW_REFUSES])
def test_exact_is_pillow_bit_for_bit(name: str) -> None:
    data = GOOD[name][0]
    for preprocess in (
        AS_STORED,
        CLASSIC,
        Preprocess(resize=Resize(shorter=32, filter="bicubic"), crop=Crop(center=(28, 28))),
        Preprocess(resize=Resize(exact=(17, 23), filter="lanczos")),
    ):
        assert np.array_equal(image_decoder(preprocess)(data), shown(pillow_reads(data), preprocess))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decoded_is_told_by_code(name: str, profile: DecodeProfile) -> None:
    data, code = BAD[name]
    assert refusal(data, profile)[0] == code


@settings(deadline=None, max_examples=1500)
@given(pixels, pixels, preprocesses, st.integers(0, 3))
@example(500, 375, CLASSIC, 0)
@example(375, 500, CLASSIC, 0)
@example(256, 256, CLASSIC, 0)
@example(1, 1, CLASSIC, 0)
@example(500, 375, Preprocess(resize=Resize(letterbox=(640, 640))), 0)
@example(375, 500, Preprocess(resize=Resize(letterbox=(320, 320))), 0)
@example(4000, 2, Preprocess(resize=Resize(letterbox=(64, 64))), 0)
# Pillow 13 resizes rows first where the height shrinks by more than twice as much as the width.
@example(100, 400, Preprocess(resize=Resize(shorter=32), crop=Crop(center=(32, 32))), 0)
@example(150, 401, Preprocess(resize=Resize(exact=(30, 90)), crop=Crop(center=(20, 20))), 0)
# The edges of the crop need more than the 24 bits of a float32.
@example(60_001, 2, Preprocess(resize=Resize(exact=(2, 8192)), crop=Crop(center=(2, 4099))), 0)
def test_resize_and_crop_equal_those_of_the_whole_image(
    width: int, height: int, preprocess: Preprocess, seed: int
) -> None:
    image = noise(seed, width, height)
    assert np.array_equal(prepare_array(image, preprocess), shown(Image.fromarray(image), preprocess))


@settings(deadline=None, max_examples=150)
@given(pixels, pixels, preprocesses, st.sampled_from(["L", "RGB", "CMYK"]))
def test_a_jpeg_of_any_size_equals_pillow(width: int, height: int, preprocess: Preprocess, mode: str) -> None:
    data = jpeg_bytes(photo(3, (width, height)).convert(mode), subsampling=2)
    assert np.array_equal(image_decoder(preprocess)(data), shown(pillow_reads(data), preprocess))


def test_an_image_of_the_wanted_size_is_not_touched() -> None:
    image = noise(0, 64, 48)
    same = Preprocess(resize=Resize(exact=(48, 64), filter="lanczos"), crop=Crop(center=(48, 64)))
    for profile in PROFILES:
        assert np.array_equal(prepare_array(image, same, profile), image)


def test_chroma_subsampling_without_a_name_is_left_to_pillow() -> None:
    data = jpeg_bytes(photo(4, (64, 32)), subsampling="4:1:1")
    at = data.index(b"\xff\xc0")
    # The blocks of 32 x 8 pixels become blocks of 8 x 32: 4:4:1.
    tall = data[: at + 5] + b"\0\x80\0\x10" + data[at + 9 : at + 11] + b"\x14" + data[at + 12 :]
    assert np.array_equal(image_decoder(AS_STORED)(tall), np.asarray(pillow_reads(tall)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "RGBa"])
def test_a_pillow_image_of_any_mode_is_prepared_as_its_file(mode: str) -> None:
    image = photo(5, (300, 200))
    image = image.convert("RGBA").convert("RGBa") if mode == "RGBa" else image.convert(mode)
    before = image.tobytes()
    assert np.array_equal(prepare(image, CLASSIC), shown(image.convert("RGB"), CLASSIC))
    assert image.tobytes() == before


def test_a_pillow_image_is_turned_and_scaled() -> None:
    turned = Image.open(io.BytesIO(GOOD["png orientation 6"][0]))
    assert np.array_equal(prepare(turned, AS_STORED), np.asarray(GOOD["png orientation 6"][1]))
    deep = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    assert np.array_equal(prepare(deep, AS_STORED)[..., 0], np.arange(65536).reshape(256, 256) >> 8)


def test_a_broken_or_unknown_pillow_image_is_a_bad_input() -> None:
    truncated = Image.open(io.BytesIO(BAD["png, 50 % of it"][0]))
    with pytest.raises(BadInputError, match="truncated"):
        prepare(truncated, AS_STORED)
    with pytest.raises(BadInputError, match="range"):
        prepare(Image.new("F", (3, 3)), AS_STORED)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((4, 4, 3), np.float32), "unsupported"),
        (np.zeros((4, 4, 4), np.uint8), "unsupported"),
        (np.zeros(4, np.uint8), "unsupported"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
    ],
)
def test_an_array_that_is_no_image_is_a_bad_input(array: NDArray[np.generic], code: FailureCode) -> None:
    with pytest.raises(BadInputError) as caught:
        prepare_array(array, CLASSIC)
    assert caught.value.failure.code == code


def test_grey_and_strided_arrays() -> None:
    grey = noise(1, 90, 70)[..., 0]
    assert np.array_equal(prepare_array(grey, CLASSIC), shown(Image.fromarray(grey).convert("RGB"), CLASSIC))
    assert np.array_equal(prepare_array(grey.T[::-1], AS_STORED)[..., 1], grey.T[::-1])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_decoded(kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    data, reference = GOOD["png RGB"]
    assert np.array_equal(image_decoder(AS_STORED)(kind(data)), np.asarray(reference))


def test_pixels_are_counted_before_decoding() -> None:
    for name in ("jpeg", "png RGB", "gif", "webp lossless", "bmp RGB", "tiff raw"):
        assert refusal(GOOD[name][0], max_pixels=61 * 43 - 1)[0] == "too_large"
        image_decoder(AS_STORED, max_pixels=61 * 43)(GOOD[name][0])


def test_an_image_that_would_grow_beyond_the_limit_is_refused() -> None:
    sliver = encoded(Image.new("L", (1, 60_000)), "PNG")
    with pytest.raises(BadInputError) as caught:
        image_decoder(CLASSIC)(sliver)
    assert caught.value.failure.code == "too_large"


def test_an_image_beyond_the_size_that_pillow_warns_of_is_decoded() -> None:
    wide = encoded(Image.new("1", (10_000, 9_000)), "TIFF", compression="group4")
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS < 10_000 * 9_000 < MAX_PIXELS
    small = Preprocess(resize=Resize(exact=(2, 2), filter="nearest"))
    assert image_decoder(small)(wide).shape == (2, 2, 3)


@pytest.mark.parametrize("name", ["webp lossless", "tiff raw", "gif"])
def test_an_image_beyond_what_pillow_refuses_is_decoded_where_it_is_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data, reference = GOOD[name]
    decode = image_decoder(AS_STORED, max_pixels=61 * 43)
    with ThreadPoolExecutor(4) as threads:
        for pixels in threads.map(decode, [data] * 20):
            assert pixels.shape == np.asarray(reference).shape
    assert refusal(data, max_pixels=61 * 43 - 1)[0] == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pixels_of_a_pillow_image_are_counted_before_it_is_loaded() -> None:
    image = Image.open(io.BytesIO(GOOD["tiff raw"][0]))
    with pytest.raises(BadInputError) as caught:
        prepare(image, AS_STORED, max_pixels=61 * 43 - 1)
    assert caught.value.failure.code == "too_large"
    assert image.tile  # not loaded
    assert prepare(image, AS_STORED, max_pixels=61 * 43).shape == (43, 61, 3)


def test_messages_say_what_it_looks_like() -> None:
    assert "HTML" in refusal(BAD["html.jpg"][0])[1]
    assert "PDF" in refusal(BAD["pdf"][0])[1]
    assert "HEIC" in refusal(BAD["heic"][0])[1]
    assert "00 01 02" in refusal(BAD["binary"][0])[1]
    assert "XML" in refusal(b"\xef\xbb\xbf<?xml version='1.0'?><Error>")[1]


def test_tolerance_of_another_library_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut = [data for name, (data, _) in BAD.items() if "% of it" in name or "damaged" in name]
    with ThreadPoolExecutor(4) as threads:
        codes = list(threads.map(lambda data: refusal(data)[0], cut * 3))
    assert codes == [code for name, (_, code) in BAD.items() if "% of it" in name or "damaged" in name] * 3
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_process_is_left_as_it_was() -> None:
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for data, _ in GOOD.values():
        image_decoder(CLASSIC)(data)
    for data, _ in BAD.values():
        refusal(data)
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


@pytest.mark.parametrize("profile", PROFILES)
def test_threads_decode_alike(profile: DecodeProfile) -> None:
    decode = image_decoder(CLASSIC, profile)
    files = [data for data, _ in GOOD.values()]
    alone = [decode(data) for data in files]
    with ThreadPoolExecutor(4) as threads:
        for array, expected in zip(threads.map(decode, files * 4), alone * 4, strict=True):
            assert np.array_equal(array, expected)


@settings(deadline=None, max_examples=4000)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), max_size=6),
    st.floats(0, 1) | st.just(1.0),
    st.sampled_from(PROFILES),
)
def test_damaged_files_raise_nothing_else(
    name: str, changes: list[tuple[float, int, bool]], share: float, profile: DecodeProfile
) -> None:
    data = bytearray(GOOD[name][0])
    for where, value, in_header in changes:
        # Most of what can go wrong is in the first bytes.
        data[int(where * (min(len(data), 200 if in_header else len(data)) - 1))] = value
    decode = image_decoder(Preprocess(resize=Resize(shorter=20), crop=Crop(center=(16, 18))), profile, 1 << 22)
    try:
        array = decode(data[: int(len(data) * share)])
    except BadInputError as error:
        assert error.failure.stage == "decode"
    else:
        assert array.shape == (16, 18, 3)
        assert array.dtype == np.uint8


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 427)])
def test_fast_is_near_exact(name: Filter, size: tuple[int, int]) -> None:
    preprocess = Preprocess(resize=Resize(shorter=256, filter=name), crop=Crop(center=(224, 224)))
    data = jpeg_bytes(photo(6, size), quality=90)
    difference = np.abs(image_decoder(preprocess, "fast")(data).astype(int) - image_decoder(preprocess)(data))
    assert difference.max() <= (1 if name == "bilinear" else 9)


@settings(deadline=None, max_examples=300)
@given(pixels, pixels, pixels, pixels, crops)
def test_fast_bilinear_is_within_one_of_exact_on_noise(
    width: int, height: int, to_width: int, to_height: int, crop: Crop
) -> None:
    image = noise(7, width, height)
    preprocess = Preprocess(resize=Resize(exact=(to_height, to_width)), crop=crop)
    difference = prepare_array(image, preprocess, "fast").astype(int) - prepare_array(image, preprocess)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("name", ["nearest", "box", "hamming"])
def test_filters_without_a_fast_twin_are_exact(name: Filter) -> None:
    preprocess = Preprocess(resize=Resize(shorter=32, filter=name), crop=Crop(center=(28, 28)))
    data = jpeg_bytes(photo(9, (400, 300)))
    assert np.array_equal(image_decoder(preprocess, "fast")(data), image_decoder(preprocess)(data))


@pytest.mark.parametrize("name", FILTERS)
def test_fast_enlarges_as_exact_does(name: Filter) -> None:
    # Here cykooz 4.0 reads outside of the image, and may end the process.
    image = noise(8, 20, 40)
    preprocess = Preprocess(resize=Resize(exact=(55, 60), filter=name), crop=Crop(center=(18, 3)))
    assert np.array_equal(prepare_array(image, preprocess, "fast"), prepare_array(image, preprocess))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(1600, 1200), (1203, 1601), (3000, 2048)])
def test_fast_decodes_large_jpegs_smaller(size: tuple[int, int], orientation: int) -> None:
    grain = Image.fromarray(noise(9, size[0] // 6, size[1] // 6)).resize(size, Resampling.BICUBIC)
    data = jpeg_bytes(Image.blend(photo(9, size), grain, 0.4), quality=90, exif=exif_bytes(orientation))
    difference = np.abs(image_decoder(CLASSIC, "fast")(data).astype(int) - image_decoder(CLASSIC)(data))
    assert difference.mean() <= 1.5
    assert difference.max() <= 9
