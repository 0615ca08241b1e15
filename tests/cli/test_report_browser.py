"""The report in a real browser: Debian's Chromium, driven by Playwright."""

import shutil

import pytest

from crd_fast.run.report import write_report
from tests.cli.test_report_samples import with_grids

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(with_grids(tmp_path_factory.mktemp("runs") / "a run"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # the sandbox wants rights that a container does not give
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, report):
    """Opens the page in a window of a width; `asked` is what it would have loaded, `said` its console."""
    pages = []

    def open_page(width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(report.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()


def shown(page):
    """How the visible pictures of the first prompt are called."""
    images = page.locator(".tiles figure").first.locator("img")
    return [image.get_attribute("alt").partition(": ")[0] for image in images.all() if image.is_visible()]


BASES = ["Iteration 0", "The base with guidance scale 4.5"]


@pytest.mark.parametrize("script", [True, False], ids=["with JavaScript", "without"])
def test_a_tab_shows_its_evaluation(opened, script):
    page = opened(java_script_enabled=script)
    assert shown(page) == [*BASES, "Iteration 120"]
    page.get_by_role("radio", name="iteration 40").click()
    assert shown(page) == [*BASES, "Iteration 40"]
    page.keyboard.press("ArrowRight")
    assert shown(page) == [*BASES, "Iteration 60"]
    assert page.get_by_role("radio", checked=True).get_attribute("id") == "grid-000060"


def test_without_the_style_sheet_all_pictures_are_there(opened):
    """What a browser without `:has` shows: a plain list, each picture with its name."""
    page = opened()
    page.evaluate("document.querySelectorAll('style').forEach(style => style.remove())")
    assert shown(page) == [*BASES, *(f"Iteration {n}" for n in range(20, 121, 20))]


def test_nothing_is_asked_of_the_network(opened, report):
    page = opened()
    page.get_by_role("radio").first.check()
    page.wait_for_load_state("networkidle")
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.said == []
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(loaded) == 24 * 8 and set(loaded) == {32}


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_nothing_overflows(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    over = page.evaluate(
        """[...document.querySelectorAll('main *')]
             .filter(one => getComputedStyle(one).display !== 'inline' && !one.closest('svg'))
             .filter(one => one.clientWidth && one.scrollWidth > one.clientWidth + 1)
             .map(one => one.outerHTML.slice(0, 80))"""
    )
    assert over == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(opened, scheme):
    """Contrast of 4.5 and more between every text and what is behind it, as WCAG's level AA asks."""
    page = opened(color_scheme=scheme)
    found = page.evaluate(
        """() => {
             const parts = color => color.match(/[\\d.]+/g).map(Number)
             const light = color => { const [r, g, b] = parts(color).map(v => v / 255).map(
               v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
               return 0.2126 * r + 0.7152 * g + 0.0722 * b }
             const behind = element => { for (; element; element = element.parentElement) {
               const color = getComputedStyle(element).backgroundColor
               if ((parts(color)[3] ?? 1) === 1) return color }
               return 'rgb(255, 255, 255)' }
             const texts = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT)
             const low = []
             while (texts.nextNode()) {
               const element = texts.currentNode.parentElement
               if (!texts.currentNode.textContent.trim() || !element.checkVisibility()) continue
               if (element.closest('svg, style')) continue
               const [a, b] = [getComputedStyle(element).color, behind(element)].map(light)
               const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
               if (contrast < 4.5) low.push(element.outerHTML.slice(0, 80))
             }
             return low
           }"""
    )
    assert found == []
