"""What the files around the library say of it is true, and the same everywhere."""

import ast
import re
import runpy
from configparser import ConfigParser
from pathlib import Path

import pytest

import renyi_kd

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
RELEASE = (ROOT / ".ci/release").read_text(encoding="utf-8")
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


def lines(section: str, name: str) -> list[str]:
    return CONFIG[section][name].split("\n")[1:]


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [renyi_kd.__version__]
    newest = re.findall(r"^## (\d+\.\S+)", changelog, flags=re.MULTILINE)[0]
    assert newest == renyi_kd.__version__


def test_the_citation_is_that_of_the_readme_and_of_the_metadata():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for field, name in (("license", "license_expression"), ("repository-code", "url")):
        assert f"\n{field}: {CONFIG['metadata'][name]}\n" in citation
    bibtex = re.search(r"author    = \{(.*)\}", README)[1]
    families = re.findall(r"family-names: (.+)\n +given-names: (.+)", citation)
    assert [", ".join(author) for author in families] == bibtex.split(" and ")
    title = re.search(r"title     = \{(.*)\}", README)[1]
    assert f'title: "{re.sub("[{}]", "", title)}"' in citation


def test_every_link_of_the_index_page_leads_to_a_file_of_this_version():
    absolute = runpy.run_path(str(ROOT / "setup.py"))["with_absolute_links"]
    page = absolute(README, "https://host/library", "1.2")
    # Without code, and with it: what looks like a link there must stay as it is.
    assert re.findall(r"```.*?```", page, re.DOTALL) == re.findall(r"```.*?```", README, re.DOTALL)
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    ours = 0
    for picture, link in links:
        found = re.fullmatch(r"https://host/library/(raw|blob)/v1\.2/([^#]+)(#.*)?", link)
        if found is None:
            assert link.startswith("https://"), link
            continue
        ours += 1
        assert found[1] == ("raw" if picture else "blob")
        assert (ROOT / found[2]).is_file(), link
    assert ours > 20


def test_every_requirement_has_a_lowest_version():
    # The lowest ones are tested, and without a bound that would be the first ever released.
    requirements = lines("options", "install_requires")
    for extra in CONFIG["options.extras_require"]:
        requirements += lines("options.extras_require", extra)
    for requirement in requirements:
        assert re.search("[>=]=|^renyi_kd", requirement), requirement


def test_the_oldest_python_is_tested():
    oldest = CONFIG["options"]["python_requires"].removeprefix(">=")
    classifier = "Programming Language :: Python :: 3."
    versions = [line for line in lines("metadata", "classifiers") if line.startswith(classifier)]
    assert versions[0].endswith(f":: {oldest}")
    assert f"--python {oldest} " in RELEASE
    job = CI.split("\n  oldest:\n")[1].split("\n\n")[0]
    assert f'python-version: "{oldest}"' in job
    assert "--resolution lowest-direct" in job
    newest = CI.split("\n  newest:\n")[1].split("\n\n")[0]
    assert f'python-version: "{versions[-1].split()[-1]}"' in newest


@pytest.mark.parametrize("job", ["newest", "oldest"])
def test_the_workflow_tests_as_the_readme_does(job):
    command = re.search(r"\.venv/bin/(python -m pytest .*)", README)[1]
    assert f"- run: {command}\n" in CI.split(f"\n  {job}:\n")[1].split("\n\n")[0] + "\n"


def test_each_tool_has_one_version():
    (ruff,) = (line for line in lines("options.extras_require", "dev") if line.startswith("ruff"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{ruff.removeprefix('ruff==')}\n" in hooks


def test_every_python_block_of_the_readme_is_walked_through_before_a_release():
    with_python = {
        section.split("\n")[0] for section in README.split("\n## ")[1:] if "```python" in section
    }
    assert set(re.findall(r"README\.md \"(.+)\"", RELEASE)) == with_python


def test_no_pickle_is_executed_and_security_names_every_place():
    named = re.findall(r"^\| \[`(.+)`\]", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    found = set()
    for folder in ("renyi_kd", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) (pickle|dill|joblib)\b", text, re.MULTILINE)
            if "torch.load" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                    assert options.get("weights_only") == "True", f"{path}:{node.lineno}"
                    found.add(path.relative_to(ROOT).as_posix())
    assert sorted(named) == sorted(found)
