"""The features that InfoSAM compares (Fig. 2), and hooks that collect them from unedited models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from renyi_kd._checks import check_choice, check_floating, check_integer
from renyi_kd.infosam.recognition import (
    Named,
    Tokens,
    described,
    image_embedding_of,
    mask_tokens_of,
    modules_named,
    name_and_function,
    recognise,
)


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
    """Collects the `Features` of a model while it runs, by hooks on the unedited model.

    The model is, or contains, a SAM: segment_anything's `Sam` and what has its parts, such as
    HQ-SAM; sam2's `SAM2Base`; sam3's tracker; or transformers' `SamModel`, `SamHQModel`,
    `Sam2Model`, `EdgeTamModel` or `Sam3TrackerModel`. It is recognised by its parts, so that
    subclasses serve as well, and models wrapped by peft or `DistributedDataParallel`. If it
    contains several, the first is taken. Of any other model, name the modules that give image
    embedding and mask tokens.

    Passes add up until `pop`. They may be over single images or over batches, and the encoder may
    run over a batch and the decoder image by image. Where an image has several prompts, each of
    them is a sample with the embedding of its image. The samples of the first image come first.

    Each pass of the decoder is matched with an image embedding. If it was given an output of the
    image encoder, or a view of one, that is its embedding. Teacher and student can therefore share
    one image encoder, for instance one whose LoRA adapters are switched off for the teacher.

    Otherwise the pass is matched with the next rows of the encoder's latest output. This is so for
    sam2, which adds a constant to the embedding first, and after a cast or a copy. Then decode all
    that the encoder gave, in order, before it runs again, be it for the teacher or the student.

    Where modules are named, a pass is a call of `model` itself, and what they give outside of one
    is not collected. A module may run several times in it, as a norm does that all layers of a
    decoder share: the last time counts, which is what the heads of the model read.

    Args:
        model: the model. Copies of it that are made later are not collected from.
        image_embedding: for a model that is not recognised, the name of the module that returns
            the image embedding, of shape `(B, D, H, W)`, `(B, H, W, D)` or `(B, P, D)`. It is a
            name of `model.named_modules()`. Its beginning may be left out if no other name ends in
            the rest, and so may the parts `original_module` and `modules_to_save.<adapter>` of
            peft. If the module returns something else, give a pair of its name and a function that
            makes the embedding of it.
        mask_tokens: in the same way, the module that returns the tokens, `(B, N, D)` or `(B, D)`.
            Give both or neither.
        tokens: for a SAM. `"single"` takes the output token of the single mask, N = 1; of HQ-SAM
            that is its own token. It is the mask that the model gives with
            `multimask_output=False`, so train and use the model so. `"all"` takes every mask token.
        max_samples: how many samples are held at most.

    Raises:
        TypeError: `model` is no SAM and contains none, and no modules are named; or
            `image_embedding` or `mask_tokens` is neither a name nor a pair of a name and a
            function. While collecting: a module returns something in which image embedding or mask
            tokens cannot be told.
        ValueError: only one of `image_embedding` and `mask_tokens` is given, a name fits no module
            or several, `tokens` is unknown, or `max_samples` < 1. While collecting: it cannot be
            told which prompt is of which image, which also empties the collector; or named modules
            return different numbers of rows.
        RuntimeError: while collecting: more than `max_samples` samples with gradients since the
            last `pop`.

    Note:
        Evaluate in `with collector.paused():`, in which nothing is collected. Without it, a pass of
        the student without gradients, or in evaluation mode, is forgotten if one with gradients, in
        training mode, is collected before the next `pop`. What the teacher's collector has seen of
        the same evaluation is forgotten as well, when it is popped after the student has run. If
        it cannot be told what belongs to the evaluation, `pop` or the loss raises an error.

        Without gradients, the oldest samples are forgotten when there are more than `max_samples`.

    Note:
        The hooks are in place from construction to `close`, or to the end of the `with` block. They
        change no output and never wait for the device. Copies of the model, by `copy.deepcopy`,
        `pickle` or `torch.save`, have hooks that do nothing.

        The image encoder may run under activation checkpointing, and so may named modules if it is
        not reentrant. The mask decoder and the whole model may not.

        SAM2 and its successors add a constant, the no-memory embedding, to the embedding of an
        image. It is included for `Sam2Model`, `EdgeTamModel` and `Sam3TrackerModel` of
        transformers, and for sam3's tracker, whose embedding is taken from what the decoder is
        given.

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

        Any other model, by the names of its modules:

        >>> import torch
        >>> from renyi_kd import FeatureCollector
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(2))
        >>> tokens = "1", lambda output: output.mean(2)  # (B, D, P) to (B, D)
        >>> with FeatureCollector(model, image_embedding="0", mask_tokens=tokens) as collector:
        ...     output = model(torch.zeros(2, 3, 16, 16))
        >>> [tuple(feature.shape) for feature in collector.pop()]
        [(2, 8, 4, 4), (2, 8)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_embedding: Named | None = None,
        mask_tokens: Named | None = None,
        tokens: Tokens = "single",
        max_samples: int = 256,
    ) -> None:
        check_choice("tokens", tokens, get_args(Tokens))
        self._max_samples = check_integer("max_samples", max_samples, minimum=1)
        if (image_embedding is None) != (mask_tokens is None):
            raise ValueError(
                "`image_embedding` and `mask_tokens` must be given both or neither, got "
                f"{image_embedding!r} and {mask_tokens!r}. Without them the model must be a SAM."
            )
        self._pauses = 0
        self._batch = 0  # the number of samples of the batch that was popped last
        self._named: dict[str, tuple[str, Callable[[Any], Any]]] = {}
        self.clear()
        if image_embedding is None or mask_tokens is None:
            self._handles = self._hooks_of_sam(model, tokens)
        else:
            halves = {"image_embedding": image_embedding, "mask_tokens": mask_tokens}
            self._named = {half: name_and_function(half, named) for half, named in halves.items()}
            self._handles = self._hooks_of_named(model)
        _open.add(self)

    def _hooks_of_sam(self, model: nn.Module, tokens: Tokens) -> list[RemovableHandle]:
        self._family, encoder, decoder = recognise(model)
        self._mask_tokens = mask_tokens_of(decoder, tokens)
        before, after = _Hook(self, "_before_decoder"), _Hook(self, "_after_transformer")
        handles = [decoder.register_forward_pre_hook(before, with_kwargs=True)]
        if not self._family.given_to_decoder:
            handles.append(encoder.register_forward_hook(_Hook(self, "_after_encoder")))
        # peft's `modules_to_save` keeps the frozen decoder beside the trained one, so that there
        # may be two transformers.
        for name, module in decoder.named_modules():
            if name.split(".")[-1] == "transformer":
                handles.append(module.register_forward_hook(after))
        return handles

    def _hooks_of_named(self, model: nn.Module) -> list[RemovableHandle]:
        found = [
            (module, _Hook(self, f"_after_{half}"))
            for half, (name, _) in self._named.items()
            for module in modules_named(model, half, name)
        ]
        return [
            model.register_forward_pre_hook(_Hook(self, "_before_call")),
            *(module.register_forward_hook(hook) for module, hook in found),
            model.register_forward_hook(_Hook(self, "_after_call")),
        ]

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
        self._outputs: dict[str, Any] | None = None  # of named modules, in a call of the model
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
            ValueError: of a pass without gradients it cannot be told which prompt is of which
                image, or `image_embedding` has not one row for each sample. All stays collected.
        """
        passes = self._passes_of_the_batch()
        samples = sum(len(each.tokens) for each in passes)
        matched = [each for each in passes if each.embedding is not None]
        missing = {}
        if image_embedding is None and not self._encoded and not matched:
            missing["image embedding"] = "run the image encoder or pass image_embedding=... to pop"
        if not passes:
            missing["mask tokens"] = "run the mask decoder"
        if missing and self._named:
            missing = dict.fromkeys(missing, "call the very module that FeatureCollector was given")
        if missing:
            raise RuntimeError(
                f"No {' and no '.join(missing)} collected since the last pop: "
                f"{' and '.join(dict.fromkeys(missing.values()))}."
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
            embeddings = [image_embedding]
        else:
            embeddings = [each.embedding_of_each_sample() for each in matched]
        features = Features(_concatenate(embeddings), _concatenate([p.tokens for p in passes]))
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
        self._keep_encoded(image_embedding_of(output))

    def _keep_encoded(self, embedding: Tensor) -> None:
        self._encoded.append(embedding)
        self._taken = 0
        while len(self._encoded) > 1 and sum(map(len, self._encoded)) > self._max_samples:
            del self._encoded[0]

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._given = kwargs.get("image_embeddings", args[0] if args else None)

    def _after_transformer(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0]  # (samples, T, D), but (images, prompts, T, D) in transformers
        tokens = hidden[..., self._mask_tokens, :].flatten(0, -3)
        images = len(hidden) if hidden.ndim == 4 else self._images(len(hidden))
        left = self._rows_left()
        embedding = self._match(images)
        rows = images if embedding is None else len(embedding)
        problem = None
        if left == 0 and embedding is None and hidden.requires_grad:
            problem = (
                "All image embeddings of the encoder's latest pass have been decoded. Decode each "
                "once, or give the decoder the encoder's output itself and not a copy of it."
            )
        # A decoder repeats a single embedding for all prompts. How it repeats several is not known.
        elif rows != images or images not in (1, len(hidden)):
            problem = (
                f"A collected decoder pass had {len(tokens)} prompts for {rows} image embeddings, "
                f"and it cannot be told which prompt is of which image. Give the decoder the image "
                f"encoder's output itself, or a view of it, and not a copy, or decode image by "
                f"image. Evaluate in collector.paused()."
            )
        if problem is not None and hidden.requires_grad:
            self.clear()
            raise ValueError(problem)
        rank = hidden.requires_grad, module.training
        self._hold(_Pass(tokens, embedding, rank, problem))

    def _before_call(self, module: nn.Module, args: Any) -> None:
        self._outputs = {}

    def _after_image_embedding(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outputs is not None:
            self._outputs["image_embedding"] = output

    def _after_mask_tokens(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outputs is not None:
            self._outputs["mask_tokens"] = output

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        outputs, self._outputs = self._outputs or {}, None
        found = {half: self._read(half, output) for half, output in outputs.items()}
        embedding, tokens = found.get("image_embedding"), found.get("mask_tokens")
        if tokens is None:
            if embedding is not None:
                self._keep_encoded(embedding)
            return
        if embedding is not None and len(embedding) != len(tokens):
            raise ValueError(
                f"`image_embedding` and `mask_tokens` must have as many rows, one a sample, got "
                f"{tuple(embedding.shape)} and {tuple(tokens.shape)}. Repeat the embedding of an "
                f"image that has several prompts, by image_embedding=(name, function)."
            )
        self._hold(_Pass(tokens, embedding, (tokens.requires_grad, module.training), None))

    def _read(self, half: str, output: Any) -> Tensor:
        """Return the image embedding or the mask tokens that a named module has returned."""
        name, function = self._named[half]
        value = function(output)
        words, ranks = SHAPES[half]
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim in ranks):
            raise TypeError(
                f"`{half}` of {name} must be a tensor of floating point of shape {words}, got "
                f"{described(value)}. Give {half}=({name!r}, function) with a function that makes "
                f"it of the module's output."
            )
        return value

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

    def _images(self, prompts: int) -> int:
        """Return how many images the decoder pass is over that is running."""
        given = self._given
        if given is not None and (self._family.takes_batches or self._is_of_the_encoder(given)):
            return len(given)
        return prompts

    def _is_of_the_encoder(self, given: Tensor) -> bool:
        """Return whether what the decoder was given is an output of the encoder, or a view."""
        return any(_same_storage(given, encoded) for encoded in self._encoded)

    def _match(self, images: int) -> Tensor | None:
        """Return the embedding of the decoder pass that is running; None if there is none."""
        given = self._given
        if self._family.given_to_decoder:
            return given
        latest = self._encoded[-1] if self._encoded else None
        if given is not None and self._is_of_the_encoder(given):
            if latest is not None and _same_storage(given, latest):
                ahead = int(given.storage_offset()) - int(latest.storage_offset())
                row = ahead // max(1, int(latest.stride(0)))
                self._taken = max(self._taken, row + len(given))
            return given
        if latest is None or self._taken >= len(latest):
            return None
        # If all rows are taken they are not sliced, since the backward pass of a slice is a copy.
        rows = slice(self._taken, self._taken + images)
        whole = self._taken == 0 and len(latest) <= images
        self._taken += images
        return latest if whole else latest[rows]


EVALUATED = (
    "Was a model evaluated inside of the block? Put that into `with collector.paused():`, for both "
    "collectors, or call collector.clear() after it."
)

SHAPES = {
    "image_embedding": ("(B, D, H, W), (B, H, W, D) or (B, P, D)", (3, 4)),
    "mask_tokens": ("(B, N, D) or (B, D)", (2, 3)),
}

_open: "WeakSet[FeatureCollector]" = WeakSet()


class _Pass(NamedTuple):
    """What a pass of the decoder gave."""

    tokens: Tensor
    embedding: Tensor | None
    """A row for each image, each of which has as many prompts."""
    rank: tuple[bool, bool]
    """Whether it has gradients, and whether the model was in training mode."""
    problem: str | None
    """Why it cannot be a pass of training, if it cannot."""

    def embedding_of_each_sample(self) -> Tensor:
        """Return the embeddings with those of images repeated that have several prompts."""
        assert self.embedding is not None
        if len(self.embedding) == len(self.tokens):
            return self.embedding
        return self.embedding.repeat_interleave(len(self.tokens) // len(self.embedding), 0)


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


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1 and not parts[0].is_inference():
        return parts[0]
    # Autograd refuses inference tensors, even where only the relation module trains. A copy that is
    # made outside of inference mode is a normal tensor.
    with torch.inference_mode(False):
        return torch.cat(parts)
