"""The compared systems give what their official code gave: values, and gradients.

The recordings are in the folder that the variable RECORDINGS names, or in tests/data/baselines,
whose README says where they are from and what is in them.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parts.distillers.base import Pass
from parts.distillers.ibd import AttendedMaps
from parts.distillers.logit import divergence, two_classes
from parts.distillers.mobilesam import MobileSAM
from parts.distillers.pkd import PKD
from parts.distillers.pkt import neighbour_divergence
from parts.distillers.reviewkd import ReviewKD, pyramid_distance
from parts.distillers.semckd import SemCKD
from parts.distillers.tinysam import TinySAM, hardness, iou
from parts.distillers.vid import VID

FOLDER = Path(__file__).parents[1] / "data" / "baselines"
NO_MASKS = torch.zeros(1, 1, 1, dtype=torch.bool)


class Recording:
    """The arrays of a file, in float64, and what was compared with them.

    A prefix of names, such as `pyramid_`, stands for a case of its own.
    """

    def __init__(self, name: str, prefix: str = "") -> None:
        folder = Path(os.environ.get("RECORDINGS", FOLDER))
        with np.load(folder / f"{name}.npz") as arrays:
            self.arrays = {
                key.removeprefix(prefix): torch.from_numpy(arrays[key])
                for key in arrays
                if key.startswith(prefix)
            }

    def __getitem__(self, key: str) -> Tensor:
        """Return an array, those of floating point in float64."""
        array = self.arrays[key]
        return array.double() if array.is_floating_point() else array

    def input(self, key: str) -> Tensor:
        """Return an array as a leaf that learns."""
        return self[key].requires_grad_()

    def layers(self, kind: str) -> list[Tensor]:
        """Return the layers `s0`, `s1`, ... or `t0`, `t1`, ..."""
        count = len([key for key in self.arrays if re.fullmatch(rf"{kind}\d+", key)])
        return [self.input(f"{kind}{i}") for i in range(count)]

    def load(self, module: nn.Module, official: Callable[[str], str]) -> None:
        """Load the recorded parameters, all of them, by the official name of each of ours."""
        module.double()
        names = {name: official(name) for name, _ in module.named_parameters()}
        recorded = {key.removeprefix("p_") for key in self.arrays if key.startswith("p_")}
        assert set(names.values()) == recorded
        module.load_state_dict({name: self[f"p_{theirs}"] for name, theirs in names.items()})

    def same(self, found: Tensor, key: str, tolerance: float = 1e-9) -> None:
        """Assert that a tensor is the recorded one, relative to the largest entry of that."""
        expected = self[key]
        assert found.shape == expected.shape, key
        scale = max(expected.abs().max().item(), SMALLEST)
        deviation = (found.double() - expected).abs().max().item() / scale
        record_deviation(deviation)
        assert deviation <= tolerance, f"{key}: {deviation:.1e}"

    def same_gradients(self, loss: Tensor, inputs: dict[str, Tensor]) -> None:
        """Assert that the gradients of a loss are the recorded ones, by the names of those."""
        found = torch.autograd.grad(loss, inputs.values(), materialize_grads=True)
        for gradient, key in zip(found, inputs, strict=True):
            self.same(gradient, key)

    def same_gradients_of(
        self, loss: Tensor, module: nn.Module, official: Callable[[str], str], layers: list[Tensor]
    ) -> None:
        """Do so for the parameters of a module and the student's layers."""
        parameters = {f"gp_{official(name)}": p for name, p in module.named_parameters()}
        self.same_gradients(loss, parameters | {f"g_s{i}": s for i, s in enumerate(layers)})


# Gradients that are zero in exact arithmetic were recorded as the rounding of others.
SMALLEST = 1e-7
WORST: dict[str, float] = {}


def record_deviation(deviation: float) -> None:
    """Note the worst deviation of the running test; `print` shows it under `pytest -s`."""
    name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    WORST[name] = max(WORST.get(name, 0.0), deviation)


@pytest.fixture(scope="module", autouse=True)
def show_deviations():
    """Print the worst deviation of each test after the last one."""
    yield
    for name, deviation in WORST.items():
        print(f"\n{name}: {deviation:.1e}", end="")


