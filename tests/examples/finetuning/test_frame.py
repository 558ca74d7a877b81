"""Pictures, masks and boxes in the square of a model, against the packages' own preprocessing."""

import numpy as np
import pytest
import torch
from finetuning_runs import build
from sam2.utils.transforms import SAM2Transforms
from segment_anything.utils.transforms import ResizeLongestSide
from transformers import Sam2ImageProcessor, SamImageProcessor

from parts.data.frame import Frame

SIZE = 256
EXTENTS = [(100, 150), (330, 210), (256, 256), (37, 400)]


def rgb(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((height // 8 + 1, width // 8 + 1, 1), np.uint8))[:height, :width]


def frame(keep_aspect: bool):
    return Frame(SIZE, keep_aspect)


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_of_sam_is_that_of_its_predictor(extent: tuple[int, int]) -> None:
    model = build("sam").model
    image, own = rgb(*extent), frame(True)
    scaled = ResizeLongestSide(SIZE).apply_image(image)
    expected = model.preprocess(torch.from_numpy(scaled).permute(2, 0, 1).float())
    torch.testing.assert_close(own.image(image), expected, rtol=0, atol=1e-5)

    boxes = torch.tensor([[3.0, 4.0, 20.0, 31.0], [0.0, 0.0, 37.0, 37.0]])
    expected = ResizeLongestSide(SIZE).apply_boxes_torch(boxes, extent)
    torch.testing.assert_close(own.boxes(boxes, *extent), expected)

    logits = torch.randn(1, 1, 64, 64)
    expected = model.postprocess_masks(logits, own.extent(*extent), extent)
    torch.testing.assert_close(own.restore(logits[0, 0], *extent), expected[0, 0])


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_of_sam2_is_that_of_its_predictor(extent: tuple[int, int]) -> None:
    image, own = rgb(*extent), frame(False)
    transforms = SAM2Transforms(SIZE, mask_threshold=0)
    torch.testing.assert_close(own.image(image), transforms(image), rtol=0, atol=1e-5)

    boxes = torch.tensor([[3.0, 4.0, 20.0, 31.0], [0.0, 0.0, 37.0, 37.0]])
    expected = transforms.transform_boxes(boxes, normalize=True, orig_hw=extent)
    torch.testing.assert_close(own.boxes(boxes, *extent), expected.flatten(1))

    logits = torch.randn(1, 1, 64, 64)
    expected = transforms.postprocess_masks(logits, extent)
    torch.testing.assert_close(own.restore(logits[0, 0], *extent), expected[0, 0])


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_is_that_of_transformers(extent: tuple[int, int]) -> None:
    image = rgb(*extent)
    sam = SamImageProcessor(size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE})
    sam2 = Sam2ImageProcessor(size={"height": SIZE, "width": SIZE})
    for processor, keep_aspect in ((sam, True), (sam2, False)):
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        # One level of 8 bits, 1/255 over a deviation of 0.22, is 0.018: they round elsewhere.
        torch.testing.assert_close(frame(keep_aspect).image(image), expected, rtol=0, atol=0.02)


def test_masks_fall_on_their_image() -> None:
    mask = np.zeros((100, 150), dtype=bool)
    mask[20:60, 30:90] = True
    own = frame(True)
    scaled, valid = own.mask(mask), own.valid(100, 150)
    assert scaled.shape == valid.shape == (SIZE, SIZE)
    assert valid.sum() == 171 * 256
    assert not scaled[~valid].any()
    assert abs(scaled.sum() / valid.sum() - mask.mean()) < 0.01
    logits = torch.where(scaled, 8.0, -8.0)
    restored = own.restore(logits, 100, 150) > 0
    agree = (restored & torch.from_numpy(mask)).sum() / (restored | torch.from_numpy(mask)).sum()
    assert agree > 0.95


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_masks_keep_what_is_mostly_covered(keep_aspect: bool) -> None:
    mask = np.random.default_rng(0).random((2 * SIZE, 2 * SIZE)) < 0.5
    covered = mask.reshape(SIZE, 2, SIZE, 2).mean((1, 3))
    scaled = frame(keep_aspect).mask(mask)
    np.testing.assert_array_equal(scaled.numpy(), covered > 0.5)


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_thin_and_tiny_masks_do_not_vanish(keep_aspect: bool) -> None:
    line, dot = np.zeros((2, 4 * SIZE, 4 * SIZE), dtype=bool)
    line[501, 100:900] = dot[500:502, 500:502] = True
    for mask in (line, dot):
        scaled = frame(keep_aspect).mask(mask)
        assert 0 < scaled.sum() <= 202
        assert scaled[125].any()
