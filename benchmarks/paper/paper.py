"""The tables and figures of the InfoSAM paper, each by one command.

`python benchmarks/paper/paper.py table2 --data data --checkpoint sam_vit_b_01ec64.pth --output
runs/paper` trains what is missing of the table, three seeds a row, and prints mean ± standard error
beside the paper's own figures. After a kill, the same command goes on. `--data` holds the folders
of the data sets, under the names that their archives have. Tables share their runs if they share
`--output`. The scores are those of `evaluate.py --paper`.

`--dry-run` lists and counts the runs, and `--show NAME` prints the commands of one. What stands
after `--` goes to every training, such as `-- --precision bf16`. A setting below the paper's:
`--rows Student InfoSAM --sets leaf --seeds 2 --model tiny --checkpoint tiny_sam.safetensors --
--epochs 1`. An output folder keeps to the data and weights that it was made with.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from grid import (
    Cells,
    Evaluation,
    Grid,
    Run,
    add_running,
    digest_of_file,
    digest_of_tables,
    read_table,
    shown,
    tables_of,
)
from parts.errors import InputError, plain_errors
from parts.files import replace
from parts.options import parse_training, place, whole

FIGURES = Path(__file__).with_name("figures.csv")


class DataSet(NamedTuple):
    """Where a data set is trained and tested on.

    Attributes:
        archive: The folder, which several test sets may share.
        images: How many there are for training, to count steps where the folder is not at hand.
        tests: The test tables by the names of the data sets.
        options: What the paper does otherwise there.
    """

    archive: str
    images: int
    tests: dict[str, str]
    options: tuple[str, ...] = ()


POINTS = ("--epochs", "20", "--eval-prompts", "points", "--eval-points", "5")
SETS = (
    DataSet(
        "camo_sem_seg",
        3636,
        {"camo": "test_CAMO.csv", "cod10k": "test_COD10K.csv", "chameleon": "test_CHAMELEON.csv"},
    ),
    DataSet("polyp", 1160, {"kvasir": "test_Kvasir.csv", "cvc-612": "test_CVC-ClinicDB.csv"}),
    DataSet("isic2017", 2000, {"isic": "test.csv"}),
    DataSet("leaf_disease_segmentation", 398, {"leaf": "test.csv"}),
    DataSet("road_segmentation", 1107, {"roads": "test.csv"}, POINTS),
)
SET_OF = {name: data for data in SETS for name in data.tests}


class Row(NamedTuple):
    """A row of a table: a system, as options of the fine-tuning program.

    Attributes:
        options: The options, or none for the model before training.
        open: What the paper leaves open of it, or where it contradicts itself.
    """

    options: tuple[str, ...] | None
    open: str = ""


def peft(method: str, distiller: str = "none", open: str = "") -> Row:
    """Return the row of a fine-tuning method."""
    return Row(("--method", method, "--distiller", distiller), open)


def distilled(distiller: str, *options: str, open: str = "") -> Row:
    """Return the row of a distiller, whose student has adapters."""
    return Row(("--method", "adapter", "--distiller", distiller, *options), open)


WEIGHTS = "its weight, temperature and layers"
RELATIONS_OPEN = "what trains the relation module, and which features it replaces"
BEFORE = Row(None, "Kvasir has two values in Tables 1 and 2")
HEADS = "LoRA for each head as in Eq. 32, or on the fused qkv as released, which is taken here"
METHODS = {
    "decoder-only": peft("decoder"),
    "BitFit": peft("bitfit"),
    "AdaptFormer": peft("adaptformer", open="its width and scale"),
    "LoRA": peft("lora", open=HEADS),
    "Adapter": peft("adapter", open="which blocks have adapters"),
    "LoRA+Ours": peft("lora", "infosam", open=HEADS),
    "Adapter+Ours": distilled("infosam", open="which blocks have adapters"),
}
METHODS_OF_SAM = METHODS | {
    "HQ-SAM": Row(
        ("--method", "hq-sam", "--distiller", "none", "--point-loss"),
        "what it trains, and its loss; here as in its release, with the paper's epochs and rate",
    ),
    "SU-SAM": peft("su-sam-mixed", open="which of its four variants"),
    "ConvLoRA-SAM": peft("conv-lora", open="its rank and alpha"),
}
DISTILLERS_OF_SAM2 = {
    "Student": distilled("none"),
    "PKT": distilled("pkt", open=WEIGHTS),
    "VID": distilled("vid", open=WEIGHTS),
    "ReviewKD": distilled("reviewkd", open=WEIGHTS),
    "TinySAM": distilled("tinysam", open=f"{WEIGHTS}; on roads Tables 2 and 5 differ"),
    "MobileSAM": distilled("mobilesam", open=WEIGHTS),
}
DISTILLERS = DISTILLERS_OF_SAM2 | {
    "Logit": distilled("logit", open=WEIGHTS),
    "PKD": distilled("pkd", open=WEIGHTS),
    "IBD": distilled("ibd", open=f"{WEIGHTS}; what becomes of its adversarial part"),
    "SemCKD": distilled("semckd", open=f"{WEIGHTS}; its attention cannot learn from batches of 4"),
    "InfoSAM": distilled("infosam", open="on CAMO Tables 2 and 8 differ"),
}
TEACHERS = {"ViT-L": "vit_l", "ViT-H": "vit_h"}
SCALES = ("0.1", "0.5", "1", "2")
ORDERS = ("1.01", "2", "3")
LAMBDAS = {
    f"{first}, {second}": distilled(
        "infosam", "--compression-weight", first, "--distillation-weight", second
    )
    for first in SCALES
    for second in SCALES
}
# The rows of each table, by their names in figures.csv.
ROWS: dict[str, dict[str, Row]] = {
    "table1": {"SAM": BEFORE, **METHODS_OF_SAM},
    "table2": {"Teacher": BEFORE, **DISTILLERS},
    "table3a": {"SAM2": Row(None), **METHODS},
    "table3b": {
        "Teacher": Row(None),
        **DISTILLERS_OF_SAM2,
        "InfoSAM2": distilled("infosam"),
    },
    "table4": {
        "neither": distilled("none"),
        "L_d": distilled("infosam", "--relation", "dot-product", "--compression-weight", "0"),
        "L_r+L_d": distilled("infosam"),
    },
    "table5": {
        "TinySAM": distilled("tinysam", open=f"{WEIGHTS}; on roads Tables 2 and 5 differ"),
        "TinySAM+RM": distilled("tinysam-relation", open=RELATIONS_OPEN),
        "MobileSAM": distilled("mobilesam", open=WEIGHTS),
        "MobileSAM+RM": distilled("mobilesam-relation", open=RELATIONS_OPEN),
    },
    "table6": {
        "InfoSAM": distilled("infosam"),
        "InfoSAM-T": distilled(
            "infosam",
            "--freeze-relation",
            open="which run the relation module is from; here the one of the same seed",
        ),
    },
    "table11": {
        f"alpha={order}": distilled("infosam", "--alpha", order, open="what its time includes")
        for order in ORDERS
    },
    "table12": {
        "w/o RT": distilled("infosam", "--without-regularization", open="which terms are left out"),
        "w RT": distilled("infosam"),
    },
    "table13": {
        "Dot Product": distilled("infosam", "--relation", "dot-product"),
        "Linear": distilled("infosam", "--relation", "linear", open="what the layer sees"),
        "Attn-5": distilled("infosam", "--relation", "attention-5", open="its further layers"),
        "Attn-3": distilled("infosam", "--relation", "attention-3", open="its further layers"),
        "Attn-1": distilled("infosam"),
    },
    "figure4": {
        f"{name}, {teacher}": distilled(
            distiller, "--teacher", model, open="which methods the figure compares"
        )
        for teacher, model in TEACHERS.items()
        for name, distiller in (
            ("MobileSAM", "mobilesam"),
            ("TinySAM", "tinysam"),
            ("InfoSAM", "infosam"),
        )
    },
    "figure6": {
        name: row._replace(open="the values of both weights") for name, row in LAMBDAS.items()
    },
    "figure7": {
        "SAM": Row(None),
        **{name: METHODS_OF_SAM[name] for name in ("HQ-SAM", "SU-SAM", "ConvLoRA-SAM", "LoRA")},
        "InfoSAM": distilled("infosam", open="which methods the figure compares"),
    },
}
ROWS["table7"] = ROWS["table8"] = {
    "SAM": BEFORE,
    **{name: METHODS_OF_SAM[name] for name in METHODS_OF_SAM if not name.endswith("+Ours")},
    **{name: row for name, row in DISTILLERS.items() if name != "Student"},
}
ROWS["table9"], ROWS["table10"] = ROWS["table3a"], ROWS["table3b"]
PARTS = {"table3": ("table3a", "table3b")}  # tables with two halves
OF_SAM2 = ("table3a", "table3b", "table9", "table10")
BOUNDARY = tuple(f"boundary_f1_{pixels}" for pixels in range(4))
COLUMNS = {
    "figure4": [("leaf", "iou"), ("roads", "iou")],
    "figure6": [("kvasir", "s_measure"), ("leaf", "iou"), ("roads", "iou")],
    "figure7": [("leaf", metric) for metric in BOUNDARY],
}
OTHER_RELATION = {"kvasir": "leaf", "leaf": "kvasir"}  # of Table 6
MODELS = {"sam": "vit_b", "sam2": "sam2_hiera_b+"}
OWN = tuple(
    f"--{name}"
    for name in (
        *("data", "test-table", "images", "masks", "output", "seed", "resume", "model"),
        *("checkpoint", "teacher", "teacher-checkpoint", "threads", "method", "distiller"),
    )
)
NAMES = (*(f"table{number}" for number in range(1, 14)), "figure4", "figure6", "figure7")


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing of a table and print it, or say what that would be."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = read_options(argv[:cut])
    options.extra = tuple(argv[cut + 1 :])
    with plain_errors():
        own = [value for value in options.extra if value.partition("=")[0] in OWN]
        if own:
            raise InputError(f"{own[0]} cannot stand after --, as each run has its own")
        grid = Grid(options.output, options.threads)
        parts = with_rows(PARTS.get(options.table, (options.table,)), options.rows)
        plans = {part: [*planned(part, options, grid)] for part in parts}
        # Halves of a table share runs, and so do rows.
        runs = {run.name: run for plan in plans.values() for run in [*needed(plan), *ran(plan)]}
        if options.show is not None:
            if options.show not in runs:
                raise InputError(f"--show must be one of {', '.join(runs)}, got {options.show}")
            print("\n".join(map(shown, grid.commands(runs[options.show]))))
            return
        read = made_of([*runs.values()], options, must_exist=not options.dry_run)
        grid.check(read)
        print(grid.plan([*runs.values()], options.jobs, options.seconds_per_step))
        if options.dry_run:
            print("\n".join(runs))
            return
        try:
            grid.run_missing([*runs.values()], options.jobs, read)
        finally:  # of what there is
            for part, plan in plans.items():
                write(part, plan, grid.rows(), options.output)


def write(part: str, plan: Sequence[Cell], rows: dict[str, Cells], folder: Path) -> None:
    """Print a table and write it, and draw it if it is a figure."""
    found = measured(part, plan, rows)
    if not any(found.values()):
        return
    text = table(part, plan, rows)
    print(text)
    replace(folder / f"{part}.md", text)
    if part.startswith("figure"):
        from plots import draw

        draw(part, found, folder / part)


def with_rows(parts: Sequence[str], rows: Sequence[str] | None) -> list[str]:
    """Return the halves of a table that have a row that is asked for.

    Raises:
        InputError: If a row is in none.
    """
    names = dict.fromkeys(name for part in parts for name in ROWS[part])
    unknown = [name for name in rows or () if name not in names]
    if unknown:
        raise InputError(f"--rows must be among {', '.join(names)}, got {unknown[0]}")
    return [part for part in parts if rows is None or {*rows} & ROWS[part].keys()]


def made_of(
    runs: Sequence[Run], options: argparse.Namespace, *, must_exist: bool
) -> dict[str, str]:
    """Return digests of what the runs read: tables, and official weights.

    Raises:
        InputError: If something is missing that must exist.
    """
    found = {}
    for archive in dict.fromkeys(run.labels["data"] for run in runs):
        folder = options.data / archive
        if folder.is_dir():
            found[f"tables of {archive}"] = digest_of_tables(folder)
        elif must_exist:
            raise InputError(f"--data must have the folder {archive}, got {options.data}")
    model = options.model or MODELS[runs[0].labels["package"]]
    weights = {"checkpoint": options.checkpoint, "vit-l": options.vit_l, "vit-h": options.vit_h}
    for name, path in weights.items():
        if path is not None and (must_exist or path.exists()):
            found[f"{name} for {model}"] = digest_of_file(path, f"--{name}")
    return found


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says, without what stands after `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=NAMES, metavar="TABLE", help=", ".join(NAMES))
    parser.add_argument("--data", type=place, required=True, help="the folders of the data sets")
    parser.add_argument("--checkpoint", type=place, help="the official weights of the student")
    parser.add_argument("--model", help=f"the student, by default {' and '.join(MODELS.values())}")
    parser.add_argument("--vit-l", type=place, help="weights of the teacher ViT-L, for figure4")
    parser.add_argument("--vit-h", type=place, help="those of ViT-H")
    parser.add_argument("--output", type=place, required=True, help="the folder of all runs")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--sets", nargs="+", choices=SET_OF, help="only these data sets")
    parser.add_argument("--seeds", type=whole(1), default=3, help="of each row")
    add_running(parser)
    return parser.parse_args(argv)


class Cell(NamedTuple):
    """A row of a table on one training set: its runs, one a seed."""

    row: str
    data: DataSet
    runs: list[Run]
    trained: bool  # or the model before training is meant, of the same runs
    needs: list[Run]  # runs that those read


def ran(plan: Sequence[Cell]) -> Iterator[Run]:
    """Yield the runs of a table."""
    for cell in plan:
        yield from cell.runs


def needed(plan: Sequence[Cell]) -> Iterator[Run]:
    """Yield the runs that those of a table need."""
    for cell in plan:
        yield from cell.needs


def planned(part: str, options: argparse.Namespace, grid: Grid) -> Iterator[Cell]:
    """Yield the cells of a table or figure.

    Raises:
        InputError: If it has no row that is asked for, or not the data sets.
    """
    rows = ROWS[part]
    names = dict.fromkeys(data for data, _ in columns(part) if data in (options.sets or SET_OF))
    if not names:
        raise InputError(f"--sets must have one of {part}, got {' '.join(options.sets)}")
    sets = dict.fromkeys(SET_OF[name].archive for name in names)
    for name, row in rows.items():
        if options.rows and name not in options.rows:
            continue
        for archive in sets:
            data = next(other for other in SETS if other.archive == archive)
            if row.options is None:  # any run has the scores of its model before training
                baseline = next(other for other in rows.values() if other.options is not None)
                one = argparse.Namespace(**vars(options) | {"seeds": 1})
                yield cell(name, baseline, data, one, part, grid)._replace(trained=False)
            else:
                yield cell(name, row, data, options, part, grid)


def cell(
    name: str, row: Row, data: DataSet, options: argparse.Namespace, part: str, grid: Grid
) -> Cell:
    """Return a cell with its runs."""
    runs, sources = [], []
    for seed in range(options.seeds):
        extra: tuple[str, ...] = ()
        needs: tuple[str, ...] = ()
        if name == "InfoSAM-T":
            other = SET_OF[OTHER_RELATION[next(iter(data.tests))]]
            sources.append(run_of(distilled("infosam"), other, seed, options, part))
            needs = (sources[-1].name,)
            extra = ("--relation-from", str(grid.folder(sources[-1].name)))
        runs.append(run_of(row, data, seed, options, part, extra, needs))
    return Cell(name, data, runs, trained=True, needs=sources)


def run_of(
    row: Row,
    data: DataSet,
    seed: int,
    options: argparse.Namespace,
    part: str,
    extra: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
) -> Run:
    """Return the run of a row for a data set and a seed."""
    package = "sam2" if part in OF_SAM2 else "sam"
    model = options.model or MODELS[package]
    asked = [*(row.options or ()), *data.options, "--seed", str(seed), *options.extra]
    # Runs of several tables are the same if this is the same.
    identity = "\n".join([package, model, *asked, *needs])
    name = (
        f"{data.archive}-{system(row)}-{seed}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    )
    arguments = ["--model", model, "--data", str(options.data / data.archive), *asked, *extra]
    if options.checkpoint is not None:
        arguments += ["--checkpoint", str(options.checkpoint)]
    for size, weights in (("vit_l", options.vit_l), ("vit_h", options.vit_h)):
        if size in asked:
            if weights is None:
                raise InputError(f"--{size.replace('_', '-')} must name the weights of the teacher")
            arguments += ["--teacher-checkpoint", str(weights)]
    first, *_ = data.tests.values()
    arguments += ["--test-table", first]
    trained = parse_training("", [*arguments, "--output", "run"], package)
    steps = trained.epochs * (images_of(data, options.data) // trained.batch_size)
    before = seed == 0  # all seeds start from the same model
    return Run(
        name,
        {"package": package, "data": data.archive, "system": system(row), "seed": str(seed)},
        f"finetune_{package}.py",
        tuple(arguments),
        tuple(
            Evaluation(test, ("--paper", "--test-table", file, *(["--pretrained"] * before)))
            for test, file in data.tests.items()
        ),
        steps,
        needs,
    )


def system(row: Row) -> str:
    """Return a short name for what a row trains."""
    values = [value for value in row.options or () if value not in ("--method", "--distiller")]
    return "_".join(value.removeprefix("--") for value in values)


def images_of(data: DataSet, folder: Path) -> int:
    """Return the number of training images, from the tables or else as the paper has it."""
    archive = folder / data.archive
    if not (archive / "train.csv").exists():
        return data.images
    return len(tables_of(archive, next(iter(data.tests.values())))["train"])


def columns(part: str) -> list[tuple[str, str]]:
    """Return the columns of a table: data sets, and metrics in the paper's order."""
    if part in COLUMNS:
        return COLUMNS[part]
    rows = [row for row in read_table(FIGURES) if row["table"] == part and row["data"]]
    return [*dict.fromkeys((row["data"], row["metric"]) for row in rows)]


