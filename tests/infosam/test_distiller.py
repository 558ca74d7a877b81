"""Who learns from what, precision, compilation: `InfoSAMDistiller` as a training loop meets it."""

import math
import shutil

import pytest
import torch
from grids import over
from torch import Tensor, nn

from renyi_kd import (
    DotProductRelation,
    InfoSAMDistiller,
    InfoSAMTerms,
    RelationModule,
    infosam_terms,
)

B, D = 4, 16
Pair = tuple[Tensor, Tensor]


def features(seed: int, *, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Pair:
    """Features whose samples differ by `spread` around a common one."""
    common = torch.Generator().manual_seed(99)
    own = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        mean = torch.randn(1, *shape, generator=common, dtype=torch.float64)
        noise = torch.randn(B, *shape, generator=own, dtype=torch.float64)
        return (mean + spread * noise).to(dtype)

    return draw(D, 6, 5), draw(1, D)


def trainable(pair: Pair) -> Pair:
    return pair[0].clone().requires_grad_(), pair[1].clone().requires_grad_()


def make_distiller(**options: object) -> InfoSAMDistiller:
    torch.manual_seed(0)
    return InfoSAMDistiller(D, **options)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


# Who learns from what


def test_teacher_is_detached_and_student_learns() -> None:
    teacher, student = trainable(features(1)), trainable(features(2))
    distiller = make_distiller()
    distiller(teacher, student).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None and x.grad.norm() > 0 for x in student)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in distiller.parameters())


def test_compression_trains_the_relation_alone() -> None:
    student = trainable(features(2))
    distiller = make_distiller()
    distiller.terms(features(1), student).compression.backward()
    assert all(x.grad is None or x.grad.norm() == 0 for x in student)
    assert distiller.relation.key_proj.weight.grad.norm() > 0


