"""The paper's figures are all there, and contradict each other only where that is listed."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"
ROWS = list(csv.DictReader((FOLDER / "figures.csv").read_text(encoding="ascii").splitlines()))

SALIENCY = {"s_measure", "e_measure", "weighted_f"}
AREA = {"iou", "dice"}
METRICS = {
    "cod10k": SALIENCY,
    "camo": SALIENCY,
    "chameleon": SALIENCY,
    "kvasir": SALIENCY,
    "cvc-612": SALIENCY,
    "isic": AREA,
    "leaf": AREA,
    "roads": AREA,
    "": {"milliseconds"},
}

# Rows and columns of every table.
SHAPES = {
    "table1": (11, 11),
    "table2": (12, 11),
    "table3a": (8, 3),
    "table3b": (8, 3),
    "table4": (3, 3),
    "table5": (4, 2),
    "table6": (2, 2),
    "table7": (19, 6),
    "table8": (19, 9),
    "table9": (8, 7),
    "table10": (8, 7),
    "table11": (3, 3),
    "table12": (2, 2),
    "table13": (5, 2),
}

# Tables of SAM2, and the names under which tables have one system.
SAM2 = {"table3a", "table3b", "table9", "table10"}
SAME = {
    "SAM2": "SAM",
    "Teacher": "SAM",
    "Student": "Adapter",
    "neither": "Adapter",
    "L_d": "Dot Product",
    "Adapter+Ours": "InfoSAM",
    "InfoSAM2": "InfoSAM",
    "L_r+L_d": "InfoSAM",
    "alpha=2": "InfoSAM",
    "w RT": "InfoSAM",
    "Attn-1": "InfoSAM",
}

# What the paper prints with more than one value: mean, error, and the tables that have them.
CONTRADICTIONS = {
    ("SAM", "kvasir", "s_measure"): {
        ("71.4", "0.16"): ["table1"],
        ("83.0", "0.10"): ["table2", "table7"],
    },
    ("SAM", "kvasir", "e_measure"): {
        ("77.9", "0.17"): ["table1"],
        ("88.8", "0.29"): ["table2", "table7"],
    },
    ("InfoSAM", "camo", "s_measure"): {
        ("88.6", "0.09"): ["table1", "table2"],
        ("88.5", "0.05"): ["table8"],
    },
    ("InfoSAM", "camo", "weighted_f"): {
        ("87.1", "0.37"): ["table1", "table2"],
        ("87.1", "0.09"): ["table8"],
    },
    ("InfoSAM", "leaf", "iou"): {
        ("75.6", "0.27"): ["table1", "table2", "table11", "table12", "table13"],
        ("75.6", "0.30"): ["table6"],
    },
    ("TinySAM", "roads", "iou"): {
        ("25.7", "1.19"): ["table2"],
        ("28.7", "1.69"): ["table5"],
    },
}


def test_every_row_parses():
    for row in ROWS:
        assert list(row) == ["table", "row", "data", "metric", "mean", "error"]
        assert row["row"] == row["row"].strip() != ""
        assert re.fullmatch(r"\d{1,2}\.\d", row["mean"]), row
        digits = 1 if row["metric"] == "milliseconds" else 2
        without = row["table"] == "table4"
        pattern = "" if without else rf"\d{{1,2}}\.\d{{{digits}}}"
        assert re.fullmatch(pattern, row["error"]), row


def test_names_are_known():
    for row in ROWS:
        assert row["metric"] in METRICS[row["data"]], row
    assert {row["data"] for row in ROWS} == set(METRICS)
    assert {row["row"] for row in ROWS} >= set(SAME)


def test_each_figure_is_there_once_and_none_is_missing():
    keys = Counter((row["table"], row["row"], row["data"], row["metric"]) for row in ROWS)
    assert set(keys.values()) == {1}
    assert len(ROWS) == sum(rows * columns for rows, columns in SHAPES.values())
    assert list(dict.fromkeys(row["table"] for row in ROWS)) == list(SHAPES)
    for table, (rows, columns) in SHAPES.items():
        # Every row has every column.
        cells = [key[1:] for key in keys if key[0] == table]
        assert len({name for name, *_ in cells}) == rows, table
        assert len({tuple(column) for _, *column in cells}) == columns, table
        assert len(cells) == rows * columns, table


def test_dice_scores_fit_their_ious():
    means = defaultdict(dict)
    for row in ROWS:
        means[row["table"], row["row"], row["data"]][row["metric"]] = float(row["mean"])
    pairs = [(x["iou"], x["dice"]) for x in means.values() if "dice" in x]
    assert len(pairs) == 101
    for iou, dice in pairs:
        # Of one image, Dice is 2 IoU / (1 + IoU), which is concave: means stay below it.
        assert iou < dice < 200 * iou / (100 + iou) + 0.2


def test_tables_agree_except_for_the_listed_contradictions():
    values = defaultdict(lambda: defaultdict(list))
    for row in ROWS:
        name = SAME.get(row["row"], row["row"])
        name = f"{name} on SAM2" if row["table"] in SAM2 else name
        figure = (row["mean"], row["error"])
        values[name, row["data"], row["metric"]][figure].append(row["table"])
    shared = [found for found in values.values() if sum(map(len, found.values())) > 1]
    assert len(shared) == 170

    for found in values.values():
        # A mean without an error agrees with the same mean with one.
        for mean, error in list(found):
            if not error and any(other == mean and known for other, known in found):
                del found[mean, error]
    assert {key: found for key, found in values.items() if len(found) > 1} == CONTRADICTIONS


def test_the_page_lists_the_same_contradictions():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|") and " ± " in line]
    listed = [re.findall(r"(\d+\.\d) ± (\d+\.\d+)", line) for line in lines]
    assert sorted(map(sorted, listed)) == sorted(map(sorted, CONTRADICTIONS.values()))
