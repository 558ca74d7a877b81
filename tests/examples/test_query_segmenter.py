"""The example of a model that is no SAM, in a reduced setting."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import query_segmenter

PROGRAM = Path(query_segmenter.__file__)


@pytest.mark.slow
def test_what_is_printed(capsys) -> None:
    query_segmenter.main(["--pretraining", "2", "--steps", "2", "--samples", "4"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["mean", "IoU", "new", "colours", "old", "colours"]
    assert [row[:20].strip() for row in rows] == ["teacher", "student", "student + InfoSAM"]
    assert all(0 <= float(figure) <= 1 for row in rows for figure in row[20:].split())


def test_what_is_distilled_makes_the_masks() -> None:
    torch.manual_seed(0)
    model = query_segmenter.build().eval()
    images, masks = query_segmenter.scenes(2, seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert set(masks.unique().tolist()) == {0, 1}
    with query_segmenter.collector(model) as collector:
        output = model(pixel_values=images)
    embedding, queries = collector.pop()
    predictor = model.model.transformer_module.decoder.mask_predictor
    found = torch.einsum("bnd,bdhw->bnhw", predictor.mask_embedder(queries), embedding)
    assert_close(found, output.masks_queries_logits)


def test_pictures_keep_their_masks() -> None:
    torch.manual_seed(0)
    model, (images, masks) = query_segmenter.build(), query_segmenter.scenes(4, seed=0)
    seen = []
    model.register_forward_pre_hook(lambda *args: seen.append(args[-1]), with_kwargs=True)
    query_segmenter.train(model, (images, masks), 1, "student")
    (batch,) = seen
    for image, mask in zip(batch["pixel_values"], batch["mask_labels"], strict=True):
        (place,) = (images == image).all((1, 2, 3)).nonzero()
        assert torch.equal(mask, masks[place])


def test_the_teacher_changes_what_a_student_learns() -> None:
    """And nothing else does: both see the same batches."""
    torch.manual_seed(0)
    teacher = query_segmenter.build().requires_grad_(False).eval()
    data = query_segmenter.scenes(4, seed=0)

    def weights(source):
        student = copy.deepcopy(teacher).requires_grad_(True)
        query_segmenter.train(student, data, 2, "student", source)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    plain, again, distilled = weights(None), weights(None), weights(teacher)
    assert torch.equal(plain, again)
    assert not torch.equal(plain, distilled)


@pytest.mark.parametrize("option", ["--pretraining", "--steps", "--samples"])
def test_options_are_checked(option, capsys) -> None:
    with pytest.raises(SystemExit):
        query_segmenter.main([option, "0"])
    assert "must be positive" in capsys.readouterr().err


@pytest.mark.slow
def test_help_of_the_program() -> None:
    said = subprocess.run(
        [sys.executable, PROGRAM, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "--pretraining" in said
