"""One HTML file of a whole run: its executed notebooks in order, behind a table of contents.

The file needs no other file and no network: pictures are inside, scripts are left out, and formulas are drawn by
matplotlib (a formula that it does not understand stays TeX).
"""

import base64
import html
import io
import re
from collections.abc import Iterator
from datetime import datetime

import matplotlib as mpl
import nbformat
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from framseg import config
from framseg.run import stamps
from framseg.run.paths import Run

TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>
body { max-width: 78em; margin: auto }
img.math { display: inline; max-width: 100%; margin: 0 }
img.display { display: block; margin: 1em auto }
nav li { list-style: none }
@media screen and (min-width: 98em) {
  body { margin-left: 20em }
  nav { position: fixed; left: 0; top: 0; bottom: 0; width: 17em; overflow: auto; padding: 1em; font-size: 85% }
}
</style>{% endblock %}
"""
WIDGET = "<p><em>A widget, which needs a running notebook: open the chapter in JupyterLab.</em></p>"
MATH = re.compile(r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)*)\$", re.DOTALL)


def write(profile: config.Profile, run: Run) -> None:
    """Write `run.report` from the executed copies in `run.notebooks`, naming those that cannot be read."""
    cells: list[NotebookNode] = []
    contents: list[str] = []  # list items
    chapters: list[list[str]] = []  # rows of a table
    for path in sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
            state, began = _outcome(notebook.metadata.get("papermill", {}))
        except Exception as error:  # nbformat's errors for damaged files have no common base
            reason = html.escape(str(error))
            cells.append(new_markdown_cell(f"# {path.stem}\n\nThe executed copy cannot be read: {reason}"))
            continue
        chapters.append([path.stem, began, state, stamps.read(path).get("device", "–")])
        for cell in notebook.cells:
            cell.id = f"{path.stem[:2]}-{cell.id}"
            contents += _contents(cell)
            cells.append(_without_kernel(cell))
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in chapters)
    settings = html.escape(run.profile.read_text(encoding="utf-8"))
    title = f"framseg, profile {profile.name}"
    front = [
        f"# {html.escape(title)}",
        f"<nav><b>Contents</b><ul>{''.join(contents)}</ul></nav>",
        f"<table><tr><th>chapter</th><th>began</th><th>took</th><th>on</th></tr>{table}</table>",
        f"<details><summary>All settings</summary><pre>{settings}</pre></details>",
    ]
    whole = new_notebook(cells=[new_markdown_cell("\n\n".join(front), id="front"), *cells], metadata={"title": title})
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_anchor_links=True, embed_images=True)
    page, _ = exporter.from_notebook_node(whole)
    aside = run.report.with_suffix(".part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(run.report)


def _outcome(record: dict) -> tuple[str, str]:
    """How a notebook ended, or its seconds, and when it began, from papermill's record."""
    seconds, began = record.get("duration"), record.get("start_time")
    state = "failed" if record.get("exception") else f"{seconds:.0f} s" if seconds else "unfinished"
    return state, f"{datetime.fromisoformat(began).astimezone():%Y-%m-%d %H:%M}" if began else "–"


def _contents(cell: NotebookNode) -> Iterator[str]:
    """List items for a cell's headings of the first and second level."""
    for marks, text in re.findall(r"^(##?) (.+)$", cell.source if cell.cell_type == "markdown" else "", re.MULTILINE):
        link = f'<a href="#cell-id={cell.id}">{html.escape(text)}</a>'
        yield f"<li>{link}</li>" if len(marks) == 2 else f"<li><b>{link}</b></li>"


def _without_kernel(cell: NotebookNode) -> NotebookNode:
    """The cell with its formulas drawn and its widgets, which need a kernel, replaced by a sentence."""
    if cell.cell_type == "markdown":
        cell.source = MATH.sub(_drawn, cell.source)
    outputs = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if data.pop("application/vnd.jupyter.widget-view+json", None):
            if "%|" in data.get("text/plain", ""):  # a progress bar
                continue
            data["text/html"] = WIDGET
        outputs.append(output)
    if cell.cell_type == "code":
        cell.outputs = outputs
    return cell


def _drawn(match: re.Match) -> str:
    """A formula as an image in HTML, its baseline on the text's."""
    tex = " ".join((match["display"] or match["inline"]).split())
    known = re.sub(r"\\[bB]ig(?![A-Za-z])", "", tex)  # matplotlib's TeX lacks it
    known = re.sub(r"\\sqrt ([A-Za-z])", r"\\sqrt{\1}", known)
    known = (known.replace(r"\frac", r"\dfrac") if match["display"] else known).replace(r"\tfrac", r"\frac")
    out = io.BytesIO()
    try:
        with mpl.rc_context({"mathtext.fontset": "cm", "font.size": 12}):
            below = math_to_image(f"${known}$", out, dpi=72, format="svg")
    except ValueError:
        return f"<code>{html.escape(tex)}</code>"
    kind = "math display" if match["display"] else "math"
    source = base64.b64encode(out.getvalue()).decode()
    style = f"vertical-align: {-below:.1f}pt"
    return f'<img class="{kind}" style="{style}" alt="{html.escape(tex)}" src="data:image/svg+xml;base64,{source}">'
