"""HQ-SAM: one more token of the mask decoder, and a finer mask that it makes of earlier features.

The method is that of Ke et al., Segment Anything in High Quality, NeurIPS 2023. The new parameters
have the names of its release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parts.errors import InputError
from parts.models.segmenter import Segmenter, load_state, read_weights

OPTION = "--hq-checkpoint"
NEW = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


def add_hq(encoder: nn.Module, decoder: nn.Module) -> None:
    """Give the decoder of a SAM the token and the layers of HQ-SAM, which start at random.

    In training mode the decoder's mask is the HQ mask alone, as in the release. In evaluation mode
    it is the sum of the logits of SAM and of HQ. Where three masks are asked for, SAM's is then
    the one with the highest IoU estimate, so that the decoder always returns one.

    Args:
        encoder: The image encoder of a model of segment_anything or of transformers.
        decoder: Its mask decoder.

    Raises:
        InputError: If the encoder is that of a SAM2, or if the decoder is a HQ-SAM's already.
    """
    if hasattr(decoder, "hq_token"):
        raise InputError(
            "--method hq-sam makes a HQ-SAM of a SAM, and --model is one. Take another method."
        )
    block = first_global_block(encoder)
    norm = block.norm1 if hasattr(block, "norm1") else block.layer_norm1
    add_hq_to_decoder(decoder, *norm.normalized_shape)
    # What hooks need, they find through the module that they are called with. In a copy of the
    # model it is therefore that of the copy.
    block.register_forward_hook(keep)
    encoder.register_forward_hook(with_early)


def add_hq_to_decoder(decoder: nn.Module, width: int) -> None:
    """Do what `add_hq` does to the decoder, for an encoder whose blocks have so many channels."""
    like = decoder.mask_tokens.weight
    for name, layer in new_layers(width, like.shape[1]).items():
        setattr(decoder, name, layer.to(like))
    decoder.register_forward_pre_hook(with_token, with_kwargs=True)
    for layer in (decoder.transformer, last_upscaling(decoder)):
        layer.register_forward_hook(keep)
    decoder.register_forward_hook(with_hq_mask, with_kwargs=True)


def new_layers(width: int, dim: int) -> dict[str, nn.Module]:
    """Return what HQ-SAM adds to a decoder of `dim` channels, by the names of its release.

    Args:
        width: Channels of the encoder's blocks.
        dim: Channels of image embedding and tokens.
    """
    try:  # who uses transformers may not have this package, and needs it for this method alone
        from segment_anything.modeling.common import LayerNorm2d
        from segment_anything.modeling.mask_decoder import MLP
    except ImportError as error:
        raise InputError("--method hq-sam needs the package segment_anything") from error

    def upscaling(before: int, between: int, after: int) -> nn.Sequential:
        """Return layers that make a map four times as large, with these numbers of channels."""
        return nn.Sequential(
            nn.ConvTranspose2d(before, between, 2, stride=2),
            LayerNorm2d(between),
            nn.GELU(),
            nn.ConvTranspose2d(between, after, 2, stride=2),
        )

    layers = (
        nn.Embedding(1, dim),
        MLP(dim, dim, dim // 8, 3),
        upscaling(width, dim, dim // 8),
        upscaling(dim, dim // 4, dim // 8),
        nn.Sequential(
            nn.Conv2d(dim // 8, dim // 4, 3, padding=1),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 8, 3, padding=1),
        ),
    )
    return dict(zip(NEW, layers, strict=True))


def first_global_block(encoder: nn.Module) -> nn.Module:
    """Return the first transformer block of a SAM whose attention has no windows."""
    blocks = getattr(encoder, "blocks", None) or getattr(encoder, "layers", None)
    if blocks is None:
        raise InputError(
            "--method hq-sam must have the image encoder of a SAM, got that of a SAM2. Give "
            "--model a SAM, or take another method."
        )
    return next(block for block in blocks if block.window_size == 0)


def last_upscaling(decoder: nn.Module) -> nn.Module:
    """Return the layer whose last output in a pass is the map that tokens are multiplied with."""
    # That of transformers has one activation, which it calls after either convolution.
    return decoder.activation if hasattr(decoder, "activation") else decoder.output_upscaling


def keep(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Keep a layer's output until it is taken; a forward hook."""
    module.kept = output[0] if isinstance(output, tuple) else output


