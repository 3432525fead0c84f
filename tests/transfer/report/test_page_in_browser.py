"""The page as a reader's browser shows it; needs Chromium (tools/find_chromium.sh)."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from megatron_mup.transfer.report.build import make_report
from megatron_mup.transfer.report.source import Reported
from tests.transfer.report.browser import Page, find_browser, opened_browser
from tests.transfer.report.sample_rows import arm_rows, two_arms

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
BOXES = """[...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  return [box.x + window.scrollX, box.y + window.scrollY, box.width, box.height];
})"""
TEXTS_OUTSIDE = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.width == 0 || box.left < frame.left - 1 || box.right > frame.right + 1 ||
      box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """A report with every figure, open in the browser."""
    try:
        find_browser()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)
    rows = [
        row
        for value in ("0", "1")
        for row in arm_rows("mup", optimum=-6, settings={"power": value}, sizes=(64, 128))
    ]
    folder = tmp_path_factory.mktemp("report")
    runs = Reported(rows=(*two_arms(), *rows))
    report = make_report(runs, folder, title="In a browser")
    with opened_browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.open(report.page.as_uri())
        yield tab


def screenshot(page: Page, box: list[float]) -> Image.Image:
    """Picture of a part of the page."""
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    answer = page.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    return Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB")


def test_the_page_asks_for_itself_alone_and_nothing_complains(page):
    (address,) = [url for url in page.requests() if not url.startswith("data:")]

    assert address.startswith("file:///")
    assert Path(address).name == "report.html"
    assert page.complaints() == []


def test_every_figure_is_drawn(page):
    boxes = page.evaluate(BOXES)

    assert len(boxes) == 4
    for box in boxes:
        assert box[2] > 500
        assert box[3] > 200
        colors = screenshot(page, box).getcolors(1 << 24) or []
        # White paper, black words and at least a curve's color with its smooth edges.
        assert len(colors) > 50
        paper = sum(count for count, color in colors if color == (255, 255, 255))
        assert 0.3 < paper / sum(count for count, _ in colors) < 0.99


def test_the_words_of_the_figures_fit_in_the_browsers_font_too(page):
    assert page.evaluate(TEXTS_OUTSIDE) == []


def test_the_page_fits_a_phone_and_turns_dark(page):
    page.call("Emulation.setDeviceMetricsOverride", **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.call("Emulation.clearDeviceMetricsOverride")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    light_corner = screenshot(page, [0, 0, 10, 10]).getpixel((5, 5))
    page.call("Emulation.setEmulatedMedia", features=dark)
    dark_corner = screenshot(page, [0, 0, 10, 10]).getpixel((5, 5))

    assert sum(light_corner) > 700 > 150 > sum(dark_corner)
