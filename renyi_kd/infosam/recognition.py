"""Which modules of a model give the image embedding and the mask tokens."""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

Tokens: TypeAlias = Literal["single", "all"]
Named: TypeAlias = str | tuple[str, Callable[[Any], Tensor]]

BY_NAMES = (
    "Of any other model, name the modules: FeatureCollector(model, image_embedding=..., "
    "mask_tokens=...), see docs/models.md."
)


class Family(NamedTuple):
    """A kind of SAM and the parts by which it is recognised."""

    name: str
    beside: str
    """The image encoder, or what else of the model stands beside the decoder."""
    decoder: str
    decoder_parts: tuple[str, ...] = ("transformer", "num_mask_tokens")
    given_to_decoder: bool = False
    """Whether the image embedding is what the decoder is given, not what the encoder returns."""
    takes_batches: bool = True
    """Whether the decoder takes several images, so that a single embedding is that of one image.

    That of segment_anything does not. Batches get into it with the dense prompts, beside a single
    embedding of zeros.
    """

    def missing(self, module: nn.Module) -> list[str]:
        """Return which of the parts a module has not."""
        parts = self.beside, self.decoder
        decoder = getattr(module, self.decoder, None)
        return [part for part in parts if getattr(module, part, None) is None] + [
            f"{self.decoder}.{part}" for part in self.decoder_parts if not hasattr(decoder, part)
        ]


WITH_OBJECT_SCORE = ("transformer", "num_mask_tokens", "obj_score_token")
FAMILIES = (
    Family("segment_anything's Sam", "image_encoder", "mask_decoder", takes_batches=False),
    Family("sam2's SAM2Base", "image_encoder", "sam_mask_decoder"),
    # Its backbone may be elsewhere, and is not called as a module.
    Family("sam3's tracker", "sam_prompt_encoder", "sam_mask_decoder", given_to_decoder=True),
    Family(
        "transformers' Sam2Model, EdgeTamModel or Sam3TrackerModel",
        "vision_encoder",
        "mask_decoder",
        WITH_OBJECT_SCORE,
        given_to_decoder=True,
    ),
    Family("transformers' SamModel or SamHQModel", "vision_encoder", "mask_decoder"),
)


def recognise(model: object) -> tuple[Family, Any, Any]:
    """Return the family of the first SAM in `model`, what stands beside its decoder, and that.

    Raises:
        TypeError: there is none.
    """
    modules = [*model.modules()] if isinstance(model, nn.Module) else []
    for module in modules:
        for family in FAMILIES:
            if not family.missing(module):
                return family, getattr(module, family.beside), getattr(module, family.decoder)
    lacks = [(family.missing(m), family, m) for m in modules for family in FAMILIES]
    begun = [x for x in lacks if len(x[0]) < 2 + len(x[1].decoder_parts)]
    if begun:
        missing, family, module = min(begun, key=lambda x: len(x[0]))
        looked_for = f"Nearest is {family.name}, but {type(module).__name__} has no {missing[0]}."
    else:
        looked_for = f"Looked for {'; '.join(family.name for family in FAMILIES)}."
    raise TypeError(
        f"`model` must be or contain a SAM, got {type(model).__name__}. {looked_for} {BY_NAMES}"
    )


def mask_tokens_of(decoder: Any, tokens: Tokens) -> slice:
    """Return where the mask tokens are among the output tokens of a SAM's decoder.

    These are, in this order: object score (not in SAM), IoU, single mask, the further masks, and
    of HQ-SAM its own. The mask of HQ-SAM is made of its own token, or with it.
    """
    first = 1 + hasattr(decoder, "obj_score_token")
    end = first + decoder.num_mask_tokens
    if tokens == "all":
        return slice(first, end)
    usual = 1 + getattr(decoder, "num_multimask_outputs", decoder.num_mask_tokens)
    is_hq = decoder.num_mask_tokens > usual
    return slice(end - 1, end) if is_hq else slice(first, first + 1)


def image_embedding_of(output: object) -> Tensor:
    """Return the image embedding that an encoder's output is, or that it has as its only map.

    Raises:
        TypeError: there is none, or there are several.
    """
    if isinstance(output, Mapping):
        named = output.get("vision_features", None)  # of sam2, which has others beside it
        parts = [*output.values()] if named is None else [named]
    else:
        parts = [*output] if isinstance(output, (tuple, list)) else [output]
    maps = [part for part in parts if isinstance(part, Tensor) and part.ndim == 4]
    if len(maps) != 1:
        raise TypeError(
            f"The image encoder must return the image embedding, of shape (B, D, H, W), or a "
            f"tuple, list or dict in which it is the only tensor of four axes, got "
            f"{described(output)}. {BY_NAMES}"
        )
    return maps[0]


def name_and_function(argument: str, named: object) -> tuple[str, Callable[[Any], Any]]:
    """Return the name of a module and what to make of its output.

    Raises:
        TypeError: `named` is neither a name nor a pair of a name and a function.
    """
    match named:
        case str():
            return named, lambda output: output
        case (str() as name, function) if callable(function):
            return name, function
    raise TypeError(
        f"`{argument}` must be the name of a module, or a pair of its name and a function of its "
        f"output, got {named!r}."
    )


def modules_named(model: object, argument: str, name: str) -> list[nn.Module]:
    """Return the modules of a name, or of the only name that ends with it.

    There are several where peft keeps a trained copy beside the original, of which one runs.

    Args:
        model: the model, which may be wrapped.
        argument: for messages, the argument that is the name.
        name: one of `model.named_modules()`. What peft puts between its parts does not count.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no such name, or it is the end of several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    modules: dict[str, list[nn.Module]] = {}
    for full, module in model.named_modules():
        plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", full)
        modules.setdefault(plain, []).append(module)
    del modules[""]  # the model itself
    ends = [name] if name in modules else [x for x in modules if x.endswith(f".{name}")]
    if len(ends) == 1:
        return modules[ends[0]]
    if ends:
        raise ValueError(
            f"`{argument}` must name one module of {type(model).__name__}, got {name!r}, which is "
            f"the end of {len(ends)} names: {', '.join(ends[:5])}{', ...' * (len(ends) > 5)}."
        )
    length = 1 + name.count(".")
    tails = {".".join(full.split(".")[-length:]): full for full in reversed(modules)}
    nearest = [tails[tail] for tail in get_close_matches(name, tails, n=5, cutoff=0)]
    raise ValueError(
        f"`{argument}` must name a module of {type(model).__name__}, got {name!r}. The nearest "
        f"names are {', '.join(nearest)}. All are in model.named_modules()."
    )


def described(output: object) -> str:
    """Return the type of an object, and what is in it, with the shapes of tensors."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        parts = [f"{key}: {described(value)}" for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [described(value) for value in output]
    else:
        return type(output).__name__
    return f"{type(output).__name__}({', '.join(parts)})"
