"""The documentation as a site: it opens from a disk, loads nothing from elsewhere, and its search and reference work there."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.browser import Browser, needs_browser

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


pytestmark = pytest.mark.xdist_group("docs_site")


def test_the_reference_holds_every_public_name(site: Path) -> None:
    router = (site / "reference/moe/router.html").read_text()
    assert 'id="Router"' in router and 'id="topk_routing"' in router and 'id="Router.forward"' in router
    assert "_choose_by_kernel" not in router
    for layer in ("kernels", "moe", "parallel", "launch"):
        for path in (ROOT / layer).glob("*.py"):
            if path.stem != "__init__":
                page = (site / "reference" / layer / f"{path.stem}.html").read_text()
                for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", path.read_text(), re.M):
                    assert f'id="{name}"' in page, (path, name)


def test_every_knob_is_explained(site: Path) -> None:
    rows = re.findall(
        r"<td><code>([\w.]+)</code></td>\s*<td>.*?</td>\s*<td>(.*?)</td>", (site / "reference/knobs.html").read_text()
    )
    from moesaic.launch import cli

    assert [name for name, _ in rows if name not in cli.knobs()] == []
    assert set(cli.knobs()) - {name for name, meaning in rows if meaning} == set()


@needs_browser
def test_it_opens_from_a_disk(site: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        for page in ("index.html", "reference/moe/router.html"):
            browser.open(site / page)
            browser.evaluate(
                "query = document.querySelector('[data-md-component=search-query]'); query.focus(); query.value = 'rounding';"
                "for (const kind of ['keyup', 'input']) query.dispatchEvent(new Event(kind, {bubbles: true}))"
            )
            end = time.monotonic() + 20
            while not (found := browser.evaluate("document.querySelectorAll('.md-search-result__item a').length")):
                assert time.monotonic() < end, (browser.mistakes, browser.requests)
                time.sleep(0.1)
            assert found > 3
            assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
            assert browser.mistakes == []
