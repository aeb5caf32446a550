"""The page, as text and in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from digits import batches, loss, networks, pairs

from qframework.inspect import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def test_the_data_are_there_without_a_page() -> None:
    _, model = networks()
    found = report(model, pairs(), loss=loss, example=(batches()[0][:1],))
    assert found.sensitivity.layers and found.statistics.tensors and found.summary.macs
    assert json.loads(found.model_dump_json())["model"] == type(model).__name__


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("bokeh", reason="the page needs bokeh: pip install 'qframework[plot]'")
    _, model = networks()
    where = tmp_path_factory.mktemp("report") / "report.html"
    report(model, pairs(), where, loss, (batches()[0][:1],))
    return where


def test_the_page_is_whole_and_needs_no_network(path) -> None:
    text = path.read_text()
    assert len(text) < 3_000_000
    for name in ("overview", "warnings", "values", "tensors", "sensitivity", "summary"):
        assert f'<section id="{name}">' in text
    tags = re.sub(r"<script[^>]*>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", tags)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_it_without_errors_and_nothing_sticks_out(path, width, tmp_path) -> None:
    if BROWSER is None:
        pytest.skip("no headless browser here: the page isn't drawn")
    probe = "<script>addEventListener('load', () => setTimeout(() => { document.title = 'wide ' + "
    probe += "document.documentElement.scrollWidth + ' of ' + innerWidth }, 1500))</script>"
    page = tmp_path / "page.html"
    before, after = path.read_text().rsplit("</body>", 1)
    page.write_text(f"{before}{probe}</body>{after}")
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    how += [
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={width},900",
        "--enable-logging=stderr",
    ]
    run = subprocess.run(
        [BROWSER, *how, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "bk-Figure" in run.stdout  # bokeh has drawn
    wide, inner = re.search(r"wide (\d+) of (\d+)", run.stdout).groups()
    assert int(wide) <= int(inner)
    assert "Uncaught" not in run.stderr
