"""_docs/index.html from the outputs stored in the notebooks: nbdev describes what is exported, Sphinx makes the pages.

Both live in nbs/_pages because nbdev passes over what begins with an underscore.
"""

import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastcore.docments
import nbformat
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "degrade",
    "metrics",
    "models",
    "data",
    "train",
    "restore",
    "evaluate",
    "registry",
    "monitor",
    "serve",
    "batch",
    "jobs",
    "cli",
)


def signature(function, eval_str=False):
    "inspect.signature, in which annotations that only a type checker can resolve stay text."
    try:
        return inspect.signature(function, eval_str=eval_str)
    except NameError:
        return inspect.signature(function)


fastcore.docments.signature = signature  # nbdev offers no way to keep such annotations; it fails on them


def exported(notebook):
    "For each name that a notebook exports, the cell that defines it."
    cells = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if re.match(r"#\s*\|\s*export", source):
            code = re.sub(r"^#\s*\|.*\n", "", source, flags=re.M).strip()
            cells.update(dict.fromkeys(re.findall(r"^(?:async )?(?:def|class) (\w+)", code, re.M), code))
    return cells


def name(cell):
    found = re.search(r"^show_doc\(([\w.]+)", cell.source, re.M)
    return found and found[1]


def described(cell, code=""):
    "nbdev's description of an exported name as Markdown; for a class, its own class line instead of the constructor."
    text = "".join(next(out["data"]["text/markdown"] for out in cell.outputs if "text/markdown" in out.get("data", {})))
    text = re.sub(r"\A---\n|\[source\]\(.*?\)\{.*?\}", "", text)
    text = re.sub(r"### (\S+)", r"### `\1`", text)
    before, signature, after = re.split(r"```python\s+(.*?)\s+```", text, maxsplit=1, flags=re.S)
    signature = re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", signature)
    if line := re.search(rf"^class {name(cell)}\b.*:$", code, re.M):
        signature = (
            line[0]
            if "VAR_POSITIONAL" in signature
            else re.sub(r"\Adef (.*)\)(->None)?:\Z", r"class \1):", signature, flags=re.S)
        )
    return f"{before.strip()}\n\n```python\n{signature}\n```\n\n{after.strip()}"


def converted(cell):
    "One cell, from what nbdev writes for Quarto to what MyST reads."
    if cell.cell_type == "raw":
        front = yaml.safe_load(cell.source.strip().strip("-"))
        return nbformat.v4.new_markdown_cell(f"# {front['title']}\n\n*{front.get('description', '')}*")
    if name(cell):
        return nbformat.v4.new_markdown_cell(described(cell))
    if re.search(r"^#\s*\|\s*echo:\s*false", cell.source, re.M):
        cell.metadata.tags = ["remove-input"]
    cell.source = re.sub(r"^#\s*\|.*\n?|<!-- WARNING.*", "", cell.source, flags=re.M)
    return cell


def folded(cells):
    "What all lessons share, before the first section, is opened by a click; cells side by side become one."
    first, kept = next((i for i, cell in enumerate(cells) if cell.source.startswith("## ")), 0), []
    for cell in cells[:first]:
        if cell.cell_type == "code" and not cell.outputs:
            cell.metadata.tags = ["hide-input"]
            if kept[-1].cell_type == "code":
                cell.source = kept.pop().source + "\n\n" + cell.source
        kept.append(cell)
    return kept + cells[first:]


def contents(page):
    "The hidden table of contents of an index page: the packages in reading order, or the modules of a package."
    if page.parent.name == "_proc":
        groups = (
            [("Pictures and files", ["[0-9]*"])]
            + [("Packages", [f"{name}/index" for name in PACKAGES])]
            + [("Studies", ["studies/*"]), ("Project", ["security", "contributing"])]
        )
    else:
        groups = [("Modules", ["[0-9]*"])]
    return "\n\n".join(
        "```{toctree}\n:hidden:\n:glob:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```"
        for caption, pages in groups
    )


def prepare(page, sources, homes):
    "Rewrite a page: descriptions in source order, the source itself folded, and links to local pages."
    nb, cells = nbformat.read(page, 4), []
    for code, group in itertools.groupby(nb.cells, key=lambda cell: sources.get(name(cell))):
        if code:
            fold = f"<details><summary>Source</summary>\n\n```python\n{code}\n```\n\n</details>"
            cells.append(
                nbformat.v4.new_markdown_cell("\n\n".join([described(cell, code) for cell in group][::-1] + [fold]))
            )
        else:
            cells += [converted(cell) for cell in group]
    cells = folded(cells)
    host = re.escape(get_config().doc_host + get_config().doc_baseurl)

    def local(link):
        anchor = link[2].split(".")[0]  # a method stands with its class, a private name on its page
        return os.path.relpath(homes[link[1]], page.parent) + ("" if anchor.startswith("#_") else anchor)

    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(?m)^(#.*?)\[(`[^`]+`)\]\([^)]*\)", r"\1\2", cell.source)
            cell.source = re.sub(host + r"([\w/]+)\.html(#[\w.]*|)", local, cell.source)
    if page.stem == "index":
        cells.append(nbformat.v4.new_markdown_cell(contents(page)))
    nb.cells, nb.metadata = cells, {"kernelspec": nb.metadata.kernelspec, "language_info": {"name": "python"}}
    nbformat.write(nb, page)


def main():
    proc = proc_nbs(force=True, n_workers=os.cpu_count())
    pages = sorted(proc.glob("**/*.ipynb"))
    # nbdev links to a notebook by its path without the numbers that order the reading
    homes = {re.sub(r"(^|/)\d+_", r"\1", str(page.relative_to(proc).with_suffix(""))): page for page in pages}
    for page in pages:
        prepare(page, exported(ROOT / "nbs" / page.relative_to(proc)), homes)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-d",
            proc / ".doctrees",
            "-c",
            Path(__file__).parent,
            proc,
            ROOT / "_docs",
        ],
        check=True,
    )
    shutil.rmtree(ROOT / "jupyter_execute", ignore_errors=True)  # myst-nb's copies of the outputs, beside the pages
    print(f"{ROOT}/_docs/index.html")


if __name__ == "__main__":
    main()
