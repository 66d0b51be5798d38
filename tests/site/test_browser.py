"""The built site in a browser: pytest -m site, after python -m sphinx -W docs docs/_build.

Opens main pages in headless Chromium, light and dark, wide and narrow. `--screenshots FOLDER` keeps pictures
to look at.
"""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in the extra docs")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the extra docs")

pytestmark = pytest.mark.site
BUILT = Path(__file__).parents[2] / "docs" / "_build"
PAGES = (
    *("index", "start", "choose", "calls", "own", "loops", "hosts", "ranks", "gallery"),
    *("accuracy", "speed", "promises", "inside", "reference", "losses/index"),
    *("losses/huber_loss", "losses/cross_entropy", "losses/triplet_margin_loss", "losses/ctc_loss"),
)
SIZES = {"wide": (1400, 900), "narrow": (375, 812)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The built site, served on this machine."""
    if not (BUILT / "index.html").exists():
        pytest.skip("the site is not built: python -m sphinx -W docs docs/_build")
    handler = functools.partial(Quiet, directory=str(BUILT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium here")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return request.param


@pytest.fixture
def opened(browser, address, size, theme):
    """A page of the site, and what went wrong while it was open."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    page, faults = context.new_page(), []
    page.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url))
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else faults.append(r.url))
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    yield page, faults
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page(opened, address, size, theme, name, request):
    """No error, no request to elsewhere, no broken picture, nothing beyond the edge, no fault by axe."""
    page, faults = opened
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
    wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if folder := request.config.getoption("--screenshots"):
        path = Path(folder) / f"{name.replace('/', '-')}-{size}-{theme}.png"
        page.screenshot(path=path, full_page=name in ("index", "choose", "losses/huber_loss"))
    unnamed = page.evaluate("[...document.images].filter(i => i.alt === null).map(i => i.src)")
    assert not faults and not broken and not unnamed
    assert wider <= 0, f"{wider} pixels beyond the edge"
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    found = axe.Axe().run(page).response["violations"]
    assert not found, [(v["id"], [n["html"][:150] for n in v["nodes"][:3]]) for v in found]


@pytest.mark.parametrize("word", ["focal", "numbaloss.boosting.xgboost", "MPI"])
def test_search(opened, address, word):
    page, faults = opened
    page.goto(f"{address}/search.html?q={word}", wait_until="networkidle")
    page.wait_for_selector("#search-results li a")
    links = page.evaluate("[...document.querySelectorAll('#search-results li a')].map(a => a.href)")
    if word == "focal":
        assert any("focal_cross_entropy" in link for link in links)
    assert links and not faults
