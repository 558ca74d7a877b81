"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from models import SIZE, segment, tiny_sam

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run() -> None:
    torch.manual_seed(0)
    teacher, student = tiny_sam(256), tiny_sam(256)
    images, boxes = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 50]])
    masks = (segment(teacher, images, boxes) > 0).float()
    before = [p.detach().clone() for p in student.image_encoder.parameters()]
    namespace = {
        "torch": torch,
        "teacher": teacher,
        "student": student,
        "loader": [(images, boxes, masks)],
        "predict": segment,
        "criterion": F.binary_cross_entropy_with_logits,
        "optimizer": torch.optim.Adam(student.parameters()),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(block, namespace)

    assert len(blocks) == 2
    assert namespace["loss"].isfinite()
    after = student.image_encoder.parameters()
    assert any((p != q).any() for p, q in zip(after, before, strict=True))
    assert 0 < namespace["bits"] < 7
