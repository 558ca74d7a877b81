"""Relation modules in folders and on the Hub: what comes back, and what stays as it is."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file, save_file
from tensors import draw

from renyi_kd import RelationModule


class Doubled(RelationModule):
    """A subclass with an argument of its own."""

    def __init__(self, dim: int = 256, factor: float = 2.0, **options: str) -> None:
        super().__init__(dim, **options)
        self.factor = factor


def assert_same(found: RelationModule, expected: RelationModule) -> None:
    assert type(found) is type(expected)
    assert (found.dim, found.residual) == (expected.dim, expected.residual)
    features = draw(2, 6, expected.dim).float(), draw(2, 1, expected.dim, seed=1).float()
    assert torch.equal(found(*features), expected(*features))


@pytest.fixture
def module() -> RelationModule:
    torch.manual_seed(0)
    return RelationModule(8, residual="normalized")


def test_a_round_trip(module, tmp_path: Path) -> None:
    before = dict(module.__dict__)
    module.save_pretrained(tmp_path / "new" / "relation")
    assert module.__dict__ == before
    loaded = RelationModule.from_pretrained(tmp_path / "new" / "relation")
    assert_same(loaded, module)
    assert loaded.__dict__.keys() == module.__dict__.keys()
    assert load_file(tmp_path / "new" / "relation" / "model.safetensors").keys() == {
        *module.state_dict()
    }
    card = ModelCard.load(tmp_path / "new" / "relation" / "README.md")
    assert card.data.library_name == "renyi_kd"


def test_what_was_loaded_is_as_any_other(tmp_path: Path) -> None:
    # Pytest imports modules anew for their doctests, and pickle knows the newest one.
    kind = sys.modules["renyi_kd.infosam.relation"].RelationModule
    module = kind(8, residual="normalized")
    module.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_same(twin, module)
    assert_same(torch.load(file, weights_only=False), module)
    fresh = kind(8, residual="normalized")
    fresh.load_state_dict(loaded.state_dict())
    assert_same(fresh, module)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(kind.from_pretrained(tmp_path / "again"), module)


def test_a_subclass_is_saved_and_loaded_as_itself(tmp_path: Path) -> None:
    module = Doubled(8, 3.0)
    module.save_pretrained(tmp_path / "plain")
    assert_same(Doubled.from_pretrained(tmp_path / "plain", factor=3.0), module)
    assert Doubled.from_pretrained(tmp_path / "plain").factor == 2.0
    module.save_pretrained(tmp_path / "own", config={"dim": 8, "factor": 5.0})
    assert Doubled.from_pretrained(tmp_path / "own").factor == 5.0


def test_it_compiles_after_it_was_saved(module, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path)
    features = draw(2, 6, 8).float(), draw(2, 1, 8, seed=1).float()
    expected = module(*features)
    compiled = torch.compile(RelationModule.from_pretrained(tmp_path), backend="eager")
    torch.testing.assert_close(compiled(*features), expected)


def test_an_upload(module, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def create(_: HfApi, repo_id: str, **how: object) -> RepoUrl:
        asked.append((repo_id, how))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(_: HfApi, repo_id: str, folder_path: Path, **how: object) -> str:
        copied = tmp_path / repo_id
        copied.mkdir(parents=True)
        for path in folder_path.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert module.push_to_hub("me/relation", private=True).endswith("me/relation/commit/1")
    assert asked == [("me/relation", {"private": True, "exist_ok": True})]
    assert_same(RelationModule.from_pretrained(tmp_path / "me" / "relation"), module)


def test_weights_of_something_else_are_refused(module, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["key_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"key_proj\.weight"):
        RelationModule.from_pretrained(tmp_path)
    module.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"dim": 4, "residual": "raw"}')
    with pytest.raises(RuntimeError, match="size mismatch"):
        RelationModule.from_pretrained(tmp_path / "other")


WITHOUT = """
import sys
import renyi_kd
assert not {"huggingface_hub", "safetensors"} & sys.modules.keys()
module = renyi_kd.RelationModule(8)
for package in ("safetensors", "huggingface_hub"):
    sys.modules[package] = None
    for call in (module.save_pretrained, module.push_to_hub, module.from_pretrained):
        try:
            call("relation")
        except ImportError as error:
            assert package in str(error) and "pip install 'renyi_kd[hub]'" in str(error), error
        else:
            raise AssertionError(call)
    del sys.modules[package]
"""


def test_without_the_extra_the_library_works_and_says_what_is_missing() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True)


def normed(relation):
    torch.nn.utils.parametrizations.weight_norm(relation.query_proj)


def tied(relation):
    relation.key_proj.weight = relation.query_proj.weight


def wider(relation):
    relation.query_proj = torch.nn.Linear(8, 9)


@pytest.mark.parametrize("change", [normed, tied, wider])
def test_what_could_not_be_loaded_is_not_saved(change, tmp_path):
    relation = RelationModule(8)
    change(relation)
    with pytest.raises(ValueError, match="that it was built with, got others"):
        relation.save_pretrained(tmp_path / "relation")
    assert not (tmp_path / "relation").exists()


def test_saving_draws_nothing(tmp_path):
    relation = RelationModule(8)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    relation.save_pretrained(tmp_path / "relation")
    assert torch.equal(torch.rand(2), expected)
