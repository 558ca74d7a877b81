"""What a shared student says about itself: its model card, as the Hugging Face Hub reads it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from parts.files import read_json
from parts.models.segmenter import Segmenter
from parts.options import SMALL_TRANSFORMERS
from parts.runs.folder import settings

PACKAGES = {"sam": "segment_anything", "sam2": "sam2", "huggingface": "transformers"}
# What the Hub calls the sizes of SAM and SAM2.
ON_HUB = {"vit_b": "sam-vit-base", "vit_l": "sam-vit-large", "vit_h": "sam-vit-huge"}
SIZES = {"t": "tiny", "s": "small", "b+": "base-plus", "l": "large"}
LOADING = {
    "sam": """from segment_anything import sam_model_registry

model = sam_model_registry[{model!r}](checkpoint={checkpoint!r})""",
    "sam2": """from sam2.build_sam import build_sam2

model = build_sam2({config!r}, {checkpoint!r}, apply_postprocessing=False)""",
    "SamModel": """from transformers import SamModel

model = SamModel.from_pretrained({base!r})""",
    "Sam2Model": """from transformers import Sam2Model

model = Sam2Model.from_pretrained({base!r})
model.mask_decoder.dynamic_multimask_via_stability = False""",
    "small": """
model = ...  # the model {model!r} of renyi_kd's examples/finetuning""",
}
TEXT = """---
{metadata}
---

# {name}

{base}, fine-tuned on the data set {data} by the programs of renyi_kd, for {package}. This is an
adapter of PEFT: LoRA in the image encoder, and the whole mask decoder.

```python
from peft import PeftModel
{loading}
model = PeftModel.from_pretrained(model, {place!r}).merge_and_unload()
```

What was trained is the single mask: call every predictor with `multimask_output=False`.

{scores}
| setting | |
|---|---|
{settings}
"""
SCORES = """| epoch {epoch} | IoU | Dice |
|---|---|---|
| validation | {validation[iou]:.4f} | {validation[dice]:.4f} |
| test, {table} | {test[iou]:.4f} | {test[dice]:.4f} |
"""
CITATION = """
The loss that distils is InfoSAM's:

```bibtex
@inproceedings{zhang2025infosam,
  title     = {{InfoSAM}: Fine-Tuning the Segment Anything Model from An Information-Theoretic Perspective},
  author    = {Zhang, Yuanhong and Yuan, Muyao and Zhang, Weizhan and Gong, Tieliang and Wen, Wen and Ying, Jiangyong and Shi, Weijie},
  booktitle = {International Conference on Machine Learning},
  year      = {2025}
}
```
"""  # noqa: E501 (as it is in the README of the library)


def model_card(
    student: Segmenter,
    options: argparse.Namespace,
    scores: dict[str, Any] | None,
    place: str,
    base: str | None = None,
) -> ModelCard:
    """Return the card of a student, which says nothing of this machine but names of its folders.

    Args:
        student: The student, from `load_run`.
        options: The options of its run, from `load_run`.
        scores: What `result.json` of the run has, if it is about this student.
        place: What the adapter will be loaded by, a name on the Hub or a folder.
        base: What the Hub calls the model before training, if its name does not say it.
    """
    base = base or on_hub(options)
    data, name = (options.data or options.images).name, place.rsplit("/", 1)[-1]
    with_loss = options.distiller == "infosam"
    results = [
        EvalResult(
            "mask-generation", data, data, metric, scores[split][metric], dataset_split=split
        )
        for split in ("validation", "test")
        for metric in ("iou", "dice")
        if scores is not None
    ]
    metadata = ModelCardData(
        base_model=base,
        eval_results=results or None,
        library_name="peft",
        model_name=name,
        pipeline_tag="mask-generation",
        tags=["segment-anything", "lora", *(["infosam"] if with_loss else [])],
    )
    asked = {
        key: value
        for key, value in sorted(settings(options).items())
        if not (value is None or value is False or value == [])
    }
    told = (
        ""
        if scores is None
        else SCORES.format(epoch=scores["validation"]["epoch"], table=options.test_table, **scores)
    )
    known = base or Path(options.model).name
    text = TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        base=known,
        data=data,
        package=PACKAGES[options.package],
        loading=loading(student, options, known),
        place=place,
        scores=told,
        settings="\n".join(f"| {key} | {value} |" for key, value in asked.items()),
    )
    return ModelCard(text + CITATION * with_loss)


def on_hub(options: argparse.Namespace) -> str | None:
    """Return what the Hub calls the model that a run started from, if its name says it."""
    if options.package == "sam2" and options.model != "tiny":
        version, hiera, size = options.model.split("_")
        return f"facebook/{version}-{hiera}-{SIZES[size]}"
    return f"facebook/{ON_HUB[options.model]}" if options.model in ON_HUB else None


def loading(student: Segmenter, options: argparse.Namespace, base: str) -> str:
    """Return the lines that build the model before training, with the names of its files."""
    kind = type(student.model).__name__ if options.package == "huggingface" else options.package
    if options.model in ("tiny", "small", *SMALL_TRANSFORMERS):
        kind = "small"
    return LOADING[kind].format(
        model=options.model,
        checkpoint=None if options.checkpoint is None else options.checkpoint.name,
        config=f"configs/{options.model.split('_')[0]}/{options.model}.yaml",
        base=base,
    )


def read_scores(run: Path, epoch: int) -> dict[str, Any] | None:
    """Return what result.json of a run says, if it is about the student after this epoch."""
    path = run / "result.json"
    scores = read_json(path) if path.exists() else None
    return scores if scores is not None and scores["validation"]["epoch"] == epoch else None
