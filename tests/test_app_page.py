"""The page that `hf-spp app` serves, in a browser."""

import re
import socket
import subprocess

import pytest
from browser import BROWSERS, COMMAND, find_browser, visited
from test_app import checkpoint, report_of

needs_browser = pytest.mark.skipif(
    find_browser() is None, reason=f"None of {', '.join(BROWSERS)} is installed. Run `apt-get install chromium`."
)
LABELS = ["<img src=x onerror=document.title='broken'>", "${document.title='broken'}", "{{this}} & **bold**"]


@needs_browser
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_page_answers_in_a_browser(tmp_path):
    names = {number: f"{LABELS[number % 3]} {number}" for number in range(10)}
    folder = checkpoint(tmp_path / "vit <b onload=x> & ${1}", "vit", num_labels=10, id2label=names)
    report_of(folder, tmp_path / "widths", labels=10)
    with visited(str(folder), "--dataset", "digits", "--widths", str(tmp_path / "widths")) as visit:
        page = visit.page
        half = visit.wait_for("#costs", "Parameters")
        assert "2 of 3 heads and 8 of 20 neurons of each layer stay." in page.locator("#stays").inner_text()
        first = visit.wait_for("#times", "× as fast")
        assert re.search(r"Milliseconds\s+[\d.e-]+\s+[\d.e-]+\s+[\d.]+ × as fast", first)
        assert page.locator("#quality tr.here").inner_text().startswith("50 %")

        answers = visit.wait_for("#answers", "Full model")
        assert sum(label in answers for label in names.values()) >= 5
        assert page.locator("h2").inner_text() == str(folder)
        visit.choose_example(3)

        heads = page.locator("svg[data-cut=heads]")
        assert heads.locator("g.cell").count() == 6
        assert heads.locator("g.cut").count() == 2

        slider = page.locator("#width input[type=range]")
        slider.focus()
        for _ in range(4):
            slider.press("ArrowLeft")
        visit.wait_for("#stays", "1 of 3 heads and 8 of 20 neurons")
        assert visit.wait_for("#costs", "Parameters") != half
        assert heads.locator("g.cut").count() == 4
        assert "hf-spp curve" in visit.wait_for("#quality", "This width was not measured.")
        visit.wait_for("#times", "× as fast")

        page.get_by_label("Heads and neurons apart").check()
        page.locator("#heads input[type=range]").focus()
        for _ in range(20):
            page.locator("#heads input[type=range]").press("ArrowRight")
        visit.wait_for("#stays", "3 of 3 heads and 8 of 20 neurons")
        visit.wait_for("#times", "× as fast")
        config = page.evaluate("window.gradio_config")
        assert config["analytics_enabled"] is False
        assert "public" not in {one["api_visibility"] for one in config["dependencies"]}
        assert "broken" not in page.title()
        assert visit.errors == []
        assert visit.foreign == []
    assert visit.code == 0


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path):
    folder = checkpoint(tmp_path / "vit", "vit")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*COMMAND, str(folder), "--port", str(port), "--no-browser"]
        run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert f"cannot be served at 127.0.0.1, port {port}" in run.stderr
