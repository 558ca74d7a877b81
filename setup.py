"""Gives the index page the README with absolute links; setup.cfg holds everything else."""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent


def with_absolute_links(page: str, repository: str, version: str) -> str:
    """Let relative links lead to the files of this version, and its pictures be shown."""
    page = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/v{version}/", page)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{repository}/blob/v{version}/", page)


if __name__ == "__main__":
    from setuptools import setup

    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    library = (ROOT / "renyi_kd" / "__init__.py").read_text(encoding="utf-8")
    setup(
        long_description=with_absolute_links(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            repository=config["metadata"]["url"],
            version=re.search(r'^__version__ = "(.+)"$', library, flags=re.MULTILINE)[1],
        )
    )
