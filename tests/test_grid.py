"""Many runs: what is missing runs, what is killed goes on, and each leaves one row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grid
import paper
from grid import Evaluation, Grid, Run
from parts.errors import InputError

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
# Programs that take no time. A training counts how often it was called, and what it was asked.
TRAINS = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / f"{folder.name}.calls").open("a") as file:
    print(*sys.argv[1:], file=file)
(folder / "options.json").touch()
if "--fails" in sys.argv:
    sys.exit("error: a line that says why")
if "--waits" in sys.argv and "--resume" not in sys.argv:
    time.sleep(60)
(folder / "result.json").write_text(json.dumps({"validation": {"epoch": 3, "iou": 0.5}}))
"""
EVALUATES = """
import json, sys
from pathlib import Path

run, output = sys.argv[1], Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(parents=True)
scores = {run: {"iou": 0.25}}
if "--pretrained" in sys.argv:
    scores[f"{run} before"] = {"iou": 0.125}
(output / "scores.json").write_text(json.dumps({"runs": scores}))
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINS)
    (folder / "evaluate.py").write_text(EVALUATES)
    monkeypatch.setattr(grid, "FINETUNING", folder)
    return folder


def a_run(name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Run:
    evaluations = (Evaluation("target", ("--pretrained",)), Evaluation("other"))
    return Run(name, {"seed": "0"}, "train.py", arguments, evaluations, steps=10, needs=needs)


def calls(output: Path, name: str) -> list[str]:
    return (output / "runs" / f"{name}.calls").read_text().splitlines()


def test_what_is_missing_runs_once(programs: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "output"
    several = Grid(output, threads=1)
    several.run_missing([a_run("a"), a_run("b")], jobs=2)
    several.run_missing([a_run("a"), a_run("b"), a_run("c")])
    rows = grid.read_table(output / "runs.csv")
    assert sorted(row["name"] for row in rows) == ["a", "b", "c"]
    for row in rows:
        assert len(calls(output, row["name"])) == 1
        assert row["target/iou"] == row["other/iou"] == "0.25000"
        assert row["target/before/iou"] == "0.12500"
        assert (row["epoch"], row["validation_iou"], row["steps"]) == ("3", "0.50000", "10")
        assert float(row["seconds"]) > 0
    assert several.missing([a_run("a")]) == []


def test_a_run_that_fails_leaves_the_others(programs: Path, tmp_path: Path, capsys) -> None:
    several = Grid(tmp_path / "output")
    with pytest.raises(InputError, match=r"1 runs failed.*bad"):
        several.run_missing([a_run("bad", "--fails"), a_run("good")])
    assert [*several.rows()] == ["good"]
    assert "bad: error: a line that says why" in capsys.readouterr().out


def test_a_kill_ends_the_training_which_then_goes_on(programs: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    program = f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS / "paper")!r}, {str(HERE)!r}]
import test_grid, grid
from pathlib import Path
grid.FINETUNING = Path({str(programs)!r})
grid.Grid(Path({str(output)!r})).run_missing([test_grid.a_run("a", "--waits")])
"""
    examples = BENCHMARKS.parent / "examples" / "finetuning"
    environment = os.environ | {"PYTHONPATH": str(examples)}
    killed = subprocess.Popen([sys.executable, "-c", program], env=environment)
    begun = output / "runs" / "a" / "options.json"
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = Grid(output)
    again.run_missing([a_run("a", "--waits")])
    first, second = calls(output, "a")
    assert "--resume" not in first
    assert second.endswith("--resume")
    assert again.rows()["a"]["seconds"] == ""  # that of a part would mislead
    ours = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(output) not in ours


def test_an_interrupt_starts_nothing_new(programs: Path, tmp_path: Path) -> None:
    def interrupt(run: Run) -> str:
        raise KeyboardInterrupt

    several = Grid(tmp_path / "output")
    several.run_one = interrupt
    with pytest.raises(InputError, match="interrupted; the same command goes on"):
        several.run_missing([a_run(name) for name in "abcdefgh"])
    assert several.rows() == {}


def test_scores_of_an_earlier_training_are_not_taken(programs: Path, tmp_path: Path) -> None:
    several = Grid(tmp_path / "output", discard=True)
    several.run_missing([a_run("a")])
    several.table.unlink()
    (programs / "evaluate.py").write_text(EVALUATES.replace("0.25", "0.75"))
    several.run_missing([a_run("a"), a_run("a")])
    assert several.rows()["a"]["target/iou"] == "0.75000"
    assert len(calls(several.output, "a")) == 2


