"""The features that InfoSAM compares (Fig. 2), and hooks that collect them from an unedited SAM."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from renyi_kd._checks import check_choice, check_floating, check_integer

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
        model: the SAM. Copies of it that are made later are not collected from.
        tokens: `"single"` for the single-mask output token, N = 1; `"all"` for every mask token.
        max_samples: how many samples are held at most.

    Raises:
        TypeError: `model` is not, and does not contain, a SAM. While collecting: the image encoder
            returns something in which the image embedding cannot be told.
        ValueError: an unknown `tokens`, or `max_samples` < 1. While collecting: a decoder pass with
            several prompts an image, which also empties the collector.
        RuntimeError: while collecting: more than `max_samples` samples with gradients since the
            last `pop`.

    Note:
        Models may be evaluated in the block. A pass of the student without gradients, or in
        evaluation mode, is forgotten if one with gradients, in training mode, is collected before
        the next `pop`. What the teacher's collector has seen of the same evaluation is forgotten as
        well, when it is popped after the student has run. If that cannot be told, `pop` or the loss
        raises an error. `paused` leaves no doubt, and holds nothing of an evaluation.

        Without gradients, the oldest samples are forgotten when there are more than `max_samples`.

    Note:
        The hooks are in place from construction to `close`, or to the end of the `with` block. They
        change no output and never wait for the device. Copies of the model, by `copy.deepcopy`,
        `pickle` or `torch.save`, have hooks that do nothing.

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

    def __init__(
        self, model: nn.Module, *, tokens: Tokens = "single", max_samples: int = 256
    ) -> None:
        check_choice("tokens", tokens, get_args(Tokens))
        self._max_samples = check_integer("max_samples", max_samples, minimum=1)
        family, encoder, decoder = _recognise(model)
        # The decoder's output tokens are, in this order: object score (in SAM2 alone), IoU, single
        # mask, and the further masks.
        first = 1 + hasattr(decoder, "obj_score_token")
        count = 1 if tokens == "single" else decoder.num_mask_tokens
        self._mask_tokens = slice(first, first + count)
        self._given_to_decoder = family.given_to_decoder
        self._pauses = 0
        self._batch = 0  # the number of samples of the batch that was popped last
        self.clear()

        before, after = _Hook(self, "_before_decoder"), _Hook(self, "_after_transformer")
        self._handles = [decoder.register_forward_pre_hook(before, with_kwargs=True)]
        if not self._given_to_decoder:
            encoded = _Hook(self, "_after_encoder")
            self._handles.append(encoder.register_forward_hook(encoded))
        # peft's `modules_to_save` keeps the frozen decoder beside the trained one, so that there
        # may be two transformers.
        for name, module in decoder.named_modules():
            if name.split(".")[-1] == "transformer":
                self._handles.append(module.register_forward_hook(after))
        _open.add(self)

    def __enter__(self) -> "FeatureCollector":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What has been collected can still be popped."""
        for handle in self._handles:
            handle.remove()
        _open.discard(self)

    def clear(self) -> None:
        """Forget all that was collected since the last `pop`."""
        self._encoded: list[Tensor] = []  # outputs of the encoder
        self._taken = 0  # how many rows of the latest one have been matched
        self._given: Tensor | None = None  # what the decoder that is running was given
        self._passes: list[_Pass] = []
        self._forgotten = 0  # how many samples were too many to hold
        self._evaluated: _Evaluation | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Collect nothing in this block, for instance while the model is evaluated."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Collect nothing until `resume` has been called as often."""
        self._pauses += 1

    def resume(self) -> None:
        """Undo one `pause`."""
        self._pauses -= 1

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
            RuntimeError: image embedding or mask tokens are missing, or more was collected than
                the batch, which an evaluation outside of `paused` may be the cause of. What there
                is stays collected, unless some passes of the decoder had an image embedding and
                others had none.
            TypeError: `image_embedding` is not a floating-point tensor.
            ValueError: a pass without gradients had several prompts an image, or `image_embedding`
                has not one row for each sample. All stays collected.
        """
        passes = self._passes_of_the_batch()
        samples = sum(len(each.tokens) for each in passes)
        matched = [each.embedding for each in passes if each.embedding is not None]
        missing = {}
        if image_embedding is None and not self._encoded and not matched:
            missing["image embedding"] = "run the image encoder or pass image_embedding=... to pop"
        if not passes:
            missing["mask tokens"] = "run the mask decoder"
        if missing:
            raise RuntimeError(
                f"No {' and no '.join(missing)} collected since the last pop: "
                f"{' and '.join(missing.values())}."
            )
        for each in passes:
            if each.problem is not None and image_embedding is None:
                raise ValueError(each.problem)
        if image_embedding is None and len(matched) < len(passes):
            self.clear()
            raise RuntimeError(
                f"{len(passes) - len(matched)} of {len(passes)} passes of the mask decoder had no "
                f"image embedding; the collector is now empty. Run the image encoder before the "
                f"decoder, or pass image_embedding=... to pop."
            )
        if image_embedding is not None:
            check_floating("image_embedding", image_embedding)
            if len(image_embedding) != samples:
                raise ValueError(
                    f"`image_embedding` must have one row for each of the {samples} collected mask "
                    f"tokens, got {tuple(image_embedding.shape)}. A sample is one image with one "
                    f"prompt: repeat the embedding of an image that has several. {EVALUATED}"
                )
            matched = [image_embedding]
        features = Features(_concatenate(matched), _concatenate([p.tokens for p in passes]))
        self.clear()
        self._batch = samples
        return features

    def _passes_of_the_batch(self) -> "list[_Pass]":
        """Return what was collected, without what was collected of an evaluation.

        Raises:
            RuntimeError: it cannot be told what belongs to the batch.
        """
        passes, samples = self._passes, sum(len(each.tokens) for each in self._passes)
        expected = samples if self._evaluated is None else self._evaluated.samples_of_the_batch()
        if samples > expected:
            if self._evaluated is not None and self._evaluated.before_the_batch:
                while samples > expected:
                    samples -= len(passes[0].tokens)
                    passes = passes[1:]
            if samples != expected:
                collected = self._forgotten + sum(len(each.tokens) for each in self._passes)
                raise RuntimeError(
                    f"{collected} samples were collected beside a batch of {expected}, and it "
                    f"cannot be told which of them belong to it. {EVALUATED}"
                )
        elif self._forgotten:
            raise RuntimeError(
                f"{self._forgotten + samples} samples without gradients were collected, of which "
                f"{samples} are held. {EVALUATED} For larger batches, give FeatureCollector a "
                f"larger max_samples."
            )
        return passes

    def _after_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoded.append(_image_embedding(output))
        self._taken = 0
        while len(self._encoded) > 1 and sum(map(len, self._encoded)) > self._max_samples:
            del self._encoded[0]

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._given = kwargs.get("image_embeddings", args[0] if args else None)

    def _after_transformer(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0]  # (B, T, D), but (B, prompts, T, D) in transformers
        if hidden.ndim == 3:
            hidden = hidden.unsqueeze(1)
        samples, prompts = hidden.shape[:2]
        left = self._rows_left()
        embedding = self._match(samples)
        images = samples if embedding is None else len(embedding)
        problem = None
        if left == 0 and embedding is None and hidden.requires_grad:
            problem = (
                "All image embeddings of the encoder's latest pass have been decoded. Decode each "
                "once, or give the decoder the encoder's output itself and not a copy of it."
            )
        elif prompts != 1 or images != samples:
            problem = (
                f"A collected decoder pass must hold one prompt an image, got {samples * prompts} "
                f"prompts for {images} image embeddings. Decode prompt by prompt, or repeat the "
                f"embedding of an image for each of its prompts; evaluate in collector.paused()."
            )
        if problem is not None and hidden.requires_grad:
            self.clear()
            raise ValueError(problem)
        rank = hidden.requires_grad, module.training
        self._hold(_Pass(hidden[:, 0, self._mask_tokens], embedding, rank, problem))

    def _hold(self, latest: "_Pass") -> None:
        """Keep a pass, unless it turns out that it, or what is held, is part of an evaluation."""
        if any(held.rank != latest.rank for held in self._passes):
            trains = latest.rank > self._passes[0].rank
            for other in _open - {self}:
                other._evaluated = _Evaluation(ref(self), before_the_batch=trains)
            if not trains:
                return
            self._passes, self._forgotten = [], 0
        self._passes.append(latest)
        held = sum(len(each.tokens) for each in self._passes)
        if held > self._max_samples and latest.tokens.requires_grad:
            self.clear()
            raise RuntimeError(
                f"More than {self._max_samples} samples with gradients were collected since the "
                f"last pop; the collector is now empty. Call pop() in every step, or give "
                f"FeatureCollector a larger max_samples."
            )
        while held > self._max_samples and len(self._passes) > 1:
            forgotten = len(self._passes.pop(0).tokens)
            held -= forgotten
            self._forgotten += forgotten

    def _rows_left(self) -> int | None:
        """Return how many rows of the encoder's latest output are not matched; None without one."""
        return len(self._encoded[-1]) - self._taken if self._encoded else None

    def _match(self, samples: int) -> Tensor | None:
        """Return the embedding of the decoder pass that is running; None if there is none."""
        given = self._given
        if self._given_to_decoder:
            return given
        latest = self._encoded[-1] if self._encoded else None
        if given is not None and any(_same_storage(given, e) for e in self._encoded):
            if latest is not None and _same_storage(given, latest):
                ahead = int(given.storage_offset()) - int(latest.storage_offset())
                row = ahead // max(1, int(latest.stride(0)))
                self._taken = max(self._taken, row + len(given))
            return given
        if latest is None or self._taken >= len(latest):
            return None
        # If all rows are taken they are not sliced, since the backward pass of a slice is a copy.
        rows = slice(self._taken, self._taken + samples)
        whole = self._taken == 0 and len(latest) <= samples
        self._taken += samples
        return latest if whole else latest[rows]


