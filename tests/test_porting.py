"""The calls of docs/porting.md give what the formulas of other programs give.

The page itself is executed: each block in a namespace of its own, and of each table the rows whose
first two cells are code. The formulas are written anew here, in float64 and without the library.
"""

import math
import re
from collections.abc import Callable
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_docs import ROOT
from torch import Tensor

import renyi_kd

PAGE = (ROOT / "docs" / "porting.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
ORDERS = [0.5, 1, 1.01, 2, 3]
N = 9


def functions_of_page() -> SimpleNamespace:
    """What the blocks define, each executed without the names of the others."""
    found: dict[str, Any] = {}
    for block in BLOCKS:
        namespace: dict[str, Any] = {"__name__": "page"}
        exec(compile(block, "porting.md", "exec"), namespace)
        own = {k: v for k, v in namespace.items() if getattr(v, "__module__", None) == "page"}
        assert own, "a block that defines no function is not tested here"
        found |= own
    return SimpleNamespace(**found)


page = functions_of_page()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def squares(x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(dim=-1)


def gaussian(x: Tensor, divisor: float | Tensor) -> Tensor:
    return torch.exp(-squares(x) / divisor)


def trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def power_sum(gram: Tensor, alpha: float) -> Tensor:
    """The trace of the power, of a matrix whose own trace is taken as it is."""
    return torch.linalg.eigvalsh(gram).clamp(min=1e-18).pow(alpha).sum(dim=-1)


def nats(gram: Tensor, alpha: float) -> Tensor:
    unit = gram / trace(gram)[..., None, None]
    if alpha == 1:
        p = torch.linalg.eigvalsh(unit).clamp(min=1e-18)
        return -(p * p.log()).sum(dim=-1)
    return power_sum(unit, alpha).log() / (1 - alpha)


def bits(gram: Tensor, alpha: float) -> Tensor:
    return nats(gram, alpha) / math.log(2)


def information(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """In bits, of matrices with a diagonal of ones."""
    return bits(x, alpha) + bits(y, alpha) - bits(x * y, alpha)


def cosines(x: Tensor) -> Tensor:
    unit = F.normalize(x.flatten(1), dim=1)
    return unit @ unit.mT


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Compare the values, and the gradients in the leaves."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, check_dtype=True)
    weight = torch.randn_like(ours)
    for leaf in leaves:
        (of_ours,) = torch.autograd.grad(ours, leaf, weight, retain_graph=True)
        (of_theirs,) = torch.autograd.grad(theirs, leaf, weight, retain_graph=True)
        assert of_theirs.abs().max() > 1e-6, "a gradient of zero would show nothing"
        torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=1e-10)


def formulas() -> dict[str, Any]:
    """The names of the first cells: samples, their matrices, and formulas of other programs."""
    x, y = randn(N, 3).detach(), randn(N, 3).detach()
    z = randn(N, N + 1).detach()
    kx, ky, sigma = gaussian(x, 2.0), gaussian(y, 3.0), 1.7
    return {
        "x": x,
        "y": y,
        "d": squares(x).sqrt(),
        "d1": (x.unsqueeze(1) - x).abs().sum(dim=-1),
        "p": x.shape[1],
        "n": N,
        "sigma": sigma,
        "gamma": 0.3,
        "exp": torch.exp,
        "sqrt": math.sqrt,
        "trace": torch.trace,
        "std": torch.std,
        "Kx": kx,
        "Ky": ky,
        "Kz": z @ z.mT,
        "H": torch.eye(N, dtype=torch.float64) - 1 / N,
        "matrixAlphaEntropy": nats,
        "matrixAlphaJointEntropy": lambda grams, a: nats(grams[0] * grams[1], a),
        "matrixAlphaConditionalEntropy": lambda k, given, a: nats(k * given, a) - nats(given, a),
        "matrixAlphaMutualInformation": lambda k, q, a: math.log(2) * information(k, q, a),
        "generalizedInformationPotential": lambda k, a: power_sum(k / N, a),
        "vonNeumannEntropy": lambda k: nats(k, 1),
        "repMutualInformation": products_of_features,
        "gaussianKernel": lambda x, _, sigma: gaussian(x, 2 * sigma**2),
        "factorizedLaplacianKernel": lambda x, _, sigma: torch.exp(
            -(x.unsqueeze(1) - x).abs().sum(dim=-1) / (math.sqrt(2) * sigma)
        ),
        "normalizeGramMatrix": lambda k: k / torch.outer(k.diag(), k.diag()).sqrt(),
    }


def products_of_features(x: Tensor, y: Tensor) -> Tensor:
    """By covariances: those of all products of a feature of x and one of y for the joint."""
    joint = torch.einsum("ni,nj->nij", x, y).flatten(1)
    of_x, of_y, of_both = (nats(z.mT @ z, 1) for z in (x, y, joint))
    return of_x + of_y - of_both


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[row[0] for row in ROWS])
def test_row(theirs: str, ours: str, alpha: float) -> None:
    names = formulas() | {"alpha": alpha}
    kx, ky = names["Kx"], names["Ky"]
    entropies = {
        "Sx": bits(kx, alpha),
        "Sy": bits(ky, alpha),
        "Sxy": bits(kx * ky, alpha),
        "I": information(kx, ky, alpha),
    }
    expected = eval(theirs, names | entropies)
    library = {name: getattr(renyi_kd, name) for name in renyi_kd.__all__}
    given = {name: names[name] for name in ("x", "y", "Kx", "Ky", "Kz", "sigma", "gamma", "alpha")}
    answer = eval(ours, library | given | {"math": math, "torch": torch})
    assert_same(answer.squeeze(), expected)


def test_every_table_of_calls_is_read() -> None:
    assert len(ROWS) == 21


def test_labels_and_bandwidths_of_a_batch() -> None:
    x, labels = randn(4, N, 3), torch.randint(3, (4, N))
    bandwidth = torch.linspace(1, 2, 4, dtype=torch.float64).reshape(4, 1, 1).requires_grad_()
    one_hot = F.one_hot(labels).double()
    theirs = information(gaussian(x, 2 * bandwidth**2), one_hot @ one_hot.mT, 1.01) * math.log(2)
    assert_same(page.information_of_labels(x, labels, bandwidth), theirs, x, bandwidth)


def test_labels_of_a_singular_kernel_below_order_one() -> None:
    """Eigenvalues far below those that float32 could tell from zero count."""
    x = torch.linspace(0, 6, 8, dtype=torch.float64).unsqueeze(1)
    gram, labels = gaussian(x, 2 * 8.0**2), (torch.arange(8) < 4).double().unsqueeze(1)
    one_hot = torch.cat([labels, 1 - labels], dim=1)
    theirs = math.log(2) * information(gram, one_hot @ one_hot.mT, 0.5)
    ours = page.divergence_of_samples(x[:4], x[4:], 8.0, 0.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", ORDERS)
class TestRepitl:
    def test_divergence_of_samples(self, alpha: float) -> None:
        """H(K) + H(sizes) - H(K and labels), where K and labels have blocks on the diagonal."""
        x, y = randn(5, 3), randn(7, 3)
        gram = gaussian(torch.cat([x, y]), 2 * 1.5**2)
        blocks = torch.block_diag(gram[:5, :5], gram[5:, 5:])
        sizes = torch.tensor([5.0, 7.0], dtype=torch.float64).diag()
        theirs = nats(gram, alpha) + nats(sizes, alpha) - nats(blocks, alpha)
        assert_same(page.divergence_of_samples(x, y, 1.5, alpha), theirs, x, y)

    @pytest.mark.parametrize("sizes", [(8, 5), (6, 6)])
    def test_divergence_of_features(self, alpha: float, sizes: tuple[int, int]) -> None:
        n, m = sizes
        x, y = (F.normalize(randn(size, 3), dim=1).detach() for size in sizes)
        x.requires_grad_()
        of_x, of_y = x.mT @ x / n, y.mT @ y / m
        share = n / (n + m)
        mixture = nats(share * of_x + (1 - share) * of_y, alpha)
        theirs = mixture - share * nats(of_x, alpha) - (1 - share) * nats(of_y, alpha)
        assert_same(page.divergence_of_features(x, y, alpha), theirs, x)
        if n == m and alpha <= 1:
            short = renyi_kd.jensen_renyi_divergence(x.mT @ x, y.mT @ y, alpha=alpha)
            assert_same(math.log(2) * short, theirs)

    def test_difference_of_entropies(self, alpha: float) -> None:
        x, y = randn(N, 3), randn(N, 3)
        gram_x, gram_y = gaussian(x, 2.0), gaussian(y, 3.0)
        permutations = torch.stack([torch.randperm(N) for _ in range(4)])
        matrices = torch.eye(N, dtype=torch.float64)[permutations]
        shuffled = [nats(gram_x * (p @ gram_y @ p.mT), alpha) for p in matrices]
        theirs = torch.stack(shuffled).mean() - nats(gram_x * gram_y, alpha)
        ours = page.difference_of_entropies(gram_x, gram_y, alpha, permutations)
        assert_same(ours, theirs, x, y)


# Below order one, the least eigenvalues of so few dimensions have no ten digits.
@pytest.mark.parametrize("alpha", [order for order in ORDERS if order >= 1])
@pytest.mark.parametrize("variables", [2, 4])
def test_matrix_based_dependence(variables: int, alpha: float) -> None:
    x = randn(N, variables)
    grams = [gaussian(x[:, i : i + 1], 2 * 0.8**2) for i in range(variables)]
    one_by_one = torch.stack([nats(gram, alpha) for gram in grams])
    joint = nats(torch.stack(grams).prod(dim=0), alpha)
    rests = [nats(torch.stack(r).prod(dim=0), alpha) for r in combinations(grams, variables - 1)]
    total = (one_by_one.sum() - joint) / (one_by_one.sum() - one_by_one.max())
    dual = (torch.stack(rests).sum() - (variables - 1) * joint) / joint
    for ours, theirs in zip(page.shares_of_dependence(x, 0.8, alpha), (total, dual), strict=True):
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("n", [7, 15])  # fewer and more than the ten samples of the width
@pytest.mark.parametrize(
    ("name", "divisor"),
    [("information_of_subgraphs", lambda s: s**2), ("information_of_images", lambda s: s)],
)
def test_brain_ib_and_dib(name: str, divisor: Callable[[Tensor], Tensor], n: int) -> None:
    x, y = randn(n, 2, 3), randn(n, 4)
    if name == "information_of_subgraphs":
        x = randn(n, 6)

    def gram(z: Tensor) -> Tensor:
        z = z.flatten(1)
        return gaussian(z, divisor(squares(z).sqrt()[:, :10].mean().detach()))

    assert_same(getattr(page, name)(x, y), information(gram(x), gram(y), 1.01), x, y)


def test_itrd() -> None:
    student, teacher = randn(N, 4), randn(N, 5)
    of_student, of_both = cosines(student), cosines(student) * cosines(teacher)
    theirs = (of_student / N).square().sum() - (of_both / N).square().sum()
    assert_same(page.mutual_loss(student, teacher), theirs, student, teacher)


class TestMvHoIB:
    def test_entropy(self) -> None:
        z = randn(N, 2, 3)
        assert_same(page.embedding_entropy(z), bits(gaussian(z.flatten(1), 5.0), 1.01), z)

    def test_their_gradient_and_what_the_value_lacks(self) -> None:
        z = randn(N, 4)
        gram = gaussian(z, 5.0) / N + 1e-3 * torch.eye(N, dtype=torch.float64)
        theirs = power_sum(gram, 1.01).log2() / (1 - 1.01)
        constant = 1.01 / (1 - 1.01) * math.log2(1 + N / 1000)
        assert_same(page.entropy_with_their_gradient(z) + constant, theirs, z)

    def test_mutual_information_by_concatenation(self) -> None:
        x, y = randn(N, 3), randn(N, 4)
        joint = bits(gaussian(torch.cat([x, y], dim=1), 5.0), 1.01)
        theirs = bits(gaussian(x, 5.0), 1.01) + bits(gaussian(y, 5.0), 1.01) - joint
        grams = page.embedding_gram(x), page.embedding_gram(y)
        assert_same(renyi_kd.renyi_mutual_information(*grams, alpha=1.01), theirs, x, y)

    def test_o_information(self) -> None:
        """(k - 2) S(all) + the sum over i of S(i) - S(all but i)."""
        x = randn(3, N, 1)
        grams = list(gaussian(x, 0.8))
        theirs = bits(grams[0] * grams[1] * grams[2], 1.01) + sum(bits(g, 1.01) for g in grams)
        theirs = theirs - sum(bits(g * h, 1.01) for g, h in combinations(grams, 2))
        grams = [page.embedding_gram(variable, sigma=0.8) for variable in x]
        assert_same(page.o_information(*grams), theirs, x)


class TestInfoSAM:
    WIDTH, PIXELS, BATCH = 6, 10, 4

    def features(self) -> tuple[Tensor, Tensor]:
        return randn(self.BATCH, self.PIXELS, self.WIDTH), randn(self.BATCH, 1, self.WIDTH)

    def relation(self, state: dict[str, Tensor], embedding: Tensor, tokens: Tensor) -> Tensor:
        def normed(z: Tensor, name: str) -> Tensor:
            return F.layer_norm(z, z.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

        def projected(z: Tensor, name: str) -> Tensor:
            return z @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

        pixels, masks = normed(embedding, "layer_norm_feat"), normed(tokens, "layer_norm_mask")
        attention = projected(masks, "query_proj") @ projected(pixels, "key_proj").mT
        return attention / math.sqrt(self.WIDTH) + masks @ pixels.mT

    def loss(self, *samples: Tensor) -> Tensor:
        of_i, of_m, of_t, of_s = (cosines(z) for z in samples)
        compression = bits(of_t, 2) - bits(of_i * of_m * of_t, 2)
        return compression - 0.5 * information(of_t, of_s, 2)

    def test_distiller(self) -> None:
        shapes = {
            **dict.fromkeys(("query_proj.weight", "key_proj.weight"), (self.WIDTH, self.WIDTH)),
            **dict.fromkeys(("query_proj.bias", "key_proj.bias"), (self.WIDTH,)),
            **dict.fromkeys(("layer_norm_feat.weight", "layer_norm_feat.bias"), (self.WIDTH,)),
            **dict.fromkeys(("layer_norm_mask.weight", "layer_norm_mask.bias"), (self.WIDTH,)),
        }
        state = {name: randn(*shape) for name, shape in shapes.items()}
        teacher, student = self.features(), self.features()
        constant = [z.detach() for z in teacher]
        relations = self.relation(state, *constant), self.relation(state, *student)
        theirs = self.loss(*constant, *relations)
        rounded = {name: parameter.detach() for name, parameter in state.items()}
        distiller = page.distiller_from(rounded, dim=self.WIDTH).double()
        distiller.relation.load_state_dict(rounded)  # the digits that float32 does not hold
        ours = distiller(teacher, student)
        assert_same(ours, theirs, *student)
        for name, parameter in distiller.relation.named_parameters():
            (of_ours,) = torch.autograd.grad(ours, parameter, retain_graph=True)
            (of_theirs,) = torch.autograd.grad(theirs, state[name], retain_graph=True)
            torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=1e-10)

    def test_functionals(self) -> None:
        samples = *self.features(), randn(self.BATCH, 1, 10), randn(self.BATCH, 1, 10)
        assert_same(page.loss_of_relations(*samples), self.loss(*samples), *samples)