def test_distillation_need_not_train_the_relation() -> None:
    teacher, student = features(1), trainable(features(2))
    released, eq_6 = make_distiller(), make_distiller(distillation_trains_relation=False)
    weights = list(eq_6.parameters())
    both, alone = released.terms(teacher, student), eq_6.terms(teacher, student)
    torch.testing.assert_close(alone, both, rtol=0, atol=0)

    distillation = torch.autograd.grad(
        alone.distillation, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    assert all(g.norm() == 0 for g in distillation)
    compression = torch.autograd.grad(
        both.compression, list(released.parameters()), retain_graph=True
    )
    for g, expected in zip(
        torch.autograd.grad(alone.loss, weights, retain_graph=True), compression, strict=True
    ):
        torch.testing.assert_close(g, expected)
    for own, expected in zip(
        torch.autograd.grad(alone.loss, student),
        torch.autograd.grad(both.loss, student),
        strict=True,
    ):
        torch.testing.assert_close(own, expected)


def test_frozen_relation_still_teaches_the_student() -> None:
    student = trainable(features(2))
    distiller = make_distiller()
    distiller.relation.requires_grad_(False)
    distiller(features(1), student).backward()
    assert all(x.grad.norm() > 0 for x in student)


def test_only_the_first_three_terms_carry_gradients() -> None:
    terms = make_distiller().terms(features(1), trainable(features(2)))
    assert [getattr(terms, name).requires_grad for name in InfoSAMTerms._fields] == [True] * 3 + [
        False
    ] * 6
    assert all(term.ndim == 0 for term in terms)


def test_training_the_student_raises_the_distilled_information() -> None:
    teacher, student = features(1, spread=0.3), trainable(features(2, spread=0.3))
    distiller = make_distiller()
    optimizer = torch.optim.Adam(student, lr=0.05)
    before = distiller.terms(teacher, student).distilled_information
    for _ in range(30):
        optimizer.zero_grad()
        distiller(teacher, student).backward()
        optimizer.step()
    assert distiller.terms(teacher, student).distilled_information > before + 0.2


# Options and the relation


def test_loss_is_the_weighted_sum() -> None:
    terms = make_distiller(compression_weight=0.25, distillation_weight=3.0).terms(
        features(1), features(2)
    )
    torch.testing.assert_close(terms.loss, 0.25 * terms.compression + 3.0 * terms.distillation)
    torch.testing.assert_close(terms.distilled_information, -terms.distillation)
    torch.testing.assert_close(
        terms.compressed_information, terms.teacher_feature_entropy + terms.compression
    )


@pytest.mark.parametrize(
    "relation", [DotProductRelation(), RelationModule(D, residual="normalized")]
)
def test_any_module_serves_as_relation(relation: nn.Module) -> None:
    teacher, student = features(1), features(2)
    terms = InfoSAMDistiller(D, relation=relation).terms(teacher, student)
    expected = infosam_terms(relation(*teacher), relation(*student), *teacher)
    torch.testing.assert_close(terms, expected)


def test_student_may_have_other_pixels_and_tokens() -> None:
    student = torch.randn(B, D, 3, 4, requires_grad=True), torch.randn(B, 4, D)
    terms = make_distiller().terms(features(1), student)
    assert terms.relation_cosine.isnan()
    assert terms.loss.isfinite()


def test_student_equal_to_teacher_has_cosine_one() -> None:
    torch.testing.assert_close(
        make_distiller().terms(features(1), features(1)).relation_cosine, torch.tensor(1.0)
    )


def test_one_permutation_of_all_pixels_changes_nothing_but_the_cosine() -> None:
    teacher, (embedding, tokens) = features(1), features(1)
    distiller = make_distiller()
    same = distiller.terms(teacher, (embedding, tokens))
    flipped = distiller.terms(teacher, (embedding.flip(2, 3), tokens))
    torch.testing.assert_close(flipped.loss, same.loss)
    assert flipped.relation_cosine < 0.5


# Precision


@over("alpha", [1, 2], slow=[0.5, 1.01, 3, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_matches_float64(dtype: torch.dtype, alpha: float, autocast: bool) -> None:
    distiller, exact = make_distiller(alpha=alpha), make_distiller(alpha=alpha).double()
    for spread in (1.0, 1e-3):
        teacher, student = (features(s, spread=spread, dtype=dtype) for s in (1, 2))
        expected = exact(*((x.double(), y.double()) for x, y in (teacher, student)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = distiller(teacher, student)
        assert loss.dtype == torch.float32
        assert abs(loss - expected) < 1e-5
        # Near-duplicate samples: the loss is some 1e-6 bits, and still has its digits.
        assert abs(loss - expected) < 0.01 * abs(expected)


@pytest.mark.parametrize("alpha", [1.01, 2, 3])
@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 1e-6), (1e-3, 5e-4)])
def test_float32_gradients_match_float64(alpha: float, spread: float, tolerance: float) -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        distiller = make_distiller(alpha=alpha).to(dtype)
        student = trainable(tuple(x.to(dtype) for x in features(2, spread=spread)))
        loss = distiller(tuple(x.to(dtype) for x in features(1, spread=spread)), student)
        return list(torch.autograd.grad(loss, [*student, *distiller.parameters()]))

    for value, reference in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert relative_error(value.double(), reference) < tolerance


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_scale_of_the_features_does_not_matter(scale: float) -> None:
    distiller = make_distiller(relation=DotProductRelation())
    teacher, student = features(1), features(2)
    scaled = (tuple(scale * x for x in pair) for pair in (teacher, student))
    torch.testing.assert_close(distiller.terms(*scaled), distiller.terms(teacher, student))


# One at a time: reduced matmul precision makes products float64, which autocast leaves alone.
@pytest.mark.parametrize(("autocast", "matmul_precision"), [(True, "highest"), (False, "medium")])
def test_precision_is_kept_where_less_is_allowed(autocast: bool, matmul_precision: str) -> None:
    def gradients() -> list[Tensor]:
        distiller, student = make_distiller(), trainable(features(2))
        loss = distiller(features(1), student)
        return list(torch.autograd.grad(loss, [*student, *distiller.parameters()]))

    expected = gradients()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reduced = gradients()
    finally:
        torch.set_float32_matmul_precision(before)
    # bfloat16 products would be off by some 1e-2.
    for value, reference in zip(reduced, expected, strict=True):
        assert relative_error(value, reference) < 1e-6


def test_float64_stays_float64() -> None:
    teacher, student = features(1, dtype=torch.float64), features(2, dtype=torch.float64)
    terms = make_distiller().double().terms(teacher, student)
    assert {term.dtype for term in terms} == {torch.float64}


@over("alpha", [1, 2], slow=[0.5, 1.01, 3])
@pytest.mark.parametrize("residual", ["raw", "normalized"])
def test_gradcheck(alpha: float, residual: str) -> None:
    torch.manual_seed(0)
    distiller = InfoSAMDistiller(
        3, alpha=alpha, relation=RelationModule(3, residual=residual)
    ).double()
    names, weights = zip(*distiller.named_parameters(), strict=True)
    teacher = torch.randn(3, 3, 2, 2).double(), torch.randn(3, 2, 3).double()
    student = trainable((torch.randn(3, 3, 2, 2).double(), torch.randn(3, 2, 3).double()))

    def loss(embedding: Tensor, tokens: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(distiller, parameters, (teacher, (embedding, tokens)))

    assert torch.autograd.gradcheck(loss, (*student, *weights))


def test_deterministic() -> None:
    distiller, student = make_distiller(), trainable(features(2))
    learners = [*student, *distiller.parameters()]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(distiller(features(1), student), learners) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# Compilation


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler",
)
@over(
    "options", [{}], slow=[{"alpha": 3}, {"alpha": 1.01}, {"distillation_trains_relation": False}]
)
def test_compiles_without_graph_break(options: dict[str, object]) -> None:
    distiller = make_distiller(**options)
    teacher, student = features(1), trainable(features(2))
    compiled = torch.compile(distiller, fullgraph=True)
    loss, expected = compiled(teacher, student), distiller(teacher, student)
    torch.testing.assert_close(loss, expected)
    inputs = [*student, *distiller.parameters()]
    for value, reference in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert relative_error(value, reference) < 1e-5


# The released module


def test_parameters_have_the_released_names_and_count() -> None:
    relation = RelationModule(256)
    names = {name.rsplit(".", 1)[0] for name in relation.state_dict()}
    assert names == {"query_proj", "key_proj", "layer_norm_feat", "layer_norm_mask"}
    assert sum(p.numel() for p in relation.parameters()) == 132_608


@pytest.mark.parametrize(
    "layout", [lambda x: x.movedim(1, 3), lambda x: x.flatten(2).mT], ids=["B H W D", "B P D"]
)
def test_layouts_agree(layout) -> None:
    distiller = make_distiller()
    teacher, student = features(1), features(2)
    other = (layout(teacher[0]), teacher[1].squeeze(1)), (layout(student[0]), student[1])
    torch.testing.assert_close(distiller.terms(*other), distiller.terms(teacher, student))


def test_ambiguous_layout_is_channels_first() -> None:
    relation = make_distiller().relation
    embedding, tokens = torch.randn(B, D, 4, D), torch.randn(B, 1, D)
    torch.testing.assert_close(
        relation(embedding, tokens), relation(embedding.flatten(2).mT, tokens)
    )
