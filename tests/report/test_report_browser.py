"""The page in a real browser: nothing leaves, nothing runs, everybody can use it."""

import http.server
import threading
from itertools import combinations
from pathlib import Path

import pytest
from browser import PHONE, Visit
from report_world import HOSTILE, add_whole_catalogue, make_settings, write_report_world

from mllm_msr.report.page import write_report

pytest.importorskip("playwright.sync_api", reason="needs playwright")

LONG = "Unbreakable" * 30
BASELINES = {"gru4rec_summary": 1, "gru4rec_image": -1, "sasrec_f": 2, "recent_popularity": 0}
WORDY = "TALLRec's recipe: titles only, fine-tuned"  # a row of a table of a study
FIGURES = " | ".join(["0.917 [0.897, 0.937]"] * 4)
STUDY = f"""The main table.

| group | scorer | AUC | HR@5 | NDCG@5 | MRR@5 | difference in AUC | p | AUC over popularity | p |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| ours | MLLM-MSR | {FIGURES} | | | +0.390 [+0.336, +0.445] | <0.001 |
| simple | popularity | {FIGURES} | -0.390 [-0.445, -0.336] | 0.001 | | |

- 150 test sequences
"""
# The boxes of all texts of every chart, in pixels of the chart.
LABELS_OF_CHARTS = """[...document.querySelectorAll('svg.chart')].map(svg => ({
  width: svg.viewBox.baseVal.width, height: svg.viewBox.baseVal.height,
  labels: [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBBox();
    return [text.textContent, box.x, box.y, box.x + box.width, box.y + box.height];
  })}))"""
OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report with all sections: hostile and very long titles, a study of two rows."""
    folder = tmp_path_factory.mktemp("report")
    inputs = write_report_world(folder, {"f": HOSTILE, "a": LONG}, BASELINES)
    add_whole_catalogue(inputs)
    study = inputs.studies / "table"
    study.mkdir(parents=True)
    plate = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 4" width="655pt" height="291pt"/>'
    )
    (study / "figure.svg").write_text(plate)
    (study / "table.md").write_text(STUDY)
    write_report(inputs, make_settings(), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report in which a scorer's name is longer than a chart is wide."""
    folder = tmp_path_factory.mktemp("wordy")
    inputs = write_report_world(folder, baselines=BASELINES)
    add_whole_catalogue(inputs)
    for path in (inputs.evaluated / "metrics.json", inputs.evaluated / "plots/metrics_at_k.csv"):
        path.write_text(path.read_text().replace('"sasrec_f"', f'"{WORDY}"'))
    write_report(inputs, make_settings(), folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def visit(browser, file):
    """Return a function that opens the page with a context's options."""
    visits: list[Visit] = []

    def open_page(path: Path = file, **options: object) -> Visit:
        visits.append(Visit(browser, path.as_uri(), **options))
        return visits[-1]

    yield open_page
    for each in visits:
        each.page.close()


def test_the_page_asks_for_nothing_and_complains_of_nothing(visit, file):
    opened = visit()
    opened.page.evaluate(OPEN_ALL)
    opened.page.wait_for_load_state("networkidle")
    outside = [url for url in opened.requests if not url.startswith("data:")]
    assert outside == [file.as_uri()]
    assert opened.complaints == []


def test_even_a_page_that_was_tampered_with_fetches_and_runs_nothing(visit, file, tmp_path):
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        away = f"http://127.0.0.1:{server.server_port}"
        added = (
            f'<img src="{away}/image"><link rel="stylesheet" href="{away}/style">'
            f'<script src="{away}/code"></script><iframe src="{away}/frame"></iframe>{HOSTILE}'
        )
        tampered = tmp_path / "tampered.html"
        tampered.write_text(file.read_text().replace("</body>", f"{added}</body>"))
        opened = visit(tampered)
        opened.page.wait_for_load_state("networkidle")
        server.shutdown()
    assert asked == []
    assert opened.page.evaluate("document.documentElement.dataset.owned") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


def test_a_script_in_a_title_is_shown_and_not_run(visit):
    page = visit().page
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.dataset.owned") is None
    assert HOSTILE in page.locator("main").inner_text()
    assert page.locator("script").count() == 0


def test_nothing_is_wider_than_a_phone(visit):
    page = visit(viewport=PHONE).page
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.body.scrollWidth") <= PHONE["width"]


def test_a_study_stands_with_its_figure_its_whole_table_and_its_notes(visit):
    study = visit().page.locator("article.study")
    assert study.locator("h3").all_inner_texts() == ["Table"]
    assert study.locator("thead th").all_inner_texts() == [
        *("scorer", "group", "AUC", "HR@5", "NDCG@5", "MRR@5"),
        *("difference in AUC", "p", "AUC over popularity", "p"),
    ]
    assert study.locator("tbody th").all_inner_texts() == ["MLLM-MSR", "popularity"]
    assert study.locator("tbody td").count() == 18  # with those that say nothing
    assert "+0.336 to +0.445" in study.locator("tbody tr").first.inner_text()
    assert study.locator("li").all_inner_texts() == ["150 test sequences"]
    assert study.locator("img.plate").is_visible()


def test_the_figure_of_a_study_keeps_its_size_on_a_phone_and_scrolls(visit):
    plate = visit(viewport=PHONE).page.locator("img.plate")
    assert plate.bounding_box()["width"] > 2 * PHONE["width"]
    inside = plate.locator("xpath=..")
    assert inside.evaluate("box => box.scrollWidth > box.clientWidth")
    assert inside.get_attribute("tabindex") == "0"  # the keyboard can scroll it


def test_every_image_is_there_and_has_a_text(visit):
    page = visit().page
    page.evaluate(OPEN_ALL)
    images = page.eval_on_selector_all("img", "all => all.map(i => [i.alt, i.naturalWidth])")
    assert len(images) > 10
    assert all(alt.strip() and width > 0 for alt, width in images)


def test_the_keyboard_skips_to_the_content_and_opens_a_story(visit):
    page = visit().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.story:not([open]) > summary')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open")


def test_dark_mode_is_dark_and_light_mode_is_light(visit):
    background = "getComputedStyle(document.body).backgroundColor"
    assert visit(color_scheme="light").page.evaluate(background) == "rgb(251, 250, 247)"
    assert visit(color_scheme="dark").page.evaluate(background) == "rgb(20, 22, 26)"


def test_print_shows_the_closed_stories(visit):
    page = visit().page
    candidates = page.locator(".story:not([open]) .ranking").first
    assert not candidates.is_visible()
    page.emulate_media(media="print")
    assert candidates.is_visible()


@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "wide"])
def test_no_label_of_a_chart_is_clipped_or_covers_another(visit, wordy, viewport):
    page = visit(wordy, viewport=viewport).page
    page.evaluate(OPEN_ALL)
    charts = page.evaluate(LABELS_OF_CHARTS)
    assert any(text.startswith("TALLRec") for chart in charts for text, *_ in chart["labels"])
    for chart in charts:
        for text, left, top, right, bottom in chart["labels"]:
            assert 0 <= left < right <= chart["width"], text
            assert 0 <= top < bottom <= chart["height"], text
        for (one, *a), (other, *b) in combinations(chart["labels"], 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
            assert apart, (one, other)


def test_axe_finds_nothing_to_mend_without_a_model(visit, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    inputs = write_report_world(tmp_path, baselines=BASELINES, scored=False)
    write_report(inputs, make_settings(), tmp_path / "report.html", ["Read this first."])
    opened = visit(tmp_path / "report.html", viewport=PHONE)
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert axe.run(opened.page).response["violations"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_mend(visit, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(color_scheme=scheme).page
    page.evaluate(OPEN_ALL)
    found = axe.run(page).response["violations"]
    assert {each["id"]: [node["html"] for node in each["nodes"]] for each in found} == {}
