"""The Python blocks of README and pages run, links lead somewhere, and every name has a place."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import SIZE, segment, tiny_hf_sam, tiny_sam, tiny_sam2
from peft import PeftModel

import renyi_kd

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ALL_PAGES = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
ALL_PAGES += [*ROOT.glob("examples/**/README.md"), *ROOT.glob("benchmarks/**/*.md")]


def run_blocks(page: Path, namespace: dict) -> dict:
    """Execute the page's Python blocks, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    return namespace


def given_by_readme() -> dict:
    """What the README takes as given: a SAM of 256 channels, a data loader and functions."""
    torch.manual_seed(0)
    images, boxes = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 50]])
    sam = tiny_sam(256)
    masks = (segment(sam, images, boxes) > 0).float()
    return {
        "sam": sam,
        "device": "cpu",
        "loader": [(images, boxes, masks)],
        "predict": segment,
        "criterion": F.binary_cross_entropy_with_logits,
        "names": ["first", "second"],  # of the images, for the cache
    }


@pytest.fixture(scope="module")
def readme(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        namespace = run_blocks(ROOT / "README.md", given_by_readme())
        namespace["loaded"] = PeftModel.from_pretrained(tiny_sam(256), "my-adapter")
    return namespace


def test_readme(readme) -> None:
    assert readme["loss"].isfinite()
    adapters = [p for name, p in readme["student"].named_parameters() if "lora_B" in name]
    assert adapters
    assert all((p != 0).any() for p in adapters)  # they start at zero
    assert readme["distiller"].relation.query_proj.weight in readme["optimizer"].state
    torch.testing.assert_close(readme["teacher"].state_dict(), tiny_sam(256).state_dict())
    assert 0 < readme["information"] < 10
    images, boxes, _ = readme["loader"][0]
    masks, before = (segment(readme[name].eval(), images, boxes) for name in ("loaded", "teacher"))
    torch.testing.assert_close(masks, segment(readme["student"].eval(), images, boxes))
    assert not torch.allclose(masks, before)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page(page, readme, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    # What torchrun sets.
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    # The tutorial needs nothing else.
    result = run_blocks(page, {} if page.stem == "tutorial" else dict(readme))
    if page.stem == "processes":
        assert result["distiller"].process_group is torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()
    elif page.stem == "training-loop":
        assert -1 <= result["figures"]["relation_cosine"] <= 1
        assert result["loss"].requires_grad
        images, boxes, _ = readme["loader"][0]
        for name, model in (
            ("predict", tiny_sam()),
            ("predict_transformers", tiny_hf_sam()),
            ("predict_sam2", tiny_sam2()),
        ):
            with renyi_kd.FeatureCollector(model) as collector:
                logits = result[name](model, images, boxes)
                assert logits.requires_grad
                assert len(collector.pop().mask_tokens) == len(logits) == len(images)
            if name != "predict_sam2":  # given boxes as its predictor gives them, which differs
                torch.testing.assert_close(logits, segment(model, images, boxes))
    elif page.stem == "tutorial":
        shown = re.findall(r"^(\w+) +(\S+) -> +(\S+)$", page.read_text(), flags=re.MULTILINE)
        assert tuple(name for name, *_ in shown) == result["terms"]._fields
        figures = torch.tensor([[float(x) for x in (first, last)] for _, first, last in shown])
        found = torch.stack([torch.stack(result["first"]), torch.stack(result["terms"])], 1)
        torch.testing.assert_close(figures, found, rtol=0, atol=0.02)
        information = result["related"].item(), result["unrelated"].item()
        assert "{:.3f} bits and {:.3f} bits".format(*information) in page.read_text()
    elif page.stem == "batch-of-one":
        assert result["message"].startswith("A batch must hold at least 2 samples, got 1: ")
        assert result["terms"].loss.abs() < 1e-12
        assert not result["gradient"].any()
    elif page.stem == "cached-teacher":
        assert result["cached"].image_embedding is result["embedding"]
        assert result["loss"].isfinite()
    elif page.stem == "models":
        assert result["embedding"].shape == (4, 64, 4, 4)
        assert result["tokens"].shape == (4, 10, 64)
    elif page.stem == "routes":
        assert result["error"] < 0.1
    elif page.stem == "porting":
        assert result["bandwidth"].grad.all()  # test_porting has the values
    else:
        assert result.keys() == readme.keys(), "a page with new code needs a check here"


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {"#" + heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", ALL_PAGES, ids=[str(p.relative_to(ROOT)) for p in ALL_PAGES])
def test_links(page) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, sharp, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            if sharp:
                assert sharp + anchor in heading_anchors(target), link


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = re.findall(r"^::: (.*)$", pages, flags=re.MULTILINE)
    assert sorted(names) == sorted(f"renyi_kd.{name}" for name in renyi_kd.__all__)


def test_readme_is_a_welcome() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
