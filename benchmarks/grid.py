"""Many trainings of the fine-tuning programs: what is missing runs, and leaves a row of a table.

A `Run` is a command of a program in `examples/finetuning`, and what is then asked of it by
`evaluate.py`. `run_missing` trains and evaluates what `runs.csv` lacks, several side by side. After
it was stopped or killed, the same call goes on: trainings from their last checkpoint, evaluations
from the last whole one. Tables and figures are made from `runs.csv` alone. To train a run anew,
remove its row, and its folder in `runs` if there is one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetuning"))

from parts.data.tables import read_tables
from parts.errors import InputError
from parts.files import digest, locked, read_json, replace, replace_json
from parts.options import number, whole

FINETUNING = Path(__file__).parents[1] / "examples" / "finetuning"
MADE_OF = "made_of.json"
tables_of = cache(read_tables)  # many runs are planned on the same data set
Cells = dict[str, str]  # of a row of the table, by the names of the columns


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a trained run.

    Attributes:
        name: What the columns of its scores start with.
        arguments: Those of `evaluate.py` beside the run and `--output`.
    """

    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A training and its evaluations.

    Attributes:
        name: The name of its folder, which no other run has.
        labels: What tells it from others, in columns of the table.
        program: The program that trains.
        arguments: Those of the program beside `--output`.
        evaluations: What is asked of it.
        steps: How many steps it trains.
        needs: Names of the runs that must be finished before, as it reads their folders.
        through: A program that runs the others, and adds something to them.
    """

    name: str
    labels: dict[str, str]
    program: str
    arguments: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    steps: int
    needs: tuple[str, ...] = ()
    through: tuple[str, ...] = ()


class Grid:
    """The folder of many runs.

    Args:
        output: The folder. It holds `runs.csv`, `made_of.json`, and a folder for each of trainings,
            scores and logs.
        threads: Threads of each training. By default PyTorch's own choice.
        discard: Whether to remove the weights of a run once its scores are in the table.
    """

    def __init__(self, output: Path, threads: int | None = None, *, discard: bool = False) -> None:
        self.output, self.threads, self.discard = output, threads, discard
        self.table = output / "runs.csv"

    def folder(self, name: str) -> Path:
        """Return where a run trains."""
        return self.output / "runs" / name

    def rows(self) -> dict[str, Cells]:
        """Return the rows of the table by the names of their runs."""
        rows = read_table(self.table)
        if rows and not {"name", "seconds", "steps"} <= rows[0].keys():
            raise InputError(f"{self.table} is damaged, it has no column name, seconds or steps")
        return {row["name"]: row for row in rows}

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs that the table has no row of."""
        found = self.rows()
        return [*{run.name: run for run in runs if run.name not in found}.values()]

    def commands(self, run: Run) -> list[list[str]]:
        """Return the commands of a run: the training, and one for each evaluation."""
        folder = self.folder(run.name)
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        train = [run.program, *run.arguments, *threads, "--output", str(folder)]
        found = [train]
        for evaluation in run.evaluations:
            place = self.output / "scores" / run.name / evaluation.name
            asked = ["evaluate.py", str(folder), *evaluation.arguments, "--output", str(place)]
            found.append(asked)
        return [[*run.through, str(FINETUNING / name), *others] for name, *others in found]

    def left(self, run: Run) -> list[list[str]]:
        """Return the commands of a run that have not been done, as they go on after a kill."""
        folder = self.folder(run.name)
        train, *evaluations = self.commands(run)
        found = [asked for asked in evaluations if not Path(asked[-1]).exists()]
        if not (folder / "result.json").exists():
            begun = (folder / "options.json").exists()
            found.insert(0, [*train, *(["--resume"] if begun else [])])
        return found

    def check(self, made_of: Mapping[str, str]) -> dict[str, str]:
        """Return what all runs of the folder are made of: names and digests, and these as well.

        Raises:
            InputError: If the folder was made of others.
        """
        path = self.output / MADE_OF
        before = read_json(path) if path.exists() else {}
        wrong = [name for name, digest in made_of.items() if before.get(name, digest) != digest]
        if wrong:
            raise InputError(
                f"{self.output} was made with another {wrong[0]}; name another --output for this"
            )
        return before | dict(made_of)

    def run_missing(
        self, runs: Sequence[Run], jobs: int = 1, made_of: Mapping[str, str] | None = None
    ) -> None:
        """Train and evaluate what the table lacks, `jobs` at a time.

        Args:
            runs: The runs.
            jobs: How many run at the same time.
            made_of: Digests of what the runs read, by names. A folder keeps to what it was made of.

        Raises:
            InputError: If a run failed, after all others are done; if it was interrupted; if
                another process is at work in the folder; or if it was made of something else.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        failed: list[str] = []
        with locked(self.output / "grid.lock"):
            replace_json(self.output / MADE_OF, self.check(made_of or {}))
            for waiting in in_order(self.missing(runs), self.rows()):
                pool = ThreadPoolExecutor(jobs)
                futures = {pool.submit(self.run_one, run): run for run in waiting}
                try:
                    for done, future in enumerate(as_completed(futures), 1):
                        problem = future.result()
                        name = futures[future].name
                        print(f"{done} of {len(waiting)}: {name}{problem and f': {problem}'}")
                        if problem:
                            failed.append(name)
                        else:
                            self.note(futures[future])
                except KeyboardInterrupt:
                    raise InputError("interrupted; the same command goes on") from None
                finally:  # whatever happens, nothing new is started
                    pool.shutdown(cancel_futures=True)
        if failed:
            raise InputError(f"{len(failed)} runs failed, see {self.output / 'logs'}: {failed[0]}")

    def run_one(self, run: Run) -> str:
        """Do what is left of a run; return what went wrong, or an empty text."""
        if not (self.folder(run.name) / "result.json").exists():  # the scores are of an earlier one
            shutil.rmtree(self.output / "scores" / run.name, ignore_errors=True)
        left = self.left(run)
        log = self.output / "logs" / f"{run.name}.txt"
        log.parent.mkdir(exist_ok=True)
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        began = time.perf_counter()
        asked = [sys.executable, __file__, json.dumps(left)]
        # The pipe closes with this process, however that ends, and the other then ends as well.
        with (
            log.open("a") as file,
            subprocess.Popen(
                asked, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment
            ) as child,
        ):
            status = child.wait()
        if status:
            lines = log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else f"exit status {status}"
        if left and left == self.commands(run):  # else the time is that of a part
            (self.output / "scores" / run.name / "seconds").write_text(
                f"{time.perf_counter() - began:.1f}"
            )
        return ""

    def note(self, run: Run) -> None:
        """Add the row of a finished run to the table."""
        folder, scores = self.folder(run.name), self.output / "scores" / run.name
        best = read_json(folder / "result.json")["validation"]
        row = {"name": run.name, **run.labels, "steps": str(run.steps)}
        seconds = scores / "seconds"
        row["seconds"] = seconds.read_text() if seconds.exists() else ""
        row |= {"epoch": str(best["epoch"]), "validation_iou": f"{best['iou']:.5f}"}
        for evaluation in run.evaluations:
            found = read_json(scores / evaluation.name / "scores.json")["runs"]
            for model, values in found.items():
                variant = model.removeprefix(str(folder)).strip()
                prefix = "/".join(filter(None, (evaluation.name, variant)))
                row |= {f"{prefix}/{name}": f"{value:.5f}" for name, value in values.items()}
        write_table(self.table, [*self.rows().values(), row])
        if self.discard:
            shutil.rmtree(folder)

    def plan(self, runs: Sequence[Run], jobs: int, seconds_per_step: float | None) -> str:
        """Return how many runs there are, how many are missing, and how long they will take."""
        missing = self.missing(runs)
        steps = sum(run.steps for run in missing)
        text = f"{len(runs)} runs, {len(missing)} missing, with {steps:,} steps"
        timed = [row for row in self.rows().values() if row["seconds"]]
        if seconds_per_step is None and timed:
            seconds_per_step = mean(
                number_in(row, "seconds", self.table) / number_in(row, "steps", self.table)
                for row in timed
            )
            text += f"; {seconds_per_step:.2f} s a step in {len(timed)} finished runs"
        if seconds_per_step is None:
            return f"{text}; how long they take is known once one is finished"
        hours = steps * seconds_per_step / jobs / 3600
        return f"{text}; about {hours:.1f} hours, {jobs} at a time"


def in_order(runs: Sequence[Run], finished: Iterable[str]) -> Iterable[list[Run]]:
    """Yield the runs in groups, each of which needs nothing but what is finished before."""
    done, waiting = set(finished), list(runs)
    while waiting:
        ready = [run for run in waiting if done.issuperset(run.needs)]
        if not ready:
            raise InputError(f"{waiting[0].name} needs {', '.join(waiting[0].needs)}, not planned")
        yield ready
        done.update(run.name for run in ready)
        waiting = [run for run in waiting if run not in ready]


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add how many runs there are at a time, and what is only to be said of them."""
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at the same time")
    parser.add_argument("--threads", type=whole(1), help="of each run")
    parser.add_argument("--dry-run", action="store_true", help="list and count the runs")
    above_zero = number(0, exclusive=True)
    parser.add_argument("--seconds-per-step", type=above_zero, help="to estimate the time by")
    parser.add_argument("--show", metavar="NAME", help="print the commands of one of the runs")


