"""What the pages need to be a site: the repository's files, its addresses, links to the reference.

The pages are written to be read in the repository as well. There, a link such as
`../examples/README.md` leads to a file. The site has only the pages, so that here

- a link to a file that a page of the site shows leads to that page;
- a link to any other file of the repository leads to the repository's address, `repo_url`;
- `<!-- README.md: A heading -->` is replaced by that section, and `<!-- CHANGELOG.md -->` by all of
  that file, so that no text is kept twice. The line below the comment is replaced as well: in the
  repository it says where the text is;
- a line below `<!-- in the repository alone -->` is left out;
- a public name in backticks leads to its place in the reference.

What is missing is a warning, and so an error of a strict build.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.pages")

ROOT = Path(__file__).parents[2]
SHOWN_BY = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
CODE = r"```.*?```|`[^`\n]*`"
LINK = r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]*)(#[^)\s]*)?\)"
LINK_OR_CODE = re.compile(rf"{LINK}|{CODE}", re.DOTALL)
LINK_OR_CODE_OR_HEADING = re.compile(rf"{LINK}|^#.*?$|{CODE}", re.DOTALL | re.MULTILINE)
INCLUDED = re.compile(r"^<!-- ([\w.]+)(?:: (.+?))? -->\n.+$", re.MULTILINE)
ALONE = re.compile(r"^<!-- in the repository alone -->\n.+\n", re.MULTILINE)
REFERENCE = re.compile(r"^::: renyi_kd\.(\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page as the site shows it."""
    markdown = ALONE.sub("", markdown)
    markdown = INCLUDED.sub(lambda found: included(*found.groups(), page=page), markdown)
    return with_reference(with_links(markdown, page, config, files))


def included(name: str, heading: str | None, page: Page) -> str:
    """Return a file of the repository's top level or one of its sections, linked from `docs`."""
    text = (ROOT / name).read_text()
    if heading is not None:
        pattern = rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)"
        section = re.search(pattern, text, re.MULTILINE | re.DOTALL)
        if section is None:
            log.warning("%s: %s has no section '%s'", page.file.src_uri, name, heading)
            return ""
        text = section[1].strip()

    def from_docs(image: str, words: str, path: str, anchor: str) -> str:
        if path and "://" not in path:
            path = os.path.relpath(ROOT / path, ROOT / "docs")
        return f"{image}{words}({path}{anchor})"

    return change_links(text, from_docs)


def with_links(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with links that lead somewhere on the site, too."""
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def on_the_site(image: str, words: str, path: str, anchor: str) -> str:
        target = (folder / path).resolve()
        if not path or "://" in path or target.is_relative_to(docs):
            return f"{image}{words}({path}{anchor})"
        if not target.exists() or not target.is_relative_to(ROOT):
            log.warning("%s: the link to %s leads nowhere", page.file.src_uri, path)
            return words
        name = target.relative_to(ROOT).as_posix()
        if image:
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(target)))
            return f"!{words}({os.path.relpath(docs / name, folder)})"
        if name in SHOWN_BY:
            return f"{words}({os.path.relpath(docs / SHOWN_BY[name], folder)}{anchor})"
        kind = "tree" if target.is_dir() else "blob"
        return f"{words}({config.repo_url}/{kind}/main/{name}{anchor})"

    return change_links(markdown, on_the_site)


def with_reference(markdown: str) -> str:
    """Return the page with its mentions of public names as links to the reference."""
    names = set(REFERENCE.findall("".join(map(Path.read_text, ROOT.glob("docs/reference/*.md")))))

    def linked(found: re.Match[str]) -> str:
        name = found[0].strip("`")
        return f"[`{name}`][renyi_kd.{name}]" if name in names else found[0]

    return LINK_OR_CODE_OR_HEADING.sub(linked, markdown)


def change_links(markdown: str, change: Callable[[str, str, str, str], str]) -> str:
    """Return the text with its links changed: `!` of an image, words in brackets, path, anchor."""

    def changed(found: re.Match[str]) -> str:
        is_link = found[2] is not None
        return change(*found.groups(default="")) if is_link else found[0]

    return LINK_OR_CODE.sub(changed, markdown)
