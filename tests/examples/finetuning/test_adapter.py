"""Students as adapters of PEFT: plain PEFT on the official model gives the student's masks."""

import copy
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from finetuning_runs import BUILDS, build, combinations
from huggingface_hub import HfApi, ModelCard, RepoUrl
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import export
from parts.data.prompts import Prompts
from parts.files import read_json
from parts.models import huggingface
from parts.models.adaptation import adapt
from parts.models.methods.lora import PartLoRA
from parts.models.segmenter import Segmenter
from parts.options import METHODS, parse_training
from parts.runs.adapter import AS_ADAPTER, save_adapter
from parts.runs.card import CITATION, model_card

ROOT = Path(__file__).parents[3]


@torch.no_grad()
def moved(student: Segmenter, method: str, *targets: str) -> Segmenter:
    """Return a student all of whose weights have moved that train."""
    adapt(student, method, rank=2, targets=list(targets or ["qkv"]))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student.eval()


def options_of(package: str, model: str, method: str = "lora") -> Namespace:
    """What a run with these options has, without the run."""
    asked = ["--model", model, "--method", method, "--data", "leaf", "--output", "run"]
    return parse_training("", asked, package)


@torch.no_grad()
def masks(student: Segmenter, inputs: tuple[Tensor, ...]) -> Tensor:
    return student(inputs[0], Prompts(inputs[1]))


@pytest.mark.parametrize(
    ("family", "method"),
    combinations(AS_ADAPTER, lambda family, method: (family, method) == ("sam2", "lora")),
)
def test_plain_peft_gives_the_student(family: str, method: str, inputs, tmp_path: Path) -> None:
    package, name, *_ = BUILDS[family]
    official, student = build(family), moved(build(family), method)
    before, expected = masks(official, inputs), masks(student, inputs)
    options = options_of(package, name, method)
    card = model_card(student, options, None, "adapter")
    save_adapter(student, options, card, tmp_path / "adapter")
    kind = type(official.model)
    adapted = PeftModel.from_pretrained(official.model, tmp_path / "adapter")
    assert isinstance(adapted.get_base_model(), kind)
    scale = expected.abs().max()
    assert (masks(official, inputs) - expected).abs().max() <= 1e-6 * scale
    official.model = adapted.merge_and_unload()
    assert type(official.model) is kind
    assert (masks(official, inputs) - expected).abs().max() <= 1e-4 * scale
    assert (before - expected).abs().max() > 0.01 * scale