def renaming(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Return a function that replaces patterns in a name, one after the other."""

    def rename(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


# Distillers


def test_logit() -> None:
    recording = Recording("logit")
    student = recording.input("mc_s")
    loss = divergence(student, recording["mc_t"], 3.0)
    recording.same(loss, "mc_loss")
    recording.same_gradients(loss, {"mc_g_s": student})
    student, teacher = recording.input("s"), recording["t"]
    loss = divergence(two_classes(student), two_classes(teacher), 3.0)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})
    equal = divergence(two_classes(teacher), two_classes(teacher), 3.0)
    torch.testing.assert_close(equal, recording["loss_equal"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", ["", "resized_"])
def test_pkd(prefix: str) -> None:
    recording = Recording("pkd", prefix)
    student = recording.input("s")
    loss = PKD()(Pass(embedding=recording["t"]), Pass(embedding=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})


@pytest.mark.parametrize("kind", ["flat", "pooled"])
def test_pkt(kind: str) -> None:
    recording = Recording("pkt")
    student, teacher = recording.input("s"), recording["t"]
    rows = [x.flatten(1) if kind == "flat" else x.mean((2, 3)) for x in (student, teacher)]
    loss = neighbour_divergence(*rows)
    recording.same(loss, f"{kind}_loss")
    recording.same_gradients(loss, {f"{kind}_g_s": student})


def test_vid() -> None:
    recording = Recording("vid")
    student, teacher = recording.layers("s"), recording.layers("t")
    module = VID([s.shape[1] for s in student], [t.shape[1] for t in teacher]).double()
    start = recording["log_scale_at_start"].item()
    for pair in module.pairs:
        assert pair.raw_variance.tolist() == pytest.approx([start] * len(pair.raw_variance))
    official = renaming(
        (r"pairs\.(\d+)\.", r"\1."), ("raw_variance", "log_scale"), ("mean", "regressor")
    )
    recording.load(module, official)
    each = zip(module.pairs, student, teacher, strict=True)
    recording.same(torch.stack([pair(s, t) for pair, s, t in each]), "losses")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


def test_ibd() -> None:
    recording = Recording("ibd")
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = AttendedMaps(*channels, width=recording["p_attention.p_s"].shape[1])
    official = renaming(
        ("student_places", "attention.p_s"),
        ("teacher_places", "attention.p_t"),
        (r"keys\.(\d+)", r"attention.linear_trans_s.key_layer.\1"),
        (r"queries\.(\d+)", r"attention.linear_trans_t.query_layer.\1"),
        ("for_each_query", "attention.linear_trans_s.bilinear"),
        (r"\.0\.(weight|bias)", r".linear.\1"),
        (r"\.1\.(weight|bias)", r".bn.\1"),
    )
    recording.load(module, official)
    recording.same(module.attention(student, teacher), "attention")
    losses = module(student, teacher)
    recording.same(losses, "losses")
    recording.same(losses.sum(), "loss")
    recording.same_gradients_of(losses.sum(), module, official, student)


@pytest.mark.parametrize("prefix", ["", "b4_"])
def test_semckd(prefix: str) -> None:
    recording = Recording("semckd", prefix)
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = SemCKD(*channels, batch=len(student[0]))
    official = renaming(
        (r"queries\.(\d+)", r"query_weight\1"),
        (r"keys\.(\d+)", r"key_weight\1"),
        (r"(weight\d+)\.1", r"\1.linear1"),
        (r"(weight\d+)\.3", r"\1.linear2"),
        (r"regressors\.(\d+)\.(\d+)", r"regressor\1\2.regressor"),
    )
    recording.load(module, official)
    recording.same(module.attention(student, teacher), "attention")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


@pytest.mark.parametrize("prefix", ["", "pyramid_"])
def test_reviewkd(prefix: str) -> None:
    recording = Recording("reviewkd", prefix)
    student, teacher = recording.layers("s"), recording.layers("t")
    channels = [[x.shape[1] for x in layers] for layers in (student, teacher)]
    module = ReviewKD(*channels, width=recording["p_abfs.0.conv1.0.weight"].shape[0])
    official = renaming(
        ("fusions", "abfs"), ("enter", "conv1"), ("leave", "conv2"), ("gate", "att_conv.0")
    )
    recording.load(module, official)
    fused = module.fused(student)
    recording.same(torch.stack([f.mean() for f in fused]), "fused_mean")
    recording.same(torch.stack([f.std() for f in fused]), "fused_std")
    pairs = zip(fused, teacher, strict=True)
    recording.same(torch.stack([pyramid_distance(*pair) for pair in pairs]), "losses")
    loss = module(Pass(layers=teacher), Pass(layers=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients_of(loss, module, official, student)


def test_mobilesam() -> None:
    recording = Recording("mobilesam")
    student = recording.input("s")
    loss = MobileSAM()(Pass(embedding=recording["t"]), Pass(embedding=student), NO_MASKS)
    recording.same(loss, "loss")
    recording.same_gradients(loss, {"g_s": student})


def test_tinysam() -> None:
    recording = Recording("tinysam")
    leaves = {f"g_{kind}_s": recording.input(f"{kind}_s") for kind in ("image", "token", "mask")}
    image, token, mask = leaves.values()
    of_student = Pass(embedding=image, tokens=token, logits=mask[:, 0])
    of_teacher = Pass(
        embedding=recording["image_t"],
        tokens=recording["token_t"],
        logits=recording["mask_t"][:, 0],
    )
    masks = recording["mask_true"][:, 0]
    for pass_, who in ((of_student, "s"), (of_teacher, "t")):
        recording.same(iou(pass_.logits > 0, masks), f"iou_{who}")
    recording.same(hardness(of_student.logits, of_teacher.logits, masks), "hardness")
    loss = TinySAM()(of_teacher, of_student, masks)
    recording.same(loss, "loss")
    recording.same_gradients(loss, leaves)