def test_a_folder_keeps_to_what_it_was_made_of(programs: Path, tmp_path: Path) -> None:
    several = Grid(tmp_path / "output")
    several.run_missing([a_run("a")], made_of={"teacher": "one"})
    several.run_missing([a_run("b")], made_of={"teacher": "one", "data": "mine"})
    with pytest.raises(InputError, match="was made with another data"):
        several.run_missing([a_run("c")], made_of={"data": "theirs"})
    assert [*several.rows()] == ["a", "b"]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("name,steps,seconds\na,10\n", "is damaged in row 2"),
        ("name,steps,seconds\na,10,1,2\n", "is damaged in row 2"),
        ("seed,steps\n0,10\n", "has no column name"),
        ("name,steps,seconds\na,ten,1\n", "steps must be a number, got 'ten'"),
        (b"\xff\xfe", "is damaged"),
    ],
)
def test_a_damaged_table_is_named(spoilt: str | bytes, message: str, tmp_path: Path) -> None:
    content = spoilt if isinstance(spoilt, bytes) else spoilt.encode()
    (tmp_path / "runs.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Grid(tmp_path).plan([a_run("b")], 1, None)


def test_runs_wait_for_those_they_read(programs: Path, tmp_path: Path, capsys) -> None:
    several = Grid(tmp_path / "output")
    several.run_missing([a_run("second", needs=("first",)), a_run("first")], jobs=2)
    assert [*several.rows()] == ["first", "second"]
    with pytest.raises(InputError, match="third needs nobody"):
        several.run_missing([a_run("third", needs=("nobody",))])


def test_time_is_estimated_from_what_is_known(programs: Path, tmp_path: Path) -> None:
    several = Grid(tmp_path / "output")
    assert "known once one is finished" in several.plan([a_run("a")], 1, None)
    assert "about 1.0 hours" in several.plan([a_run("a")], 1, 360.0)
    several.run_missing([a_run("a")])
    assert "in 1 finished runs" in several.plan([a_run("a"), a_run("b")], 1, None)
    assert "2 runs, 1 missing, with 10 steps" in several.plan([a_run("a"), a_run("b")], 1, None)


def test_weights_are_discarded_if_asked(programs: Path, tmp_path: Path) -> None:
    several = Grid(tmp_path / "output", discard=True)
    several.run_missing([a_run("a")])
    assert not several.folder("a").exists()
    assert several.missing([a_run("a")]) == []


@pytest.mark.parametrize("table", paper.NAMES)
def test_each_table_of_the_paper_is_planned(table: str, tmp_path: Path, capsys) -> None:
    weights = [f"--{name}={tmp_path / name}" for name in ("checkpoint", "vit-l", "vit-h")]
    asked = [table, "--data", str(tmp_path), "--output", str(tmp_path / "runs"), *weights]
    paper.main([*asked, "--dry-run"])
    plan, *names = capsys.readouterr().out.splitlines()
    assert plan.startswith(f"{len(names)} runs, {len(names)} missing")
    assert len({*names}) == len(names) > 0
    paper.main([*asked, "--show", names[0]])
    command, *evaluations = capsys.readouterr().out.splitlines()
    assert command.startswith("python ")
    assert "finetune_sam" in command
    assert all("evaluate.py" in evaluation for evaluation in evaluations)
    assert not (tmp_path / "runs").exists()


def test_rows_are_those_of_the_paper() -> None:
    printed: dict[str, set[str]] = {}
    for row in grid.read_table(paper.FIGURES):
        printed.setdefault(row["table"], set()).add(row["row"])
    for table, rows in printed.items():
        assert {*paper.ROWS[table]} == rows, table


def test_table_2_has_the_papers_size(tmp_path: Path, capsys) -> None:
    # 11 rows train (the teacher does not), 5 training sets, 3 seeds.
    asked = ["table2", "--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--dry-run"]
    paper.main([*asked, "--checkpoint", str(tmp_path / "sam_vit_b.pth")])
    steps = 10 * (3636 // 4 + 1160 // 4 + 2000 // 4 + 398 // 4) + 20 * (1107 // 4)
    assert f"165 runs, 165 missing, with {33 * steps:,} steps" in capsys.readouterr().out


def test_a_table_has_mean_and_standard_error_beside_the_paper() -> None:
    leaf = paper.SET_OF["leaf"]
    runs = [Run(name, {}, "", (), (), 1) for name in "abc"]
    plan = [
        paper.Cell("Teacher", leaf, runs[:1], trained=False, needs=[]),
        paper.Cell("Student", leaf, runs, trained=True, needs=[]),
    ]
    rows = {
        name: {"name": name, "leaf/iou": value} for name, value in zip("abc", "135", strict=True)
    }
    rows["a"]["leaf/before/iou"] = "0.5"
    text = paper.table("table2", plan, rows)
    assert "| Student | 300.0 ± 115.47 \\| 74.4 ± 0.16 |" in text
    assert "| Teacher * | 50.0 \\| 37.6 ± 0.11 |" in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["table2", "--rows", "Nobody"], "--rows must be among Teacher"),
        (["table12", "--sets", "isic"], "--sets must have one of table12"),
        (["table12", "--", "--seed", "5"], "--seed cannot stand after --"),
        (["table12", "--", "--output=there"], "--output=there cannot stand after --"),
        (["table12"], "--data must have the folder leaf_disease_segmentation"),
        (["figure4"], "--vit-l must name the weights"),
        (["table2", "--show", "nothing"], "--show must be one of"),
    ],
)
def test_what_cannot_be_planned_is_said(asked, message, tmp_path: Path) -> None:
    place = ["--data", str(tmp_path), "--output", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match=message):
        paper.main([asked[0], *place, "--checkpoint", str(tmp_path / "sam_vit_b.pth"), *asked[1:]])
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("row", "runs"), [("Adapter", 9), ("InfoSAM2", 9), ("SAM2", 3)])
def test_rows_of_one_half_of_a_table(row: str, runs: int, tmp_path: Path, capsys) -> None:
    asked = ["table3", "--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--rows", row]
    paper.main([*asked, "--checkpoint", str(tmp_path / "sam2.pt"), "--dry-run"])
    assert capsys.readouterr().out.startswith(f"{runs} runs")


