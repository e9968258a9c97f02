"""README.md, CONTRIBUTING.md and SECURITY.md from nbs/index, contributing and security.ipynb.

Cells with `#| hide` are left out; of cells with `#| echo: false` only the output is shown.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]


def readme(notebook):
    "The Markdown of a notebook in nbs/, with its relative links made right for the folder above."
    page = nbformat.read(notebook, 4)
    page.metadata.language_info = {"name": "python"}
    page.cells = [cell for cell in page.cells if not re.match(r"#\s*\|\s*hide\b", cell.source)]
    for cell in page.cells:
        if re.search(r"^#\s*\|\s*echo:\s*false", cell.source, re.M):
            cell.metadata.transient = {"remove_source": True}
        cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
    body, _ = MarkdownExporter().from_notebook_node(page)
    above = lambda link: link[1] + posixpath.normpath("nbs/" + link[2])  # noqa: E731
    body = re.sub(r"""(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"\s]+)""", above, body)
    body = body.replace("nbs/contributing.ipynb", "CONTRIBUTING.md")
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    for page, file in (("index", "README.md"), ("contributing", "CONTRIBUTING.md"), ("security", "SECURITY.md")):
        (ROOT / file).write_text(readme(ROOT / f"nbs/{page}.ipynb"))
