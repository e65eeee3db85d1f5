"""The report in a real browser, as its reader has it: charts draw, the map follows the token, keys suffice, nothing is fetched.

Chromium is Debian's (`apt-get install chromium`), the one that FATHOM_CHROMIUM names, or Playwright's own (`playwright install
chromium`). Without one these tests are skipped, saying so; where CI or FATHOM_BROWSER=required is set they fail.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from fathom.lab.report import write_report

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def executable(own: str) -> str:
    """The path of a Chromium; ``own`` is Playwright's, there or not."""
    for found in (os.environ.get("FATHOM_CHROMIUM"), shutil.which("chromium"), shutil.which("google-chrome"), own):
        if found and Path(found).is_file():
            return found
    said = "no Chromium to open the report in: apt-get install chromium, playwright install chromium, or set FATHOM_CHROMIUM"
    if os.environ.get("CI") or os.environ.get("FATHOM_BROWSER") == "required":
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = executable(playwright.chromium.executable_path)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(made: Path, sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [made / "prenorm", made / "block", made / "full", sweep]
    return write_report(runs, tmp_path_factory.mktemp("page") / "report.html")


class Opened:
    """A page, and what it said and asked for since."""

    def __init__(self, browser: Browser, report: Path, width: int, scheme: Any, **settings: Any) -> None:
        size: Any = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, **settings)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, 1400, "light")
    yield opened
    opened.context.close()
    assert opened.said == [] and opened.asked == [report.as_uri()]


ALONE = """async (chart) => {
  const frame = () => new Promise(requestAnimationFrame);
  const canvas = chart.querySelector("canvas"), seen = {};
  const buttons = [...chart.querySelectorAll(".legend button")];
  buttons.forEach((button) => button.click());
  for (const button of buttons) {
    button.click();
    await frame();
    await frame();
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    const inks = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 250) inks.add([data[i], data[i + 1], data[i + 2]].join());
    seen[button.firstChild.nextSibling.textContent] = [...inks];
    button.click();
  }
  return seen;
}"""
"""The opaque colours on a chart's canvas when each of its curves is shown alone."""


def rgb(colour: str) -> str:
    return ",".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.inner_text("#data") or page.text_content("#data") or "")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1400, "light"), (1400, "dark")])
def test_every_chart_draws_and_nothing_is_fetched(browser: Browser, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, width, scheme)
    page, charts = opened.page, data_of(opened.page)["charts"]
    page.wait_for_timeout(100)
    assert set(charts) == {"loss", "output-magnitude", "gradient-magnitude", "scaling"}
    for key, chart in charts.items():
        drawn = page.eval_on_selector(f"[data-chart={key}]", ALONE)
        for series in chart["series"]:
            if series["told"]:
                others = {other["colour"] for other in chart["series"]} - {series["colour"]}
                seen = set(drawn[series["group"]])
                assert rgb(series["colour"]) in seen and not seen & set(map(rgb, others)), (key, series["group"])
    assert page.evaluate("document.documentElement.scrollWidth") == width, "the page must not scroll sideways"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(246, 246, 243)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert page.locator("#reads td").count() > 10 and page.locator("#mixing td").count() == 49
    box = page.locator("#reads").bounding_box()
    assert box is not None and box["width"] <= width
    opened.context.close()
    assert opened.said == [] and opened.asked == [report.as_uri()]


def select(page: Page, name: str) -> Locator:
    """The first drop-down list whose name begins so."""
    return page.get_by_role("combobox", name=re.compile(f"^{name}")).first


def shown_map(page: Page) -> list[list[str]]:
    rows = page.locator("#reads .map").first.locator("tbody tr").all()
    return [[cell for cell in row.locator("td").all_inner_texts() if cell] for row in rows]


def test_the_token_picker_shows_that_tokens_weights(opened: Opened) -> None:
    page = opened.page
    reader = data_of(page)["readers"][0]
    sites = [site for site in reader["sites"] if site["name"].endswith(("attention", "output"))]
    assert shown_map(page) == [[f"{weight:.2f}".replace("0.", ".", 1) for weight in site["weights"]] for site in sites]
    before, said = shown_map(page), page.locator(".told").inner_text()
    sentence = reader["sentences"][0]
    page.locator(".tokens .token").nth(3).click()
    packed = np.frombuffer(base64.b64decode(sentence["weights"]), np.uint8) / 255
    wanted, at = [], 0
    for site in reader["sites"]:
        size = len(site["weights"])
        if site in sites:
            wanted.append([f"{weight:.2f}".replace("0.", ".", 1) for weight in packed[at + 3 * size : at + 4 * size]])
        at += size * len(sentence["tokens"])
    assert shown_map(page) == wanted != before
    assert (
        page.locator(".told").inner_text() != said
        and sentence["tokens"][3].strip() in page.locator(".told").inner_text()
    )
    select(page, "Before").select_option("MLP")
    assert "MLP" in page.locator("#reads .map caption").first.inner_text()
    select(page, "Run").select_option("full")
    assert page.locator("#reads .map thead").first.locator("th").count() == 1 + 7


def test_keys_choose_tokens_rows_and_sentences(opened: Opened) -> None:
    page = opened.page
    page.locator(".tokens input").first.focus()
    before = shown_map(page)
    page.keyboard.press("ArrowRight")
    assert page.locator(".tokens .token input").first.is_checked() and shown_map(page) != before
    rows = page.locator("#reads .map").first.locator("input")
    rows.last.focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#reads h3").nth(1).inner_text() == "Where layer 3 attention reads"
    select(page, "Sentence").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".tokens input").first.is_checked(), "another sentence begins with its mean"


def test_keys_read_and_hide_curves(opened: Opened) -> None:
    page = opened.page
    chart = page.locator("[data-chart=loss]")
    slider = chart.locator("input[type=range]")
    losses = {series["group"]: series["y"] for series in data_of(page)["charts"]["loss"]["series"] if series["told"]}
    assert f"block {losses['block'][-1]:.4g}" in (slider.get_attribute("aria-valuetext") or "")
    slider.focus()
    page.keyboard.press("Home")
    told = slider.get_attribute("aria-valuetext") or ""
    assert told.startswith("optimizer step 1:") and f"block {losses['block'][0]:.4g}" in told
    select(page, "Against").select_option("training tokens")
    assert (slider.get_attribute("aria-valuetext") or "").startswith("training tokens 384:")
    before = chart.locator("canvas").screenshot()
    button = chart.get_by_role("button", name="full").first
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    page.wait_for_timeout(100)
    assert chart.locator("canvas").screenshot() != before


def test_focus_begins_at_the_skip_link_and_every_stop_has_a_name(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    names = page.evaluate("""() => [...document.querySelectorAll("a, button, input, select, summary, [tabindex]")].map(
      (e) => e.getAttribute("aria-label") || e.closest("label")?.textContent.trim() || e.textContent.trim())""")
    assert len(names) > 30 and all(names)
    positive = "[...document.querySelectorAll('[tabindex]')].filter((e) => e.tabIndex > 0).length"
    assert page.evaluate(positive) == 0, "the order of focus is that of the page"


def test_without_scripts_the_tables_tell_all(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report, 390, "light", java_script_enabled=False)
    assert opened.page.locator("noscript .note").is_visible()
    opened.page.get_by_text("The numbers of block", exact=True).click()
    assert (
        opened.page.get_by_role("cell", name="layer 1 mlp")
        .or_(opened.page.get_by_role("rowheader", name="layer 1 mlp"))
        .first.is_visible()
    )
    opened.context.close()
    assert opened.asked == [report.as_uri()]
