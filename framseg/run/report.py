"""One HTML file of a whole run: its executed notebooks in order, behind a table of contents.

The file needs no other file and no network: pictures are inside, scripts are left out, and formulas are drawn by
matplotlib (a formula that it does not understand stays TeX).
"""

import base64
import html
import io
import re
from datetime import datetime
from pathlib import Path

import jinja2
import matplotlib as mpl
import nbformat
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from framseg import config
from framseg.jsonl import whole_file
from framseg.run import stamps
from framseg.run.paths import Run

TEMPLATE = Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8")
FRONT = Path(__file__).with_name("report_front.html.j2").read_text(encoding="utf-8")
WIDGET = "<p><em>A widget, which needs a running notebook: open the chapter in JupyterLab.</em></p>"
MATH = re.compile(r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)*)\$", re.DOTALL)


def write(profile: config.Profile, run: Run) -> None:
    """Write `run.report` from the executed copies in `run.notebooks`, naming those that cannot be read."""
    cells: list[NotebookNode] = []
    headings: list[dict] = []
    chapters: list[tuple[str, ...]] = []  # rows of a table
    for path in sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
            record = notebook.metadata.get("papermill", {})
            seconds, began = record.get("duration"), record.get("start_time")
            state = "failed" if record.get("exception") else f"{seconds:.0f} s" if seconds else "unfinished"
            began = f"{datetime.fromisoformat(began).astimezone():%Y-%m-%d %H:%M}" if began else "–"
        except Exception as error:  # nbformat's errors for damaged files have no common base
            reason = html.escape(str(error))
            cells.append(new_markdown_cell(f"# {path.stem}\n\nThe executed copy cannot be read: {reason}"))
            continue
        chapters.append((path.stem, began, state, stamps.read(path).get("device", "–")))
        for cell in notebook.cells:
            cell.id = f"{path.stem[:2]}-{cell.id}"
            headings += _prepared(cell)
            cells.append(cell)
    title, settings = f"framseg, profile {profile.name}", run.profile.read_text(encoding="utf-8")
    told = {"title": title, "headings": headings, "chapters": chapters, "settings": settings}
    front = jinja2.Template(FRONT, autoescape=True).render(told)
    whole = new_notebook(cells=[new_markdown_cell(front, id="front"), *cells], metadata={"title": title})
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_anchor_links=True, embed_images=True)
    page, _ = exporter.from_notebook_node(whole)
    with whole_file(run.report) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _prepared(cell: NotebookNode) -> list[dict]:
    """Draw the cell's formulas, replace its widgets by a sentence; returns its headings # and ##."""
    for output in list(cell.get("outputs", [])):
        data = output.get("data", {})
        if data.pop("application/vnd.jupyter.widget-view+json", None):
            data["text/html"] = WIDGET
            if "%|" in data.get("text/plain", ""):  # a progress bar
                cell.outputs.remove(output)
    if cell.cell_type != "markdown":
        return []
    headings = re.findall(r"^(##?) (.+)$", cell.source, re.MULTILINE)
    cell.source = MATH.sub(_drawn, cell.source)
    return [{"marks": marks, "text": text, "cell": cell.id} for marks, text in headings]


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
