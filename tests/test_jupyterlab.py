"""The notebooks in a real JupyterLab and a real browser.

What the page looked like on the way is kept in runs/screenshots.
"""

import re
import shutil

import nbformat
import pytest
from lab import CHROMIUM, launched, serve

from framseg import config
from framseg.predictions import read_predictions
from framseg.run import notebooks
from framseg.viz import browser
from framseg.viz.browser import FILTERS

SCREENSHOTS = config.REPOSITORY / "runs" / "screenshots"
PATIENCE = 120_000  # milliseconds

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path; .ci/run installs Debian's")


@pytest.fixture(scope="module")
def lab(chain, tmp_path_factory) -> str:
    """Address, with token, of a JupyterLab whose folder holds the chain's executed notebooks 01 to 04 and 05 as it is
    committed, with the chain's parameters.
    """
    folder = tmp_path_factory.mktemp("lab")
    for path in chain.notebooks.glob("*.ipynb"):
        shutil.copy(path, folder)
    notebook = nbformat.read(notebooks.NOTEBOOKS / "05_figures.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.id == "parameters")
    cell.source += f"\nprofile, run_dir = {str(chain.profile)!r}, {str(chain.root)!r}"
    nbformat.write(notebook, folder / "05_figures.ipynb")

    failed = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# broken")])
    broken.cells += [nbformat.v4.new_code_cell("1", outputs=[failed])]
    nbformat.write(broken, folder / "broken.ipynb")
    with serve(folder, tmp_path_factory.mktemp("jupyter")) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with launched() as opened:
        yield opened


@pytest.fixture
def page(chromium):
    """A page that fails its test for every JavaScript error."""
    opened = chromium.new_page(viewport={"width": 1700, "height": 1100})
    opened.set_default_timeout(PATIENCE)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    opened.close()
    assert not errors


def opened(page, lab: str, name: str):
    """Open a notebook and wait until its cells are shown."""
    page.goto(lab.format(name), timeout=PATIENCE)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_role("main").get_by_role("heading", level=1).first.wait_for()
    return page.locator(".jp-NotebookPanel")


def keep(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def shows_no_error(page) -> None:
    # An error's traceback and what a cell wrote to stderr look the same.
    for text in page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts():
        assert not re.search(r"^(Traceback|\w*(Error|Exception|Interrupt)\b)", text, re.MULTILINE), text
    assert page.get_by_text(re.compile("Error (displaying|creating) widget|Javascript Error")).count() == 0


@pytest.mark.parametrize("name", ["01_data", "02_prompt_tokenizer", "03_training", "04_evaluation_codalab"])
def test_an_executed_chapter_opens_without_an_error(lab, chain, page, name):
    notebook = opened(page, lab, name)
    cells = nbformat.read(chain.notebooks / f"{name}.ipynb", as_version=4).cells
    # Cells are drawn as they come into sight.
    seen = set()
    for number in range(len(cells)):
        cell = notebook.locator(f".jp-Cell[data-windowed-list-index='{number}']")
        cell.scroll_into_view_if_needed()
        seen |= {number for _ in range(cell.locator(".jp-OutputArea-output").count())}
        shows_no_error(page)
    assert seen == {number for number, cell in enumerate(cells) if cell.get("outputs")}
    assert notebook.locator(".jp-OutputArea-output img").count() >= 1
    keep(page, name)


def test_an_error_on_a_page_is_seen(lab, page):
    notebook = opened(page, lab, "broken")
    notebook.get_by_text("ValueError: no").wait_for()
    with pytest.raises(AssertionError):
        shows_no_error(page)


def place(cell: str) -> int:
    cells = nbformat.read(notebooks.NOTEBOOKS / "05_figures.ipynb", as_version=4).cells
    return [listed.id for listed in cells].index(cell)


def shown(notebook, cell: str):
    """A cell of notebook 05, scrolled to."""
    located = notebook.locator(f".jp-Cell[data-windowed-list-index='{place(cell)}']")
    located.scroll_into_view_if_needed()
    return located


def test_chapter_5_driven_from_top_to_bottom(lab, chain, page):
    """Run all; then the browser: search, filter, sort, buttons, keys, comparison, playing, saving; then the form."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    notebook = opened(page, lab, "05_figures")
    expect(page.get_by_role("button", name=re.compile(r"\| Idle$"))).to_be_visible()  # else nothing is run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    expect(shown(notebook, "wrote").locator(".jp-OutputArea-output")).to_contain_text("and .png")
    shows_no_error(page)

    # What the page must show, from the same run without a page.
    early = chain.predicted("val", 1)
    twin = browser.Browser(chain, compare=early, folder=chain.root / "twin")
    panel = shown(notebook, "browser").locator(".framseg")
    heading, count = panel.locator("h3"), panel.get_by_text(re.compile(r"^\d+ of \d+ queries"))
    search, listed = panel.get_by_placeholder("search in the queries"), panel.locator("select[size]")
    expect(panel.locator("select:not([size])")).to_have_count(3)
    choice = dict(zip(("filter", "sort", "compare"), panel.locator("select:not([size])").all(), strict=True))

    def agrees() -> None:
        expect(count).to_have_text(twin.count.value)
        expect(heading).to_have_text(twin.shown[twin.place].row.query)
        expect(listed.locator("option")).to_have_count(len(twin.shown))
        expect(listed.locator("option:checked")).to_have_text(twin.list.label)
        expect(panel.locator("svg.timed")).to_have_count(2)

    agrees()
    boxes = [svg.bounding_box() for svg in panel.locator("svg.timed").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]  # side by side
    keep(page, "05_browser")

    word = twin.shown[0].row.query.split()[-1]
    search.fill(word)
    twin.search.value = word
    agrees()
    keep(page, "05_search")
    search.fill("")
    twin.search.value = ""
    agrees()  # each control sends on its own: two changes at once may come in the other order
    for name in [name for name in FILTERS if name != "all"]:
        choice["filter"].select_option(name)
        twin.filter.value = name
        if not twin.shown:
            expect(panel).to_contain_text("no query matches")
        else:
            agrees()
    choice["filter"].select_option("all")
    twin.filter.value = "all"
    agrees()
    choice["sort"].select_option("IoU, worst first")
    twin.sort.value = "IoU, worst first"
    agrees()

    for name in ("next ▶", "next ▶", "◀ previous"):
        panel.get_by_role("button", name=name).click()
        twin.buttons[name].click()
        agrees()
    for key, move in (("ArrowRight", twin.next), ("ArrowRight", twin.next), ("ArrowLeft", twin.previous)):
        page.keyboard.press(key)  # the focus is on the button just used
        move()
        agrees()
    heading.click()
    page.keyboard.press("ArrowRight")
    twin.next()
    agrees()
    listed.select_option(index=0)
    twin.show(twin.shown[0].row.qid)
    agrees()
    active = notebook.locator(".jp-Cell.jp-mod-active").get_attribute("data-windowed-list-index")
    listed.focus()
    page.keyboard.press("ArrowDown")
    twin.next()
    agrees()
    page.keyboard.press("ArrowUp")
    twin.previous()
    agrees()
    # The notebook's own arrow keys would have gone to another cell.
    expect(notebook.locator(".jp-Cell.jp-mod-active")).to_have_attribute("data-windowed-list-index", active)
    search.focus()
    page.keyboard.press("ArrowRight")  # here it moves the cursor
    page.wait_for_timeout(500)
    agrees()

    video = panel.locator("video")
    assert not video.is_visible()
    axis = panel.locator("svg.timed").first
    box = axis.locator(".axis").bounding_box()
    axis.click(position={"x": box["x"] - axis.bounding_box()["x"] + box["width"] / 2, "y": box["height"] - 8})
    expect(video).to_be_visible()
    page.wait_for_function("video => video.currentTime > 0.2 && !video.error", arg=video.element_handle())
    expect(panel.locator(".cursor").first).to_have_attribute("visibility", "visible")
    at = video.evaluate("video => [video.currentTime, video.src, video.videoWidth]")
    start, end = map(float, at[1].split("#t=")[1].split(","))
    assert at[0] >= start and end - start == pytest.approx(30) and at[2] > 0
    keep(page, "05_playing")
    panel.get_by_role("button", name="next ▶").click()
    expect(video).not_to_be_visible()
    twin.next()
    agrees()

    choice["compare"].select_option(browser.NOTHING)
    expect(panel.locator("svg.timed")).to_have_count(1)
    keep(page, "05_alone")
    search.fill(word)
    twin.search.value = word
    panel.get_by_role("button", name="export selection").click()
    expect(panel).to_contain_text("predictions written to")
    exported = read_predictions(chain.predictions / "selection.jsonl")
    assert [record["qid"] for record in exported] == [entry.row.qid for entry in twin.shown]
    panel.get_by_role("button", name="save figure").click()
    expect(panel).to_contain_text(re.compile(r"saved .*\.pdf"))
    assert (chain.predictions / f"query_{twin.shown[twin.place].row.qid}.png").is_file()

    form = shown(notebook, "ask").locator(".framseg")
    form.get_by_role("button", name="ask").click()
    expect(form).to_contain_text("give a video and at least one query")
    row = twin.rows[0]
    form.get_by_label("video to upload").set_input_files(twin.videos / f"{row.vid}.mp4")
    expect(form).to_contain_text(f"uploaded {row.vid}.mp4")
    form.locator("textarea").fill(f"{row.query}\n\na second <b>query</b>")
    form.get_by_role("button", name="ask").click()
    expect(form.locator("svg.timed")).to_have_count(2)
    expect(form.locator("h3")).to_have_text([row.query, "a second <b>query</b>"])
    form.locator("rect[data-end]").first.click()
    page.wait_for_function("video => video.currentTime > 0.2", arg=form.locator("video").element_handle())
    keep(page, "05_form")
    path = form.get_by_placeholder("or the path of a video")
    path.fill("/no/such.mp4")
    path.press("Tab")
    form.get_by_role("button", name="ask").click()
    expect(form).to_contain_text("/no/such.mp4: no such video file")
    expect(form.locator("svg.timed")).to_have_count(0)
    shows_no_error(page)
