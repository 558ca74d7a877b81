"""A trained student as one adapter of PEFT, which loads without anything of these programs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from parts.errors import InputError, first_line
from parts.files import appearing
from parts.models.methods.lora import PartLoRA
from parts.models.segmenter import Segmenter, check_finite

# The methods that are a LoRA. What others add or change has no form of PEFT's.
AS_ADAPTER = ("lora", "lora-heads", "su-sam-lora")


@torch.no_grad()
def save_adapter(
    student: Segmenter, options: argparse.Namespace, card: ModelCard, path: Path
) -> None:
    """Write a trained student as an adapter of PEFT, with its card.

    `PeftModel.from_pretrained` adds it to the official model: LoRA in the image encoder, and the
    whole mask decoder in place of the official one.

    Args:
        student: The student, from `load_run`; it is of no use afterwards.
        options: The options of its run, from `load_run`.
        card: What the README.md of the folder is to say.
        path: The folder.

    Raises:
        InputError: If the path exists, or if a weight is not finite.
        OSError: If the disk is full or cannot be written to. Nothing has the name then.
    """
    model = student.model
    check_finite(model.state_dict(), "the student must have finite weights")
    (decoder,) = (name for name, module in model.named_modules() if module is student.decoder)
    factors = take_lora(model)
    ranks = {name: len(down) for name, (down, _) in factors.items()}
    rank = max(ranks.values())
    others = {name: other for name, other in ranks.items() if other != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=[*factors],
        modules_to_save=[decoder],
    )
    adapted = get_peft_model(model, config)
    # PEFT would write the path of the model's folder.
    config.base_model_name_or_path = card.data.base_model or Path(options.model).name
    for name, (down, up) in factors.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    with appearing(path) as place:
        adapted.save_pretrained(place, save_embedding_layers=False)
        card.save(place / "README.md")


def check_asked(options: argparse.Namespace, names: Iterable[str | None]) -> None:
    """Raise `InputError` if a run cannot become an adapter, or if the Hub allows no such name."""
    if options.method not in AS_ADAPTER:
        raise InputError(
            f"--adapter needs a run of {', '.join(AS_ADAPTER)}, got {options.method}. Leave it out "
            "to write a whole checkpoint."
        )
    try:
        for name in (name for name in names if name is not None):
            validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name} must be a name on the Hub: {first_line(error)}") from error


def take_lora(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove the layers of LoRA from a model; return their factors by the names of layers."""
    factors = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            factors[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            model.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, PartLoRA):
            name = name.removesuffix(".parts")
            factors[name] = layer.factors()
            del model.get_submodule(name).parts
    return factors


def push(folder: Path, name: str) -> str:
    """Upload a folder to the Hub, to a repository that is made if there is none; return its page.

    Raises:
        InputError: If the Hub does not answer, or refuses it.
    """
    try:
        hub = HfApi()
        page = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=page.repo_id, folder_path=folder)
    except Exception as error:  # the Hub and each part of the way to it have types of their own
        raise InputError(
            f"--push-to {name}: {first_line(error)} The folder is whole, and `hf upload {name} "
            f"{folder}` uploads it, too."
        ) from error
    return str(page)