EVALUATED = (
    "Was a model evaluated inside of the block? Put that into `with collector.paused():`, for both "
    "collectors, or call collector.clear() after it."
)

_open: "WeakSet[FeatureCollector]" = WeakSet()


class _Pass(NamedTuple):
    """What a pass of the decoder gave."""

    tokens: Tensor
    embedding: Tensor | None
    rank: tuple[bool, bool]
    """Whether it has gradients, and whether the model was in training mode."""
    problem: str | None
    """Why it cannot be a pass of training, if it cannot."""


class _Evaluation(NamedTuple):
    """That another model was evaluated, before its batch of training or after it."""

    student: "ref[FeatureCollector]"
    before_the_batch: bool

    def samples_of_the_batch(self) -> int:
        """Return how many samples the other collector holds, or has been popped of."""
        student = self.student()
        if student is None:
            return 0
        return sum(len(each.tokens) for each in student._passes) or student._batch


class _Hook:
    """A hook that holds its collector weakly. Its copies, in copies of the model, do nothing."""

    def __init__(self, collector: FeatureCollector | None = None, method: str = "") -> None:
        self._collector = None if collector is None else ref(collector)
        self._method = method

    def __call__(self, *args: Any) -> None:
        collector = None if self._collector is None else self._collector()
        if collector is not None and not collector._pauses:
            getattr(collector, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


class _Family(NamedTuple):
    """A kind of SAM and the parts by which it is recognised."""

    name: str
    encoder: str
    decoder: str
    decoder_parts: tuple[str, ...] = ("transformer", "num_mask_tokens")
    given_to_decoder: bool = False
    """Whether the image embedding is what the decoder is given, not what the encoder returns."""


_FAMILIES = (
    _Family("segment_anything's Sam", "image_encoder", "mask_decoder"),
    _Family("sam2's SAM2Base", "image_encoder", "sam_mask_decoder"),
    _Family(
        "transformers' Sam2Model",
        "vision_encoder",
        "mask_decoder",
        ("transformer", "num_mask_tokens", "obj_score_token"),
        given_to_decoder=True,
    ),
    _Family("transformers' SamModel", "vision_encoder", "mask_decoder"),
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


def _image_embedding(output: object) -> Tensor:
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
            f"{_described(output)}. Pass image embeddings to `infosam_terms` or to the distiller "
            f"by hand, or wrap the encoder."
        )
    return maps[0]


def _described(output: object) -> str:
    """Return the type of an object, and what is in it, with the shapes of tensors."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        parts = [f"{key}: {_described(value)}" for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [_described(value) for value in output]
    else:
        return type(output).__name__
    return f"{type(output).__name__}({', '.join(parts)})"


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1 and not parts[0].is_inference():
        return parts[0]
    # Autograd refuses inference tensors, even where only the relation module trains. A copy that is
    # made outside of inference mode is a normal tensor.
    with torch.inference_mode(False):
        return torch.cat(parts)
