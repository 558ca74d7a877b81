"""Makes faults in the core, one line each, and shows which of them no test notices.

Run as `python tests/mutations.py`; it takes about half an hour. The faults are drawn from the
syntax trees with a fixed seed, at least one in each file that computes anything. Against each, in
a copy of the repository, the fast tests of the core run until one fails.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# The tests of a fault's own part of the library come first.
TESTS = {
    "_triton": "tests/test_triton.py",
    "infosam": "tests/infosam",
    "information": "tests/information",
    "": "tests/test_house.py tests/test_precision.py",
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
# The order of their arguments does not matter, or makes a program that cannot run at all.
SYMMETRIC = {"max", "min", "zip", "isinstance", "getattr", "hasattr", "compute_dtype"}


class Fault(NamedTuple):
    """A node of a file, and what takes its place."""

    file: str
    kind: str
    node: ast.expr
    fault: ast.expr


def faults_of(node: ast.expr, modules: set[str]) -> Iterator[tuple[str, ast.expr]]:
    """Every fault of a single node, and its kind; `modules` are the names that were imported."""
    fault = copy.deepcopy(node)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        fault.op = OPERATORS[type(node.op)]()
        yield "operator", fault
        if isinstance(node.op, ast.Add | ast.Sub):
            yield "dropped term", node.left
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        fault.value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", fault
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        fault.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield "comparison", fault
    elif isinstance(node, ast.BoolOp):
        fault.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield "comparison", fault
    elif isinstance(node, ast.Call):
        function, is_method = ast.unparse(node.func), False
        if isinstance(node.func, ast.Attribute):
            is_method = ast.unparse(node.func.value).split(".")[0] not in modules
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if len(node.args) > 1 and not starred and function not in SYMMETRIC:
            fault.args[:2] = reversed(fault.args[:2])
            yield "argument order", fault
        if is_method and function.split(".")[0] != "self":
            yield "dropped call", node.func.value
        elif len(node.args) == 1 and not starred and function not in ("len", "range", "list"):
            yield "dropped call", node.args[0]


def expressions(tree: ast.AST) -> Iterator[ast.expr]:
    """Every expression that computes: no annotations, decorators, messages, or strict zips."""
    skipped = {"annotation", "returns", "decorator_list", "exc"}
    if isinstance(tree, ast.keyword) and tree.arg == "strict":
        return
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            computes = isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr)
            if computes and name not in skipped:
                yield from expressions(child)
    if isinstance(tree, ast.expr):
        yield tree


def draw(count: int, seed: int) -> list[Fault]:
    """One fault of each file, then of all files: first a kind, then one of its places."""
    generator = random.Random(seed)
    files: dict[str, list[Fault]] = {}
    for path in sorted(ROOT.glob("renyi_kd/**/*.py")):
        name = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.asname or alias.name for node in imports for alias in node.names}
        found = [
            Fault(name, kind, node, fault)
            for node in expressions(tree)
            if node.lineno == node.end_lineno
            for kind, fault in faults_of(node, modules)
            if ast.unparse(fault) != ast.unparse(node)
        ]
        if found:
            files[name] = found
    chosen = [generator.choice(found) for found in files.values()]
    kinds: dict[str, list[Fault]] = {}
    for fault in (fault for found in files.values() for fault in found if fault not in chosen):
        kinds.setdefault(fault.kind, []).append(fault)
    while len(chosen) < count:
        places = kinds[generator.choice(sorted(kind for kind in kinds if kinds[kind]))]
        chosen.append(places.pop(generator.randrange(len(places))))
    return chosen


def apply(fault: Fault, root: Path) -> tuple[str, str]:
    """Write the file with the fault; return its line before and after."""
    lines = (ROOT / fault.file).read_text().splitlines(keepends=True)
    at, node = fault.node.lineno - 1, fault.node
    before = lines[at].encode()
    replaced = f"({ast.unparse(fault.fault)})".encode()
    lines[at] = (before[: node.col_offset] + replaced + before[node.end_col_offset :]).decode()
    (root / fault.file).write_text("".join(lines))
    return before.decode().strip(), lines[at].strip()


def first_failure(root: Path, file: str) -> str:
    """The test that fails first against a fault in this file; nothing if all pass."""
    own_first = sorted(TESTS, key=lambda part: part not in file)
    tests = [path for part in own_first for path in TESTS[part].split()]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if done.returncode == 0 else (failures or ["import"])[0]


def main() -> None:
    """Print a row for each fault, and how many of them nothing noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    survivors, faults = 0, draw(options.count, options.seed)
    print("| file | line | kind | before | after | noticed by |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "results", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, root, ignore=ignored)
        if failed := first_failure(root, ""):
            sys.exit(f"Without any fault: {failed}")
        for fault in faults:
            before, after = apply(fault, root)
            found = first_failure(root, fault.file)
            survivors += not found
            shutil.copy(ROOT / fault.file, root / fault.file)
            test = found.split(" ")[1].split("[")[0].split("/")[-1] if " " in found else found
            cells = fault.file, str(fault.node.lineno), fault.kind, f"`{before}`", f"`{after}`"
            escaped = (cell.replace("|", "\\|") for cell in cells)
            print(f"| {' | '.join(escaped)} | {test or '**nothing**'} |", flush=True)
    print(f"\n{survivors} of {len(faults)} survive, seed {options.seed}.")


if __name__ == "__main__":
    main()