def test_many_layers_are_told_from_those_of_the_decoder(inputs, tmp_path: Path) -> None:
    # From twenty names on PEFT looks for what they have in common; the decoder has a lin1, too.
    official, student = build("sam"), moved(build("sam"), "lora", "qkv", "proj", "lin1", "lin2")
    expected, options = masks(student, inputs), options_of("sam", "tiny")
    save_adapter(student, options, model_card(student, options, None, "x"), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(official.model, tmp_path / "adapter")
    assert (masks(official, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()
    layers = [name for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 20
    assert all(".image_encoder." in name for name in layers)


ALONE = """
import pathlib, re, sys
import torch
card = pathlib.Path("me/leaf/README.md").read_text()
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1])
images, boxes = torch.load("inputs.pt")
with torch.no_grad():
    masks = model(images, input_boxes=boxes[:, None], multimask_output=False).pred_masks
assert "parts" not in sys.modules and "renyi_kd" not in sys.modules
torch.save(masks[:, 0, 0], "masks.pt")
"""


@pytest.mark.slow
def test_the_lines_of_the_card_load_it_elsewhere(inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    huggingface.tiny_sam().save_pretrained("official/sam")
    student = moved(huggingface.build("official/sam"), "lora")
    expected = masks(student, inputs)
    options = options_of("huggingface", "official/sam")
    card = model_card(student, options, None, "me/leaf", "official/sam")
    save_adapter(student, options, card, tmp_path / "me" / "leaf")
    torch.save(inputs[:2], "inputs.pt")
    subprocess.run([sys.executable, "-I", "-c", ALONE], check=True)
    found = torch.load("masks.pt")
    assert (found - expected).abs().max() <= 1e-6
    assert str(tmp_path) not in Path("me/leaf/adapter_config.json").read_text()


def test_a_lora_for_parts_is_one_of_a_larger_rank() -> None:
    torch.manual_seed(0)
    for parts, every in ((6, 1), (3, 2)):
        lora = PartLoRA(nn.Linear(4, 12), parts, rank=2, every=every)
        nn.init.normal_(lora.up)
        down, up = lora.factors()
        x = torch.randn(5, 4)
        torch.testing.assert_close(x @ down.T @ up.T, lora(x))


class Hub:
    """What is asked of the Hub, which is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.made, self.files, self.error = [], {}, error
        monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **how: self.create(name, how))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **what: self.upload(**what))

    def create(self, name: str, how: dict) -> RepoUrl:
        if self.error is not None:
            raise self.error
        self.made.append((name, how))
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload(self, repo_id: str, folder_path: Path) -> None:
        found = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.files[repo_id] = found


def test_an_adapter_and_its_card_are_pushed(trained, tmp_path: Path, monkeypatch, capsys) -> None:
    hub, run = Hub(monkeypatch), trained("sam", "lora")
    folder = tmp_path / "leaf"
    export.main([str(run), str(folder), "--adapter", "--push-to", "me/leaf"])
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/leaf\n")
    assert hub.made == [("me/leaf", {"exist_ok": True})]
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files["me/leaf"].keys() == names
    assert hub.files["me/leaf"] == {path.name: path.read_bytes() for path in folder.iterdir()}

    card, result = ModelCard.load(folder / "README.md"), read_json(run / "result.json")
    found = {(x.dataset_split, x.metric_type): x.metric_value for x in card.data.eval_results}
    assert found == {
        (split, metric): result[split][metric]
        for split in ("validation", "test")
        for metric in ("iou", "dice")
    }
    assert "| epochs | 2 |" in card.text
    assert f"{result['test']['iou']:.4f}" in card.text
    assert CITATION in card.text
    assert str(run.parent) not in card.content
    assert card.data.tags == ["segment-anything", "lora", "infosam"]


def test_a_card_cites_what_was_used_and_scores_what_it_is_of(trained, tmp_path: Path) -> None:
    bibtex = CITATION.partition("```bibtex\n")[2]
    assert bibtex in (ROOT / "README.md").read_text()
    export.main([str(trained("sam", "lora")), str(tmp_path / "0"), "--adapter", "--epoch", "1"])
    student = build("sam")
    plain = model_card(student, options_of("sam", "tiny"), None, "x")
    other = options_of("sam", "tiny")
    other.distiller = "none"
    assert bibtex in plain.text
    assert bibtex not in model_card(student, other, None, "x").text
    best = read_json(trained("sam", "lora") / "result.json")["validation"]["epoch"]
    assert ("model-index" in (tmp_path / "0" / "README.md").read_text()) == (best == 1)


def test_official_models_have_their_names_on_the_hub() -> None:
    official = copy.copy(options_of("sam2", "tiny"))
    official.model, official.checkpoint = "sam2.1_hiera_b+", Path("/x/base_plus.pt")
    card = model_card(build("sam2"), official, None, "me/leaf")
    assert card.data.base_model == "facebook/sam2.1-hiera-base-plus"
    assert "build_sam2('configs/sam2.1/sam2.1_hiera_b+.yaml', 'base_plus.pt'" in card.text
    official.package, official.model = "sam", "vit_b"
    card = model_card(build("sam"), official, None, "me/leaf")
    assert card.data.base_model == "facebook/sam-vit-base"
    assert "sam_model_registry['vit_b'](checkpoint='base_plus.pt')" in card.text


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("sam2", "adapter", ["--adapter"], "--adapter needs a run of lora, .*, got adapter. Leave"),
        ("sam", "lora", ["--adapter", "--push-to", "a/b/c"], "a/b/c must be a name on the Hub: "),
        ("sam", "lora", ["--adapter", "--base-model", "a b"], "a b must be a name on the Hub: "),
        ("sam", "lora", ["--push-to", "me/leaf"], "--push-to and --base-model need --adapter"),
        ("sam", "lora", ["--adapter", "--epoch", "0"], "--adapter needs an --epoch of training"),
    ],
)
def test_what_cannot_be_shared(
    family: str, method: str, options: list[str], message: str, trained, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        export.main([str(trained(family, method)), str(tmp_path / "x"), *options])
    assert re.search(message, f"{exit_info.value}{capsys.readouterr().err}")
    assert not (tmp_path / "x").exists()


def test_a_hub_out_of_reach(trained, tmp_path: Path, monkeypatch) -> None:
    Hub(monkeypatch, ConnectionError("no network."))
    command = [str(trained("sam", "lora")), str(tmp_path / "x"), "--adapter"]
    with pytest.raises(SystemExit) as exit_info:
        export.main([*command, "--push-to", "me/leaf"])
    remedy = f"The folder is whole, and `hf upload me/leaf {tmp_path / 'x'}` uploads it, too."
    assert str(exit_info.value) == f"error: --push-to me/leaf: no network. {remedy}"


def test_every_method_is_one_or_the_other() -> None:
    assert set(AS_ADAPTER) < set(METHODS)
