"""Imports inside the library run downwards, in the order in which each wing names its files."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import renyi_kd

ROOT = Path(renyi_kd.__file__).parent
GROUND_FLOOR = ["_checks", "_precision", "_autograd"]


def files_in_order(package: str) -> list[str]:
    """The files that a package's docstring names, with those of a subpackage in its place."""
    folder = ROOT / package.replace(".", "/")
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    without_remarks = re.sub(r"\(.*?\)", "", docstring, flags=re.DOTALL)
    (names,) = re.findall(r":\s+((?:\w+\s*,\s+)+\w+)\s*\.", without_remarks)
    names = re.split(r"\s*,\s+", names)
    there = {path.stem for path in folder.iterdir() if path.stem[:2] != "__"}
    assert sorted(names) == sorted(there), package
    modules = []
    for name in (f"{package}.{name}" for name in names):
        is_package = (ROOT / name.replace(".", "/")).is_dir()
        modules += files_in_order(name) if is_package else [name]
    return modules


def imports_of(module: str) -> set[str]:
    """The modules of the library that one imports, without the prefix `renyi_kd.`."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: relative import"
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name.removeprefix("renyi_kd.") for name in found if name.startswith("renyi_kd.")}


KERNELS = files_in_order("_triton")
ORDER = [*GROUND_FLOOR, *files_in_order("information"), *files_in_order("infosam"), *KERNELS]


def test_every_file_has_its_place():
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__")} == set(ORDER)


def test_each_file_imports_only_those_before_it():
    for place, module in enumerate(ORDER):
        later = imports_of(module) & set(ORDER[place:])
        assert not later, f"{module} imports {later}"


def test_information_knows_nothing_of_the_loss():
    for module in ORDER:
        if module.startswith("information."):
            assert not any(name.startswith("infosam") for name in imports_of(module)), module


def test_the_loss_asks_information_for_entropies_and_inner_products_alone():
    asked = {
        name
        for module in ORDER
        if module.startswith("infosam.")
        for name in imports_of(module) & set(ORDER)
        if name.startswith("information.")
    }
    assert asked == {"information.kernels", "information.products", "information.routes.choice"}


def test_only_the_package_itself_imports_the_kernels():
    for module in set(ORDER) - set(KERNELS):
        assert not imports_of(module) & {"_triton", *KERNELS}, module
    assert ("renyi_kd._triton" in sys.modules) == (find_spec("triton") is not None)
    served = set.union(*map(imports_of, KERNELS)) & set(ORDER) - set(KERNELS)
    assert {name.split(".")[0] for name in served} == {"information", "infosam"}


def test_the_library_imports_without_triton_and_without_a_warning():
    code = "import sys; sys.modules['triton'] = None; import renyi_kd; "
    code += "assert 'renyi_kd._triton' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_library_imports_without_setuptools_and_without_a_warning():
    code = "import sys; sys.modules['setuptools'] = None; import renyi_kd"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_library_imports_without_numpy_and_without_a_warning():
    code = "import sys; sys.modules['numpy'] = None; import renyi_kd, torch; "
    code += "renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(torch.ones(3, 2)), 3)"
    # Triton's interpreter is the one part that needs it.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, env=environment)


def test_the_core_imports_torch_and_einops_alone():
    for module in set(ORDER) - set(KERNELS):
        allowed = {"renyi_kd", "torch", "einops"}
        if module == "infosam.hub":  # it imports them when they are first needed, see test_hub
            allowed |= {"huggingface_hub", "safetensors"}
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            packages = {name.split(".")[0] for name in names}
            assert packages <= allowed | sys.stdlib_module_names, module


def test_every_public_name_is_importable_from_the_package():
    of_wings = {*renyi_kd.information.__all__, *renyi_kd.infosam.__all__}
    assert set(renyi_kd.__all__) == of_wings
    assert all(hasattr(renyi_kd, name) for name in renyi_kd.__all__)