def take(module: nn.Module) -> Tensor:
    """Return what `keep` kept, and keep it no longer."""
    return module.__dict__.pop("kept")


def with_early(encoder: nn.Module, _: object, output: Any) -> None:
    """Attach the features of the first global block to the image embedding; a forward hook."""
    embedding = output if isinstance(output, Tensor) else output[0]
    attach(embedding, take(first_global_block(encoder)))


def attach(embedding: Tensor, early: Tensor) -> None:
    """Attach features (B, h, w, C) to image embeddings (B, D, h, w).

    They live as long as the memory of the embeddings does. An embedding can therefore be decoded
    whenever and as often as one likes, also after the encoder has seen other images.
    """
    place = embedding.storage_offset(), embedding.stride(0)
    embedding.untyped_storage().early = early, *place


def early_features(embedding: Tensor) -> Tensor:
    """Return what was attached to image embeddings, or to those of which these are some."""
    attached = getattr(embedding.untyped_storage(), "early", None)
    if attached is None:
        raise InputError(
            "hq-sam must decode what the student's image encoder returned, which has features of "
            "its first global block attached, got another image embedding or a copy"
        )
    # The official `Sam.forward` encodes several images together and decodes one after another.
    early, offset, stride = attached
    row = (embedding.storage_offset() - offset) // stride
    return early[row : row + len(embedding)]


def with_token(
    decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Put the HQ token before the prompts, which follow the mask tokens; a forward pre-hook."""
    token, prompts = decoder.hf_token.weight, kwargs["sparse_prompt_embeddings"]
    if prompts is None:  # in transformers, where a mask is the only prompt
        prompts = token.new_empty(len(kwargs["image_embeddings"]), 1, 0, token.shape[-1])
    token = token.expand(*prompts.shape[:-2], 1, -1)
    return args, kwargs | {"sparse_prompt_embeddings": torch.cat([token, prompts], dim=-2)}


def with_hq_mask(
    decoder: nn.Module,
    _: object,
    kwargs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Replace the masks of SAM by the HQ mask, or add that to the best of them; a forward hook."""
    masks, iou, *others = output
    tokens, upscaled = take(decoder.transformer), take(last_upscaling(decoder))
    given = kwargs["image_embeddings"]
    embedding = getattr(given, "stands_for", given)
    features = decoder.embedding_encoder(embedding)
    early = early_features(embedding).permute(0, 3, 1, 2)
    features = features + decoder.compress_vit_feat(early)
    # The prompts of an image follow one another.
    features = features.repeat_interleave(len(upscaled) // len(features), dim=0)
    features = features + decoder.embedding_maskfeature(upscaled)

    weights = decoder.hf_mlp(tokens[..., 1 + decoder.num_mask_tokens, :])
    hq = torch.einsum("nc,nchw->nhw", weights.flatten(0, -2), features)
    hq = hq.view(*masks.shape[:-3], 1, *masks.shape[-2:])
    best = iou.argmax(dim=-1, keepdim=True)
    if not decoder.training:
        hq = hq + masks.take_along_dim(best[..., None, None], dim=-3)
    return hq, iou.take_along_dim(best, dim=-1), *others


def load_hq(student: Segmenter, path: Path) -> None:
    """Load what a released HQ-SAM adds into a student that was adapted by this method.

    The student must have been built from the released SAM of that size, whose weights HQ-SAM does
    not change.

    Args:
        student: The student, changed in place.
        path: The file, which holds the weights of a SAM and those that HQ-SAM adds to its decoder.

    Raises:
        InputError: If the file is not that of a HQ-SAM of the student's size.
    """
    prefix = "mask_decoder."
    new = tuple(f"{prefix}{name}." for name in NEW)
    weights = {
        k.removeprefix(prefix): w
        for k, w in read_weights(path, OPTION).items()
        if k.startswith(new)
    }
    added = nn.ModuleDict({name: getattr(student.decoder, name) for name in NEW})
    load_state(added, weights, path, "an HQ-SAM of the student's size", OPTION)