def test_other_data_need_another_folder(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "mine" / "leaf_disease_segmentation"
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text(f"image,label\n{split}.jpg,{split}.png\n")
    output = tmp_path / "runs"
    Grid(output).run_missing([], made_of={"tables of leaf_disease_segmentation": "others"})
    asked = ["table12", "--sets", "leaf", "--model", "tiny", "--output", str(output), "--dry-run"]
    with pytest.raises(SystemExit, match="was made with another tables of leaf"):
        paper.main([*asked, "--data", str(tmp_path / "mine"), "--", "--batch-size", "1"])


@pytest.mark.slow
def test_a_table_from_an_empty_folder_killed_and_resumed(tmp_path: Path, capsys) -> None:
    from finetuning_runs import WEIGHTS, make_data

    make_data(tmp_path / "data" / "leaf_disease_segmentation", train=4, val=2, test=2)
    asked = ["table2", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
    asked += ["--model", "tiny", "--checkpoint", WEIGHTS, "--sets", "leaf", "--seeds", "2"]
    asked += ["--rows", "Teacher", "Student", "InfoSAM", "--threads", "1", "--", "--epochs", "2"]
    killed = subprocess.Popen([sys.executable, str(BENCHMARKS / "paper" / "paper.py"), *asked])
    deadline = time.monotonic() + 300
    while not [*(tmp_path / "runs").glob("runs/*/epoch-001")] and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "runs" / "runs.csv").exists()
    paper.main(asked)
    found = (tmp_path / "runs" / "table2.md").read_text()
    assert found.count("±") == 1 + 2 * 2 + 3 * 2
    assert "| InfoSAM *" in found
    rows = grid.read_table(tmp_path / "runs" / "runs.csv")
    assert [row["seconds"] != "" for row in rows].count(False) == 1
    capsys.readouterr()
    paper.main(asked)
    assert "4 runs, 0 missing" in capsys.readouterr().out
    assert json.loads(next((tmp_path / "runs" / "scores").glob("*/leaf/scores.json")).read_text())[
        "paper"
    ]


@pytest.mark.parametrize("figure", ["figure4", "figure6", "figure7"])
def test_figures_are_drawn_from_the_rows(figure: str, tmp_path: Path, capsys) -> None:
    given = ["--data", str(tmp_path), "--output", str(tmp_path), "--checkpoint", "weights.pth"]
    options = paper.read_options([figure, *given, "--vit-l", "l.pth", "--vit-h", "h.pth"])
    options.extra = ()
    plan = [*paper.planned(figure, options, Grid(tmp_path))]
    rows = {}
    for number, run in enumerate(paper.ran(plan)):
        scores = {f"{data}/{metric}": number for data, metric in paper.columns(figure)}
        before = {key.replace("/", "/before/"): number for key in scores}
        rows[run.name] = {
            name: f"{0.3 + 0.001 * value:.3f}" for name, value in (scores | before).items()
        }
    paper.write(figure, plan, rows, tmp_path)
    assert {path.name for path in tmp_path.glob("figure*.p*")} == {f"{figure}.png", f"{figure}.pdf"}
    text = (tmp_path / f"{figure}.svg").read_text()
    sets = {data for data, _ in paper.columns(figure)} if figure != "figure7" else {"boundary F1"}
    assert all(f">{name}" in text for name in sets)
    names = plan if figure != "figure6" else []  # which has the scores in its cells
    assert all(f">{cell.row}<" in text for cell in names)
    assert "[%]<" in text
    assert f"**{figure}**" in capsys.readouterr().out
