"""Every row of the table of bad input that concerns the loss."""

import copy
import math

import pytest
import torch
from grids import over
from torch import Tensor

from renyi_kd import DotProductRelation, InfoSAMDistiller, RelationModule, infosam_terms

B, D = 4, 8
over_alphas = over("alpha", [0.5, 1, 2, 3], slow=[1.01, 3.5, math.inf])


def pair(batch: int = B, dim: int = D, tokens: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, dim, 5, 6), torch.randn(batch, tokens, dim)


def meta() -> tuple[Tensor, Tensor]:
    return pair()[0].to("meta"), pair()[1].to("meta")


def swapped(half: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    teacher = pair()
    teacher[half].requires_grad_()
    return teacher, pair()


@pytest.mark.parametrize(
    ("teacher", "student", "error", "message"),
    [
        (pair(1), pair(1), ValueError, "at least 2 samples.*drop_last=True.*all processes"),
        (pair(0), pair(0), ValueError, "at least 2 samples"),
        (pair(4), pair(3), ValueError, "same batch size, got `teacher` 4, `student` 3"),
        (pair(dim=7), pair(), ValueError, r"`teacher image_embedding`.*D = 8, got \(4, 7, 5, 6\)"),
        (pair(), pair(dim=7), ValueError, "`student image_embedding`.*D = 8"),
        ((pair()[0], pair(dim=7)[1]), pair(), ValueError, "`teacher mask_tokens`.*D = 8"),
        ((pair(3)[0], pair()[1]), pair(), ValueError, "One prompt an image"),
        ((pair()[0][0], pair()[1]), pair(), ValueError, r"got \(8, 5, 6\)"),
        ((pair()[0], torch.randn(B, 2, 1, D)), pair(), ValueError, "`teacher mask_tokens`"),
        ((pair()[0].long(), pair()[1]), pair(), TypeError, "floating-point dtype, got torch.int64"),
        ((pair()[0], pair()[1].bool()), pair(), TypeError, "`teacher mask_tokens`.*torch.bool"),
        (("embedding", "tokens"), pair(), TypeError, "must be a torch.Tensor, got str"),
        (pair()[0], pair(), TypeError, "pair .*, got Tensor"),
        (pair(), (*pair(), None), TypeError, "`student` must be Features or a pair"),
        ((pair()[0].to("meta"), pair()[1]), pair(), ValueError, "one device.*meta"),
        (pair(), meta(), ValueError, "one device.*`student` on meta"),
        (*swapped(0), ValueError, r"swapped: call distiller\(teacher, student\)"),
        (*swapped(1), ValueError, r"swapped: call distiller\(teacher, student\)"),
        (
            meta(),
            meta(),
            ValueError,
            "one device.*`image_embedding` on meta, `relation` on (cpu|cuda:0)",
        ),
        ((pair()[0][..., :0], pair()[1]), pair(), ValueError, "`teacher .* must not be empty"),
        ((pair()[0], torch.tensor(3.0)), pair(), ValueError, r"`teacher mask_tokens`.*got \(\)"),
    ],
)
def test_features_that_do_not_fit(teacher, student, error, message) -> None:
    distiller = InfoSAMDistiller(D)
    with pytest.raises(error, match=message):
        distiller(teacher, student)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "`alpha` must be a number > 0, got 0"),
        ({"alpha": -1.0}, ValueError, "`alpha` must be"),
        ({"alpha": math.nan}, ValueError, "`alpha` must be"),
        ({"alpha": "2"}, TypeError, "`alpha` must be a real number, got str"),
        ({"compression_weight": -1}, ValueError, "`compression_weight` must be a number >= 0"),
        ({"distillation_weight": math.nan}, ValueError, "`distillation_weight`"),
        ({"dim": 0}, ValueError, "`dim` must be an integer >= 1, got 0"),
        ({"dim": 8.0}, TypeError, "`dim` must be an integer, got 8.0"),
        ({"dim": True}, TypeError, "`dim` must be an integer, got True"),
        ({"distillation_trains_relation": "no"}, TypeError, "True or False, got 'no'"),
        ({"relation": torch.nn.functional.relu}, TypeError, "`relation` must be a torch.nn.Module"),
    ],
)
def test_options(options, error, message) -> None:
    with pytest.raises(error, match=message):
        InfoSAMDistiller(**options)


def test_unknown_residual() -> None:
    with pytest.raises(ValueError, match="one of 'raw', 'normalized', got 'none'"):
        RelationModule(D, residual="none")


