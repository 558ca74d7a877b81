"""A student together with its teacher and the loss between them, for trainers that own the loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from renyi_kd.infosam.distiller import InfoSAMDistiller
from renyi_kd.infosam.features import FeatureCollector

_Self = TypeVar("_Self", bound="DistilledModel")


class DistilledOutput(NamedTuple):
    """What a `DistilledModel` returns: `output, loss = model(...)`."""

    output: Any
    """What the student returned."""
    loss: Tensor | None
    """The loss of distillation, a scalar to add to your own. None in evaluation mode, and under
    `torch.no_grad`."""


class DistilledModel(nn.Module):
    """A student, its frozen teacher, and the loss of distillation between the two.

    It takes what the student takes. In training it runs teacher and student on the same arguments,
    the teacher without gradients. It returns what the student returns, paired with the loss of
    distillation. In evaluation mode, and under `torch.no_grad`, it runs the student alone.

    It can be wrapped and trained like any other module. Its parameters and its state dict are those
    of the student and of the distiller. The teacher is in neither, and stays in evaluation mode. It
    does move with `.to()`, and is copied and pickled with the module.

    Args:
        student: module that trains, with a SAM in it or with modules that are named; see
            `FeatureCollector`. Its `forward` must run image encoder and mask decoder with
            gradients.
        teacher: module that takes the same arguments. It is frozen here. It must not share
            parameters with the student: copy it before LoRA is added.
        distiller: module of the features of teacher and student. Default: `InfoSAMDistiller()`,
            for 256 channels.
        **collected: options of both `FeatureCollector`s: `tokens`, `max_samples`, or the names
            `image_embedding` and `mask_tokens`.

    Raises:
        TypeError: student, teacher or distiller is no module; or student or teacher has no SAM in
            it, and no modules are named.
        ValueError: teacher and student share parameters, one of them is compiled, or an option of
            `FeatureCollector` is unknown.

    Shape:
        - input: any arguments of the student.
        - output: `DistilledOutput`, a pair of what the student returns and the loss.

    Note:
        Wrap or convert the student, for instance by peft, before you give it to this class. Compile
        the whole of it, or wrap it by `DistributedDataParallel` or `fully_shard`, after. On several
        processes, give the distiller a `process_group`, so that it compares the samples of all.

    Example:
        A training step, in which `student` and `teacher` are models of transformers::

            model = DistilledModel(student, teacher)
            optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
            output, distillation = model(pixel_values=images, input_boxes=boxes)
            loss = segmentation_loss(output.pred_masks, masks) + distillation
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        distiller: nn.Module | None = None,
        **collected: Any,
    ) -> None:
        super().__init__()
        parts = {"student": student, "teacher": teacher}
        if distiller is not None:
            parts["distiller"] = distiller
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(part).__name__}.")
            if hasattr(part, "_orig_mod") and name != "distiller":
                raise ValueError(
                    f"`{name}` must not be compiled yet, as compiled code does not see the hooks "
                    f"that collect features. Compile the DistilledModel instead."
                )
        shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
        if shared:
            raise ValueError(
                f"`teacher` and `student` must have parameters of their own, got {len(shared)} "
                f"that both have. Make the teacher by copy.deepcopy(student) before the student "
                f"is changed, by peft for instance."
            )
        self.student = student
        self.distiller = InfoSAMDistiller() if distiller is None else distiller
        # In a tuple, where PyTorch does not look for modules.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._collected = collected
        self._put_collectors_in_place()

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> DistilledOutput:
        """Run the student, and in training the teacher and the distiller."""
        if not (self.training and torch.is_grad_enabled()):
            return DistilledOutput(self.student(*args, **kwargs), None)
        from_teacher, from_student = self._collectors
        with self._collecting():
            with torch.no_grad():
                self.teacher(*args, **kwargs)
            output = self.student(*args, **kwargs)
            loss = self.distiller(from_teacher.pop(), from_student.pop())
        return DistilledOutput(output, loss)

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode of the student and of the distiller. The teacher is in evaluation mode."""
        self.teacher.eval()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "DistilledModel does not run in torch.nn.DataParallel. Start one process a GPU, by "
            "torchrun for instance, for DistributedDataParallel."
        )

    def _put_collectors_in_place(self) -> None:
        models = self.teacher, self.student
        self._collectors = tuple(FeatureCollector(model, **self._collected) for model in models)
        for collector in self._collectors:
            collector.pause()

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        for collector in self._collectors:
            collector.resume()
        try:
            yield
        finally:
            for collector in self._collectors:
                collector.pause()
                collector.clear()  # what an error has left

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a collector would collect from the original.
        return {name: value for name, value in vars(self).items() if name != "_collectors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._put_collectors_in_place()
