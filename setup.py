"""Makes the package index's page from README.md: there, links and pictures of the repository lead nowhere.

Everything else stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
without_pictures = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)", "", readme)
setup(
    long_description=re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", without_pictures),
    long_description_content_type="text/markdown",
)