def test_relations_of_one_sample() -> None:
    one = torch.randn(1, 5)
    with pytest.raises(ValueError, match="at least 2 samples"):
        infosam_terms(one, one, one, one)


def spoil(features: tuple[Tensor, Tensor], half: int, value: float) -> tuple[Tensor, Tensor]:
    spoiled = tuple(x.clone() for x in features)
    spoiled[half][1].view(-1)[3] = value
    return spoiled


@over_alphas
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("half", [0, 1])
def test_non_finite_features_give_a_non_finite_loss_and_gradients(alpha, value, who, half) -> None:
    torch.manual_seed(0)
    teacher, student = pair(), pair()
    if who == "teacher":
        teacher = spoil(teacher, half, value)
    else:
        student = spoil(student, half, value)
    student = tuple(x.requires_grad_() for x in student)
    distiller = InfoSAMDistiller(D, alpha=alpha)
    loss = distiller(teacher, student)
    loss.backward()
    assert not loss.isfinite()
    for tensor in (*student, distiller.relation.key_proj.weight):
        assert not tensor.grad.isfinite().all()


@over_alphas
def test_a_gradient_scaler_skips_the_step(alpha) -> None:
    torch.manual_seed(0)
    distiller, student = InfoSAMDistiller(D, alpha=alpha), tuple(x.requires_grad_() for x in pair())
    optimizer = torch.optim.SGD([*student, *distiller.parameters()], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(distiller.state_dict())
    scaler.scale(distiller(spoil(pair(), 0, math.nan), student)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(distiller.state_dict(), before)


def zero(features):
    return tuple(torch.zeros_like(x) for x in features)


def identical(features):
    return tuple(x[:1].expand_as(x).clone() for x in features)


def near_identical(features):
    return tuple(x[:1] + 1e-6 * x for x in features)


@over_alphas
@pytest.mark.parametrize("degenerate", [zero, identical, near_identical])
@pytest.mark.parametrize("relation", [RelationModule(D), DotProductRelation()])
def test_degenerate_features_have_the_right_limit(alpha, degenerate, relation) -> None:
    torch.manual_seed(0)
    student = tuple(x.requires_grad_() for x in degenerate(pair()))
    distiller = InfoSAMDistiller(D, alpha=alpha, relation=copy.deepcopy(relation))
    terms = distiller.terms(degenerate(pair()), student)
    terms.loss.backward()
    # Samples that are all alike carry no information.
    tolerance = 1e-4 if alpha < 1 else 1e-6
    for name, bits in terms._asdict().items():
        if name != "relation_cosine":
            assert abs(bits) < tolerance, name
    gradients = [x.grad for x in (*student, *distiller.parameters())]
    assert all(g.isfinite().all() for g in gradients)
    if degenerate is zero:
        assert all(x.grad.abs().max() < 1e-6 for x in student)


@over_alphas
def test_a_zero_sample_counts_as_orthogonal_to_the_rest(alpha) -> None:
    torch.manual_seed(0)
    embedding, tokens = pair()
    embedding[0], tokens[0] = 0, 0
    embedding.requires_grad_()
    distiller = InfoSAMDistiller(D, alpha=alpha, relation=DotProductRelation()).double()
    terms = distiller.terms(pair(), (embedding, tokens))
    terms.loss.backward()
    assert (embedding.grad[0] == 0).all()
    assert embedding.grad.isfinite().all()

    # The limit: a sample orthogonal to the rest, in a channel and a pixel of its own.
    orthogonal = torch.zeros(B, D + 1, 5, 7), torch.zeros(B, 1, D + 1)
    orthogonal[0][:, :D, :, :6], orthogonal[1][..., :D] = embedding.detach(), tokens
    orthogonal[0][0, D, 0, 6], orthogonal[1][0, 0, D] = 1, 1
    distiller = InfoSAMDistiller(D + 1, alpha=alpha, relation=DotProductRelation())
    limit = distiller.terms(orthogonal, orthogonal).teacher_relation_entropy
    torch.testing.assert_close(terms.student_relation_entropy, limit)


@pytest.mark.parametrize("relation", [RelationModule(D), DotProductRelation()])
@pytest.mark.parametrize("alpha", [1.5, 2, 3])
def test_no_check_reads_a_value(alpha, relation) -> None:
    """Meta tensors have none to read."""
    distiller = InfoSAMDistiller(D, alpha=alpha, relation=relation).to("meta")
    loss = distiller(meta(), tuple(x.requires_grad_() for x in meta()))
    loss.backward()
    assert loss.shape == ()
