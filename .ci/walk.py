"""Runs the Python blocks under one heading of the README, with the installed library alone."""

import re
import sys
from pathlib import Path

import renyi_kd

LOOP = "In your training loop"


def given_by_readme() -> dict[str, object]:
    """Return what the training loop takes as given: a SAM of 256 channels, data and functions."""
    import torch
    from transformers import SamConfig, SamModel

    image = {"image_size": 64, "patch_size": 16}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SamConfig(
        vision_config={**image, **small, "window_size": 3, "global_attn_indexes": [1]},
        prompt_encoder_config=image,
    )
    boxes = torch.tensor([[[1.0, 2, 30, 40]], [[5.0, 5, 20, 50]]])
    masks = torch.zeros(2, 1, 16, 16)
    return {
        "sam": SamModel(config),
        "device": "cpu",
        "loader": [(torch.randn(2, 3, 64, 64), boxes, masks)],
        "criterion": torch.nn.functional.binary_cross_entropy_with_logits,
        "predict": lambda sam, images, boxes: sam(
            pixel_values=images, input_boxes=boxes, multimask_output=False
        ).pred_masks[:, 0],
    }


if __name__ == "__main__":
    page, heading = sys.argv[1:]
    installed = Path(renyi_kd.__file__)
    assert "site-packages" in installed.parts, f"{installed} is not the wheel's"
    section = Path(page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert blocks, f"no Python under {heading}"
    namespace = given_by_readme() if heading == LOOP else {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    result = namespace["loss" if heading == LOOP else "information"]
    assert result.isfinite(), result
    print(f"{heading}: {result.item():.3f}")
