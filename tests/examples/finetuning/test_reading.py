"""The rule for masks and that for images: what is read, and what is refused in which words."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from parts.data.reading import Reading, read_image, read_mask

HEIGHT, WIDTH = 24, 40
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[5:15, 8:30] = True
ON = MASK.astype(np.uint8)
OTHER = np.zeros_like(MASK)
OTHER[17:22, 30:38] = True


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
    "palette of light colours": (palette(ON, (250, 250, 0), (0, 128, 0)), "values 0 and 1"),
}
TIFF = ("32 bit", "numbers")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_valued_masks(encoding: str, tmp_path: Path) -> None:
    image, kind = ENCODINGS[encoding]
    path = tmp_path / ("mask.tif" if encoding in TIFF else "mask.png")
    image.save(path)
    found = read_mask(path)
    expected = ~MASK if encoding == "white and black palette" else MASK
    if encoding == "white and black palette":  # index 0 is white, so that white is the object
        expected = MASK
    np.testing.assert_array_equal(found.object, expected)
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


@pytest.mark.parametrize("radius", [0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_masks_with_a_soft_edge(radius: float, seed: int, tmp_path: Path) -> None:
    mask = blobs(seed)
    sharp = Image.fromarray(mask.astype(np.uint8) * 255)
    sharp.filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "soft.png")
    sharp.resize((200, 150), Image.Resampling.BILINEAR).save(tmp_path / "scaled.png")
    found = read_mask(tmp_path / "soft.png")
    assert (found.object ^ mask).sum() <= 0.02 * mask.sum()
    assert found.kind == "values from 0 to 255 with a soft edge"
    expected = np.asarray(sharp.resize((200, 150), Image.Resampling.NEAREST)) > 0
    assert (read_mask(tmp_path / "scaled.png").object ^ expected).mean() < 0.02


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
    assert found.largest == array.max()


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


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_images_of_other_modes(mode: str, tmp_path: Path) -> None:
    image = picture(0).convert(mode)
    image.save(tmp_path / "image.tif")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif").rgb, expected)
