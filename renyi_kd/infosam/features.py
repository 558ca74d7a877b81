"""The features that InfoSAM compares (Fig. 2), and hooks that collect them from an unedited SAM."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from renyi_kd._checks import check_choice, check_floating

Tokens: TypeAlias = Literal["single", "all"]


class Features(NamedTuple):
    """What distillation compares, one row a sample; a sample is one image with one prompt.

    Example:
        >>> import torch
        >>> from renyi_kd import Features
        >>> embedding, tokens = Features(torch.zeros(4, 256, 64, 64), torch.zeros(4, 1, 256))
        >>> embedding.shape
        torch.Size([4, 256, 64, 64])
    """

    image_embedding: Tensor
    """z_i, the output of the image encoder, shape `(B, D, H, W)`."""
    mask_tokens: Tensor
    """z_m, the mask tokens as the decoder turns them into masks, shape `(B, N, D)`."""


class FeatureCollector:
    """Collects the `Features` of a SAM while it runs, by hooks on the unedited model.

    The model is, or contains, segment_anything's `Sam`, sam2's `SAM2Base`, or transformers'
    `SamModel` or `Sam2Model`. It is recognised by its parts, so that subclasses serve as well, and
    models wrapped by peft or `DistributedDataParallel`. If it contains several, the first is taken.

    Passes add up until `pop`. They may be over single images or over batches, and the encoder may
    run over a batch and the decoder image by image.

    Each pass of the decoder is matched with an image embedding. If it was given an output of the
    image encoder, or a view of one, that is its embedding. Teacher and student can therefore share
    one image encoder, for instance one whose LoRA adapters are switched off for the teacher.

    Otherwise the pass is matched with the next rows of the encoder's latest output. This is so for
    sam2, which adds a constant to the embedding first, and after a cast or a copy. Then decode all
    that the encoder gave, in order, before it runs again, be it for the teacher or the student.

    Args:
        model: the SAM. Copy it, or wrap it by peft, before you make the collector: copies include
            the hooks.
        tokens: `"single"` for the single-mask output token, N = 1; `"all"` for every mask token.

    Raises:
        TypeError: `model` is not, and does not contain, a SAM.
        ValueError: an unknown `tokens`. While collecting: a decoder pass with several prompts an
            image, which also empties the collector.

    Note:
        The hooks are in place from construction to `close`, or to the end of the `with` block. They
        change no output and never wait for the device. What they collect is held until `pop`, so
        evaluate outside of the block.

        The image encoder may run under activation checkpointing, the mask decoder may not. The
        image embedding of transformers' `Sam2Model` includes the no-memory embedding.

    Example:
        A training loop, in which `segment` runs encoder and decoder of a model::

            with (
                FeatureCollector(teacher) as from_teacher,
                FeatureCollector(student) as from_student,
            ):
                for images, boxes, masks in loader:
                    with torch.no_grad():
                        segment(teacher, images, boxes)
                    loss = segmentation_loss(segment(student, images, boxes), masks)
                    loss = loss + distiller(from_teacher.pop(), from_student.pop())
                    ...

        Anything but a SAM is refused:

        >>> import torch
        >>> from renyi_kd import FeatureCollector
        >>> FeatureCollector(torch.nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: `model` must be or contain a SAM, got Linear. Looked for ...
    """

    def __init__(self, model: nn.Module, *, tokens: Tokens = "single") -> None:
        check_choice("tokens", tokens, get_args(Tokens))
        family, encoder, decoder = _recognise(model)
        # The decoder's output tokens are, in this order: object score (in SAM2 alone), IoU, single
        # mask, and the further masks.
        first = 1 + hasattr(decoder, "obj_score_token")
        count = 1 if tokens == "single" else decoder.num_mask_tokens
        self._mask_tokens = slice(first, first + count)
        self._image_embedding = family.image_embedding
        self._empty()

        self._handles = [decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)]
        if self._image_embedding is not None:
            self._handles.append(encoder.register_forward_hook(self._after_encoder))
        # peft's `modules_to_save` keeps the frozen decoder beside the trained one, so that there
        # may be two transformers.
        for name, module in decoder.named_modules():
            if name.split(".")[-1] == "transformer":
                self._handles.append(module.register_forward_hook(self._after_transformer))

    def __enter__(self) -> "FeatureCollector":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What has been collected can still be popped."""
        for handle in self._handles:
            handle.remove()

    def pop(self, image_embedding: Tensor | None = None) -> Features:
        """Return all that was collected since the last `pop`, as one batch, and forget it.

        Features collected under `torch.no_grad` or `torch.inference_mode` hold no graph, others
        keep theirs.

        Args:
            image_embedding: image embeddings from a cache, shape `(B, D, H, W)`, to be returned in
                place of collected ones. The image encoder need not have run.

        Returns:
            `Features` of shapes `(B, D, H, W)` and `(B, N, D)`, never inference tensors.

        Raises:
            RuntimeError: image embedding or mask tokens are missing. What there is stays collected,
                unless some passes of the decoder had an image embedding and others had none.
            TypeError: `image_embedding` is not a floating-point tensor.
            ValueError: `image_embedding` has not one row for each sample. All stays collected.
        """
        samples, passes = sum(map(len, self._tokens)), len(self._tokens)
        missing = {}
        if image_embedding is None and not self._encoded and not self._embeddings:
            missing["image embedding"] = "run the image encoder or pass image_embedding=... to pop"
        if not self._tokens:
            missing["mask tokens"] = "run the mask decoder"
        if missing:
            raise RuntimeError(
                f"No {' and no '.join(missing)} collected since the last pop: "
                f"{' and '.join(missing.values())}."
            )
        if image_embedding is None and len(self._embeddings) < passes:
            without = passes - len(self._embeddings)
            self._empty()
            raise RuntimeError(
                f"{without} of {passes} passes of the mask decoder had no image embedding; the "
                f"collector is now empty. Run the image encoder before the decoder, or pass "
                f"image_embedding=... to pop."
            )
        embeddings = self._embeddings
        if image_embedding is not None:
            check_floating("image_embedding", image_embedding)
            if len(image_embedding) != samples:
                raise ValueError(
                    f"`image_embedding` must have one row for each of the {samples} collected mask "
                    f"tokens, got {tuple(image_embedding.shape)}. A sample is one image with one "
                    f"prompt: repeat the embedding of an image that has several."
                )
            embeddings = [image_embedding]
        features = Features(_concatenate(embeddings), _concatenate(self._tokens))
        self._empty()
        return features

    def _empty(self) -> None:
        self._encoded: list[Tensor] = []  # every output of the encoder
        self._unmatched: Tensor | None = None  # the rows of the latest one that no pass has had
        self._given: Tensor | None = None  # what the decoder that is running was given
        self._embeddings: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def _after_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._image_embedding is not None
        self._unmatched = self._image_embedding(output)
        self._encoded.append(self._unmatched)

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._given = kwargs.get("image_embeddings", next(iter(args), None))

    def _after_transformer(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0]  # (B, T, D), but (B, prompts, T, D) in transformers
        if hidden.ndim == 3:
            hidden = hidden.unsqueeze(1)
        samples, prompts = hidden.shape[:2]
        embedding = self._match(samples)
        images = samples if embedding is None else len(embedding)
        if prompts != 1 or images != samples:
            self._empty()
            raise ValueError(
                f"A collected decoder pass must hold one prompt an image, got {samples * prompts} "
                f"prompts for {images} image embeddings. Decode prompt by prompt, or repeat the "
                f"embedding of an image for each of its prompts; evaluate outside of the collector."
            )
        self._tokens.append(hidden[:, 0, self._mask_tokens])
        if embedding is not None:
            self._embeddings.append(embedding)

    def _match(self, samples: int) -> Tensor | None:
        """Return the embedding of the decoder pass that is running; None if no encoder ran."""
        given = self._given
        if given is not None and (
            self._image_embedding is None or any(_same_storage(given, e) for e in self._encoded)
        ):
            return given
        if self._unmatched is None:
            return None
        # If all rows are taken they are not sliced, since the backward pass of a slice is a copy.
        whole = len(self._unmatched) <= samples
        embedding = self._unmatched if whole else self._unmatched[:samples]
        self._unmatched = self._unmatched[samples:]
        return embedding


class _Family(NamedTuple):
    """A kind of SAM: the parts by which it is recognised, and where its image embedding is."""

    name: str
    encoder: str
    image_embedding: Callable[[Any], Tensor] | None
    """Takes it from the encoder's output. None: it is what the decoder is given."""
    decoder: str
    decoder_parts: tuple[str, ...] = ("transformer", "num_mask_tokens")


_FAMILIES = (
    _Family("segment_anything's Sam", "image_encoder", lambda output: output, "mask_decoder"),
    _Family("sam2's SAM2Base", "image_encoder", itemgetter("vision_features"), "sam_mask_decoder"),
    _Family(
        "transformers' Sam2Model",
        "vision_encoder",
        None,
        "mask_decoder",
        ("transformer", "num_mask_tokens", "obj_score_token"),
    ),
    _Family("transformers' SamModel", "vision_encoder", itemgetter(0), "mask_decoder"),
)


def _recognise(model: object) -> tuple[_Family, nn.Module, Any]:
    """Return the family of the first SAM in `model`, its image encoder and its mask decoder."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for family in _FAMILIES:
            encoder = getattr(module, family.encoder, None)
            decoder = getattr(module, family.decoder, None)
            if encoder is not None and all(hasattr(decoder, part) for part in family.decoder_parts):
                return family, encoder, decoder
    looked_for = "; ".join(
        f"{family.name} ({family.encoder}, {family.decoder} with {', '.join(family.decoder_parts)})"
        for family in _FAMILIES
    )
    raise TypeError(
        f"`model` must be or contain a SAM, got {type(model).__name__}. Looked for {looked_for}."
    )


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1 and not parts[0].is_inference():
        return parts[0]
    # Autograd refuses inference tensors, even where only the relation module trains. A copy that is
    # made outside of inference mode is a normal tensor.
    with torch.inference_mode(False):
        return torch.cat(parts)