def digest_of_file(path: Path, option: str) -> str:
    """Return a name for the content of a file that an option names.

    Raises:
        InputError: If there is no such file.
    """
    if not path.is_file():
        raise InputError(f"{option} must be a file, got {path}")
    return digest(path)


def digest_of_tables(folder: Path) -> str:
    """Return a name for the content of all tables of a data set."""
    return "".join(digest(path)[:16] for path in sorted(folder.glob("*.csv")))


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    program = os.path.relpath(command[0])
    return shlex.join(["python", program, *command[1:]])


def read_table(path: Path) -> list[Cells]:
    """Return the rows of a table, or none if there is no table.

    Raises:
        InputError: If it is no table, or if a row has more or fewer cells than the first line.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path} is damaged in row {line}; remove that row")
    return rows


def number_in(row: Cells, column: str, table: Path | str) -> float:
    """Return a cell as a number.

    Raises:
        InputError: If it is none.
    """
    try:
        return float(row[column])
    except (KeyError, ValueError):
        found = row.get(column)
        raise InputError(f"{table}: {column} must be a number, got {found!r}") from None


def write_table(path: Path, rows: Sequence[Cells]) -> None:
    """Write a table whole or not at all; what a row lacks of a column is left empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace(path, text.getvalue())


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, and end."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":  # the programs of a run, one after the other in one process
    threading.Thread(target=end_with_parent, daemon=True).start()
    for command in json.loads(sys.argv[1]):
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
