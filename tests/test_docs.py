"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from models import SIZE, segment, tiny_sam

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(monkeypatch) -> None:
    # What torchrun sets.
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    sam, untouched = tiny_sam(256), tiny_sam(256)
    images, boxes = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 50]])
    masks = (segment(sam, images, boxes) > 0).float()
    namespace = {
        "torch": torch,
        "device": "cpu",
        "sam": sam,
        "loader": [(images, boxes, masks)],
        "predict": segment,
        "criterion": F.binary_cross_entropy_with_logits,
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    of_training = {}
    for block in blocks:
        exec(block, namespace)
        if "init_process_group" in block:
            assert namespace["distiller"].process_group is torch.distributed.group.WORLD
            torch.distributed.destroy_process_group()
        elif "optimizer" in block:
            of_training = dict(namespace)
    assert len(blocks) == 5
    assert namespace["loss"].isfinite()
    student, distiller = of_training["student"], of_training["distiller"]
    adapters = [p for name, p in student.named_parameters() if "lora_B" in name]
    assert adapters
    assert all((p != 0).any() for p in adapters)  # they start at zero
    assert distiller.relation.query_proj.weight in of_training["optimizer"].state
    torch.testing.assert_close(namespace["teacher"].state_dict(), untouched.state_dict())
    assert namespace["figures"]["relation_cosine"] < 1
    assert 0 < namespace["bits"] < 7
    assert namespace["error"] < 0.1