Measured = dict[str, dict[tuple[str, str], list[float]]]  # values of all seeds, in percent


def measured(part: str, plan: Sequence[Cell], rows: dict[str, Cells]) -> Measured:
    """Return what was measured of each row, by data set and metric."""
    wanted = columns(part)
    found: Measured = {}
    for cell in plan:
        values = found.setdefault(cell.row, {})
        for run in cell.runs:
            for column, text in rows.get(run.name, {}).items():
                test, *variant, metric = column.split("/") if "/" in column else ("", "")
                meant = variant == ([] if cell.trained else ["before"])
                if meant and text and (test, metric) in wanted:
                    values.setdefault((test, metric), []).append(100 * float(text))
    return found


def table(part: str, plan: Sequence[Cell], rows: dict[str, Cells]) -> str:
    """Return a table in Markdown, each cell with the paper's figure behind a stroke."""
    paper = {
        (row["row"], row["data"], row["metric"]): plus_minus(row["mean"], row["error"])
        for row in read_table(FIGURES)
        if row["table"] == part
    }
    found = measured(part, plan, rows)
    kept = [key for key in columns(part) if any(key in values for values in found.values())]
    lines = [f"**{part}**: measured, mean ± standard error over seeds | the paper's own", ""]
    lines += ["| | " + " | ".join(f"{data}, {metric}" for data, metric in kept) + " |"]
    lines += ["|---" * (len(kept) + 1) + "|"]
    for row, values in found.items():
        mark = " *" if ROWS[part][row].open else ""
        cells = [f"{spread(values.get(key, []))} \\| {paper.get((row, *key), '–')}" for key in kept]
        lines.append(f"| {row}{mark} | " + " | ".join(cells) + " |")
    notes = [f"- {row}: {ROWS[part][row].open}" for row in found if ROWS[part][row].open]
    if notes:
        lines += ["", "\\* what the paper leaves open, or where it contradicts itself:", *notes]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard error."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{mean(values):.1f} ± {stdev(values) / math.sqrt(len(values)):.2f}"


def plus_minus(value: str, error: str) -> str:
    """Return a figure as the paper prints it."""
    return f"{value} ± {error}" if error else value


if __name__ == "__main__":
    main()
