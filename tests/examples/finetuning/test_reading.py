"""The rule for masks and that for images: what is read, and what is refused in which words."""

import io
import struct
import zlib
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import PIL
import pytest
from hypothesis import assume, given
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import distance_transform_edt

from parts.data.reading import Reading, read_image, read_mask

HEIGHT, WIDTH = 24, 40
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[5:15, 8:30] = True
ON = MASK.astype(np.uint8)
OTHER = np.zeros_like(MASK)
OTHER[17:22, 30:38] = True
SPECKS = np.eye(HEIGHT, WIDTH, dtype=bool)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def palette(values: NDArray[np.uint8], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(values, mode="P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def with_alpha(colour: int, alpha: NDArray[np.uint8]) -> Image.Image:
    bands = [Image.new("L", (WIDTH, HEIGHT), colour)] * 3
    return Image.merge("RGBA", [*bands, Image.fromarray(alpha)])


def coloured(colour: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(MASK[..., None] * np.array(colour, dtype=np.uint8))


# Two-valued masks: how they are encoded, and how the check describes them.
ENCODINGS = {
    "0 and 1": (Image.fromarray(ON), "values 0 and 1"),
    "0 and 255": (Image.fromarray(ON * 255), "values 0 and 255"),
    "0 and 254": (Image.fromarray(ON * 254), "values 0 and 254"),
    "0 and 3": (Image.fromarray(ON * 3), "values 0 and 3"),
    "one bit": (Image.fromarray(MASK), "values 0 and 1"),
    "16 bit": (Image.fromarray(ON.astype(np.uint16) * 65535), "values 0 and 65535"),
    "16 bit of 1": (Image.fromarray(ON.astype(np.uint16)), "values 0 and 1"),
    "32 bit": (Image.fromarray(ON.astype(np.int32)), "values 0 and 1"),
    "numbers": (Image.fromarray(ON.astype("f4")), "values 0 and 1"),
    "three channels": (Image.fromarray(np.stack([ON * 255] * 3, axis=-1)), "values 0 and 255"),
    "constant alpha": (Image.fromarray(ON * 255).convert("RGBA"), "values 0 and 255"),
    "white in alpha": (with_alpha(255, ON * 255), "values 0 and 255"),
    "black in alpha": (with_alpha(0, ON * 255), "values 0 and 255"),
    "grey and alpha": (
        Image.merge("LA", [Image.new("L", (WIDTH, HEIGHT), 255), Image.fromarray(ON * 255)]),
        "values 0 and 255",
    ),
    "red on black": (coloured((255, 0, 0)), "values 0 and 1"),
    "black and white palette": (palette(ON, (0, 0, 0), (255, 255, 255)), "values 0 and 255"),
    "white and black palette": (palette(1 - ON, (255, 255, 255), (0, 0, 0)), "values 0 and 255"),
    "coloured palette": (palette(ON, (0, 0, 0), (128, 0, 0)), "values 0 and 1"),
    "red and black palette": (palette(1 - ON, (255, 0, 0), (0, 0, 0)), "values 0 and 1"),
    "a class of a palette": (palette(ON * 2, *[(0, 0, 0), (9, 0, 0), (0, 9, 0)]), "values 0 and 2"),
    "quantized": (coloured((255, 0, 0)).quantize(2), "values 0 and 1"),
    "a dark colour on black": (coloured((0, 0, 1)), "values 0 and 1"),
    "what JPEG leaves beside both values": (
        Image.fromarray(np.where(SPECKS, np.where(MASK, 254, 1), ON * 255).astype(np.uint8)),
        "values from 0 to 255 with a soft edge",
    ),
}
TIFF = ("32 bit", "numbers")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_valued_masks(encoding: str, tmp_path: Path) -> None:
    image, kind = ENCODINGS[encoding]
    path = tmp_path / ("mask.tif" if encoding in TIFF else "mask.png")
    image.save(path)
    found = read_mask(path)
    np.testing.assert_array_equal(found.object, MASK)
    assert found.known.all()
    assert found.kind == kind


@pytest.mark.parametrize(("value", "full"), [(1, True), (255, True), (0, False)])
def test_a_mask_may_fill_the_image_or_be_empty(value: int, full: bool, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png").object == full).all()


def three(first: int, second: int, third: int) -> NDArray[np.uint8]:
    return np.select([MASK, OTHER], [second, third], first).astype(np.uint8)


def void_border() -> NDArray[np.uint8]:
    values = ON.copy()
    values[4:16, 7:31] = 255
    values[5:15, 8:30] = 1
    return values


def labels(count: int, dtype: type) -> NDArray[np.generic]:
    """Cells of 4 by 4 pixels with a label each, in a background of 0."""
    values = np.zeros((64, 96), dtype=dtype)
    for k in range(count):
        y, x = 2 + k // 15 * 6, 2 + k % 15 * 6
        values[y : y + 4, x : x + 4] = k + 1
    return values


VOC = ((0, 0, 0), (128, 0, 0), *[(9, 9, 9)] * 253, (224, 224, 192))
GRADIENT = np.broadcast_to(np.arange(WIDTH) * 6, (HEIGHT, WIDTH)).astype(np.uint8)
TWO_COLOURS = np.where(MASK[..., None], (255, 0, 0), np.where(OTHER[..., None], (0, 255, 0), 0))
# Everything else is refused in these words.
REFUSED = {
    "classes": (Image.fromarray(three(0, 1, 2)), "values 0, 1, 2: a label map?"),
    "pets": (Image.fromarray(three(2, 1, 3)), "values 1, 2, 3; a mask must have the value 0"),
    "trimap": (Image.fromarray(three(0, 255, 128)), "values 0, 128, 255: a label map?"),
    "instances": (Image.fromarray(labels(150, np.uint8)), "151 values from 0 to 150: a label map?"),
    "five instances": (Image.fromarray(labels(5, np.uint8)), "values 0, 1, 2, 3, 4, 5: a label"),
    "16 bit": (Image.fromarray(labels(40, np.uint16)), "41 values from 0 to 40: a label map?"),
    "32 bit": (Image.fromarray(labels(40, np.int32)), "41 values from 0 to 40: a label map?"),
    "bright instances": (
        Image.fromarray((labels(40, np.uint8) > 0) * (labels(40, np.uint8) + 200)),
        "41 values from 0 to 240: a label map?",
    ),
    "void border of many classes": (
        Image.fromarray(np.where(labels(60, np.uint8) == 60, 255, labels(60, np.uint8) % 21)),
        "22 values from 0 to 255: a label map?",
    ),
    "void border": (Image.fromarray(void_border()), "values 0, 1, 255: a label map?"),
    "VOC palette": (palette(void_border(), *VOC), "values 0, 1, 255: a label map?"),
    "grey palette": (
        palette(three(0, 1, 2), (0, 0, 0), (100, 100, 100), (200, 200, 200)),
        "values 0, 100, 200: a label map?",
    ),
    "two classes of 1 and 2": (Image.fromarray(ON + 1), "values 1 and 2; a mask must have the va"),
    "one class": (Image.fromarray(ON * 0 + 7), "value 7 alone; a mask must have the value 0"),
    "colour classes": (Image.fromarray(TWO_COLOURS.astype(np.uint8)), "3 colours: (0, 0, 0), (0, "),
    "two colours": (
        Image.fromarray(np.where(MASK[..., None], (255, 0, 0), (0, 0, 255)).astype(np.uint8)),
        "2 colours: (0, 0, 255), (255, 0, 0); a mask must have two values",
    ),
    "two light colours of a palette": (
        palette(ON, (250, 250, 0), (0, 128, 0)),
        "2 colours: (250, 250, 0), (0, 128, 0); a mask must have two values",
    ),
    "many colours of a palette": (picture(0).quantize(20), "20 values from 0 to 19: a label map?"),
    "dark colour classes": (
        Image.fromarray(np.stack([ON, OTHER.astype(np.uint8), ON * 0], axis=-1)),
        "3 colours: (0, 0, 0), (0, 1, 0), (1, 0, 0); a mask must have two values",
    ),
    "photograph": (picture(0), "960 colours: "),
    "grey photograph": (picture(0).convert("L"), "values from "),
    "gradient": (Image.fromarray(GRADIENT), "40 values from 0 to 234"),
    "cut-out": (
        Image.merge("RGBA", [*picture(0).split(), Image.fromarray(ON * 255)]),
        "colours and an alpha channel that both vary",
    ),
    "probabilities": (
        Image.fromarray(np.where(MASK, 0.9, np.arange(WIDTH) / 100).astype("f4")),
        "values from 0 to 0.9",
    ),
    "not finite": (Image.fromarray(np.where(MASK, np.nan, 0).astype("f4")), "not finite"),
    "negative": (Image.fromarray(-ON.astype(np.int32)), "values -1 and 0; a mask must have"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_masks_are_refused_with_their_values(case: str, tmp_path: Path) -> None:
    image, words = REFUSED[case]
    path = tmp_path / ("mask.tif" if image.mode in ("I", "F") else "mask.png")
    image.save(path)
    with pytest.raises(ValueError, match=r"value|colour") as error:
        read_mask(path)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["tif", "gif", "png", "webp"])
def test_several_pages_and_frames_are_refused(kind: str, tmp_path: Path) -> None:
    pages = [Image.fromarray(ON * 255), Image.fromarray(OTHER.astype(np.uint8) * 255)]
    path = tmp_path / f"pages.{kind}"
    pages[0].save(
        path, save_all=True, append_images=pages[1:], **{"lossless": True} if kind == "webp" else {}
    )
    for read in (read_mask, read_image):
        with pytest.raises(ValueError, match="2 pages or frames; save each as a file of its own"):
            read(path)


def test_pictures_that_are_too_large(tmp_path: Path, monkeypatch) -> None:
    picture(0).save(tmp_path / "large.png")
    monkeypatch.setattr("parts.data.reading.MOST_PIXELS", HEIGHT * WIDTH)
    read_image(tmp_path / "large.png")
    monkeypatch.setattr("parts.data.reading.MOST_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(ValueError, match="40 x 24 pixels, more than 959; cut it into smaller"):
        read_image(tmp_path / "large.png")
    assert Image.MAX_IMAGE_PIXELS is None  # Pillow would warn of half as many


def png_of_16_bits(path: Path, values: NDArray[np.uint16]) -> None:
    """Write what Pillow reads and does not write: 16 bits for each of several channels."""
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with path.open("ab") as file:
        for kind, content in (
            (
                b"IHDR",
                struct.pack(">LL5B", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0),
            ),
            (b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())),
            (b"IEND", b""),
        ):
            checksum = zlib.crc32(kind + content)
            file.write(struct.pack(">L", len(content)) + kind + content)
            file.write(struct.pack(">L", checksum))


def with_tag(path: Path, tag: int, value: int) -> None:
    """Change a number in the header of a TIFF."""
    before = [struct.pack("<HHLL", tag, 3, 1, old) for old in range(10)]
    content = path.read_bytes()
    (old,) = (entry for entry in before if entry in content)
    path.write_bytes(content.replace(old, struct.pack("<HHLL", tag, 3, 1, value)))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_refused(channels: int, tmp_path: Path) -> None:
    values = np.stack([ON.astype(np.uint16) * 300] * channels, axis=-1)
    png_of_16_bits(tmp_path / "deep.png", values)
    for read in (read_mask, read_image):
        with pytest.raises(ValueError, match="colours of 16 bits; save it with 8"):
            read(tmp_path / "deep.png")


@pytest.mark.parametrize("planes", [1, 2])  # pixel by pixel, and channel by channel
def test_tiff_colours_of_16_bits_are_refused(planes: int, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    picture(0).save(path)
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    )
    with_tag(path, 284, planes)
    for read in (read_mask, read_image):
        with pytest.raises(ValueError, match="colours of 16 bits; save it with 8"):
            read(path)


def test_tiff_of_16_bits_with_0_as_white_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "negative.tif"
    Image.fromarray(ON.astype(np.uint16) * 65535).save(path)
    read_image(path)
    with_tag(path, 262, 0)
    for read in (read_mask, read_image):
        with pytest.raises(ValueError, match="values of which 0 is white"):
            read(path)


def test_tiff_of_32_bits_without_a_sign(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    for value, known in ((7, True), (-(2**31), False)):
        Image.fromarray(MASK * np.int32(value)).save(path)
        with_tag(path, 339, 1)
        for read in (read_mask, partial(read_image, reading=Reading(image_range=(0, 7)))):
            if known:
                read(path)
            else:
                with pytest.raises(ValueError, match="values above 2147483647; save it with fewer"):
                    read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_are_turned_upright(orientation: int, dtype: type, tmp_path: Path) -> None:
    stored = Image.fromarray(ON.astype(dtype) * 255)
    stored.save(tmp_path / "m.tif", tiffinfo={274: orientation})
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "m.png", exif=exif)
    found, expected = read_mask(tmp_path / "m.tif"), read_mask(tmp_path / "m.png")
    np.testing.assert_array_equal(found.object, expected.object)
    assert found.turned == expected.turned == orientation


def tiff_with_an_empty_page() -> bytes:
    file = io.BytesIO()
    picture(0).save(file, "TIFF")
    content = file.getvalue()
    (page,) = struct.unpack_from("<L", content, 4)
    (entries,) = struct.unpack_from("<H", content, page)
    after = page + 2 + 12 * entries
    return content[:after] + struct.pack("<L", len(content)) + content[after + 4 :] + bytes(6)


DAMAGED = {
    "TIFF": (tiff_with_an_empty_page(), "Missing dimensions"),
    "DDS": (b"DDS " + struct.pack("<L", 124) + bytes(120), "pixel format"),
    "HTML": (b"<html>", "cannot identify"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_raise_one_kind_of_error(case: str, tmp_path: Path) -> None:
    content, words = DAMAGED[case]
    (tmp_path / "file").write_bytes(content)
    for read in (read_mask, read_image):
        with pytest.raises(OSError, match=words):
            read(tmp_path / "file")


# --- what the user says --------------------------------------------------------------------------


def test_values_of_the_object(tmp_path: Path) -> None:
    Image.fromarray(three(2, 1, 3)).save(tmp_path / "pets.png")
    found = read_mask(tmp_path / "pets.png", Reading([(1, 1)], [(3, 3)]))
    np.testing.assert_array_equal(found.object, MASK)
    np.testing.assert_array_equal(found.known, ~OTHER)
    palette(void_border(), *VOC).save(tmp_path / "voc.png")
    found = read_mask(tmp_path / "voc.png", Reading(ignore=[(255, 255)]))  # two values remain
    np.testing.assert_array_equal(found.object, MASK)
    assert found.known.sum() == MASK.size - (void_border() == 255).sum()
    assert found.kind == "values 0 and 1"
    with pytest.raises(ValueError, match="nothing but values that are ignored"):
        read_mask(tmp_path / "voc.png", Reading(ignore=[(0, 255)]))


def test_options_name_the_indices_of_a_palette(tmp_path: Path) -> None:
    """Also where all of its colours that occur are grey, as VOC's class 7 is."""
    voc = [(0, 0, 0)] * 7 + [(128, 128, 128)] + [(0, 0, 9)] * 7 + [(0, 64, 128)]
    palette(three(0, 7, 15), *voc).save(tmp_path / "three.png")
    palette(ON * 7, *voc).save(tmp_path / "two.png")
    for name, known in (("three.png", ~OTHER), ("two.png", MASK | True)):
        found = read_mask(tmp_path / name, Reading([(7, 7)], [(15, 15)]))
        np.testing.assert_array_equal(found.object, MASK)
        np.testing.assert_array_equal(found.known, known)
    assert read_mask(tmp_path / "two.png", Reading(ignore=[(15, 15)])).kind == "values 0 and 7"
    assert not read_mask(tmp_path / "two.png", Reading(ignore=[(7, 7)])).object.any()


values = st.integers(0, 255)


@given(
    arrays(np.uint8, (9, 7), elements=st.sampled_from([0, 1, 2, 60, 200, 255])),
    st.lists(st.tuples(values, values).map(sorted), min_size=1, max_size=3),
    st.lists(st.tuples(values, values).map(sorted), max_size=2),
)
def test_ranges_of_values(tmp_path_factory, array, foreground, ignore) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.png"
    Image.fromarray(array).save(path)

    def inside(ranges) -> NDArray[np.bool_]:
        return np.isin(array, [v for low, high in ranges for v in range(low, high + 1)])

    assume(not inside(ignore).all())
    found = read_mask(path, Reading(foreground, ignore))
    np.testing.assert_array_equal(found.known, ~inside(ignore))
    np.testing.assert_array_equal(found.object, inside(foreground) & ~inside(ignore))


# --- any mask ------------------------------------------------------------------------------------

masks = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(
    lambda mask: mask.any() and not mask.all()
)


@given(masks, st.integers(1, 255), st.sampled_from(["png", "tif", "bmp"]))
def test_any_mask_of_two_values(tmp_path_factory, mask, value: int, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    Image.fromarray(mask.astype(np.uint8) * value).save(path)
    np.testing.assert_array_equal(read_mask(path).object, mask)


@given(
    arrays(np.uint8, (16, 16), elements=st.sampled_from([0, 1, 2, 3, 60, 128, 200, 255])),
    st.sampled_from([1, 2, 3]),
)
def test_any_map_of_labels_is_refused(tmp_path_factory, array, scale: int) -> None:
    """Blocks of labels, as an edge of a mask is one pixel wide."""
    array = array[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)
    distinct = np.unique(array)
    assume(len(distinct) > 2)
    path = tmp_path_factory.getbasetemp() / "labels.png"
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match="value") as error:
        read_mask(path)
    assert ", ".join(map(str, distinct)) in str(error.value)


def blobs(seed: int) -> NDArray[np.bool_]:
    """Round objects, 96 by 128 pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128]
    mask = np.zeros(y.shape, dtype=bool)
    for _ in range(rng.integers(1, 4)):
        centre = rng.uniform(20, 76), rng.uniform(20, 108)
        mask |= np.hypot(y - centre[0], x - centre[1]) < rng.uniform(8, 18)
    return mask


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("seed", range(4))
def test_jpeg_masks(quality: int, seed: int, tmp_path: Path) -> None:
    mask = blobs(seed)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=quality)
    Image.fromarray(np.stack([mask.astype(np.uint8) * 255] * 3, -1)).save(
        tmp_path / "rgb.jpg", quality=quality
    )
    Image.open(tmp_path / "m.jpg").save(tmp_path / "was.png")  # converted, with what JPEG left
    for name in ("m.jpg", "rgb.jpg", "was.png"):
        found = read_mask(tmp_path / name).object
        assert (found ^ mask).sum() <= 0.01 * mask.sum(), name


def test_a_jpeg_mask_with_straight_edges(tmp_path: Path) -> None:
    """Its blocks are alike, so that what JPEG leaves has areas of its own."""
    mask = np.zeros((128, 344), dtype=bool)
    for rows, quality in ((slice(61, 63), 75), (slice(57, 64), 50), (slice(60, 68), 50)):
        mask[rows] = True
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=quality)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg").object, mask)


def test_dark_labels_are_no_remains_of_jpeg(tmp_path: Path) -> None:
    """Classes of 3 and 6 with a void border of 255."""
    values = np.zeros((96, 128), dtype=np.uint8)
    values[16:80, 16:96] = 255
    values[20:76, 20:56], values[20:76, 56:92] = 3, 6
    Image.fromarray(values).save(tmp_path / "m.jpg", quality=95)
    with pytest.raises(ValueError, match=r"values .*: a label map"):
        read_mask(tmp_path / "m.jpg")


@pytest.mark.parametrize("radius", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_masks_with_a_soft_edge(radius: float, seed: int, tmp_path: Path) -> None:
    mask = blobs(seed)
    sharp = Image.fromarray(mask.astype(np.uint8) * 255)
    sharp.filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "soft.png")
    sharp.resize((200, 150), Image.Resampling.BILINEAR).save(tmp_path / "scaled.png")
    found = read_mask(tmp_path / "soft.png")
    assert (found.object ^ mask).sum() <= 0.03 * mask.sum()
    assert found.kind == "values from 0 to 255 with a soft edge"
    expected = np.asarray(sharp.resize((200, 150), Image.Resampling.NEAREST)) > 0
    assert (read_mask(tmp_path / "scaled.png").object ^ expected).mean() < 0.02


def trimap(seed: int, width: int) -> Image.Image:
    """An object with a border of 128 around it."""
    mask = blobs(seed)
    border = distance_transform_edt(~mask) <= width
    return Image.fromarray(np.where(mask, 255, border * 128).astype(np.uint8))


def two_classes(seed: int) -> Image.Image:
    left = np.arange(128) < np.median(blobs(seed).nonzero()[1])
    return Image.fromarray(np.where(left, 128, 255).astype(np.uint8) * blobs(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_third_class_is_no_soft_edge(seed: int, tmp_path: Path) -> None:
    labelled = {f"border of {width}": trimap(seed, width) for width in (2, 3, 4, 8)}
    for image in (*labelled.values(), two_classes(seed)):
        for quality in (75, 95):
            image.save(tmp_path / f"{quality}.jpg", quality=quality)
            with pytest.raises(ValueError, match=r"\d+ values from 0 to 255: a label map\?"):
                read_mask(tmp_path / f"{quality}.jpg")
    for image in (trimap(seed, 4), two_classes(seed)):
        image.resize((200, 150), Image.Resampling.BILINEAR).save(tmp_path / "scaled.png")
        with pytest.raises(ValueError, match=r"\d+ values from 0 to 255: a label map\?"):
            read_mask(tmp_path / "scaled.png")


# --- images --------------------------------------------------------------------------------------


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(0).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(MASK).convert("L").save(tmp_path / "mask.png", exif=exif)
    upright = np.rot90(np.asarray(picture(0)), 3)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png").rgb, upright)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png").object, np.rot90(MASK, 3))


@given(arrays(np.uint16, (3, 5), elements=st.integers(0, 65535)), st.integers(0, 60000), st.data())
def test_images_of_more_than_8_bits(tmp_path_factory, array, low: int, data) -> None:
    high = data.draw(st.integers(low + 1, 65535))
    path = tmp_path_factory.getbasetemp() / "deep.png"
    Image.fromarray(array).save(path)
    if array.max() < 65535 / 4:
        bits = max(8, int(array.max()).bit_length())
        with pytest.raises(
            ValueError, match=f"fewer bits.* 0 {2**bits - 1}, or --image-range 0 65"
        ):
            read_image(path)
        found = read_image(path, Reading(image_range=(0, 65535)))
    else:
        found = read_image(path)
    assert np.abs(found.rgb - array[..., None] / 257).max() <= 0.5 + 1e-9
    assert found.kind == "range 0 to 65535"
    if array.min() < low or array.max() > high:
        with pytest.raises(ValueError, match=f"outside of the range from {low:g}"):
            read_image(path, Reading(image_range=(low, high)))
        return
    found = read_image(path, Reading(image_range=(low, high)))
    expected = (array.astype(float) - low) / (high - low) * 255
    assert np.abs(found.rgb - expected[..., None]).max() <= 0.5 + 1e-9


def signed_tiff(path: Path) -> None:
    Image.fromarray(np.arange(-50, 50, dtype=np.int32).reshape(10, 10)).save(path)


def test_images_of_unknown_range(tmp_path: Path) -> None:
    signed_tiff(tmp_path / "ct.tif")
    with pytest.raises(ValueError, match="from -50 to 49 of unknown range; give --image-range"):
        read_image(tmp_path / "ct.tif")
    found = read_image(tmp_path / "ct.tif", Reading(image_range=(-50, 49)))
    assert (found.rgb.min(), found.rgb.max()) == (0, 255)
    Image.fromarray(np.array([[0, np.inf]], dtype="f4")).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="not finite"):
        read_image(tmp_path / "f.tif", Reading(image_range=(0, 1)))


def test_images_with_alpha(tmp_path: Path) -> None:
    image = picture(0).convert("RGBA")
    image.save(tmp_path / "whole.png")
    np.testing.assert_array_equal(read_image(tmp_path / "whole.png").rgb, np.asarray(picture(0)))
    image.putalpha(Image.fromarray(ON * 255))
    image.save(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="an alpha channel that varies"):
        read_image(tmp_path / "cut.png")


# Earlier versions of Pillow cannot read the files of this mode that they write.
needs_pillow_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13")
YCBCR = pytest.param("YCbCr", marks=needs_pillow_13)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", YCBCR])
def test_images_of_other_modes(mode: str, tmp_path: Path) -> None:
    image = picture(0).convert(mode)
    image.save(tmp_path / "image.tif")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif").rgb, expected)
