"""The API reference: `.ci/reference.py` writes it, every public name is in it, and its links lead somewhere."""

import inspect
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hf_spp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Anchors, links, what is loaded, and the text of each part."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded, self.text = {"top"}, [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "href") if name in values and tag != "a"]
        if tag == "section" and "id" in values:
            self.text += f"\n#{values['id']}\n"

    def handle_data(self, data):
        self.text += data

    def part(self, anchor):
        """The text from an anchor to the next one."""
        return re.sub(r"\s+", " ", self.text.partition(f"\n#{anchor}\n")[2].partition("\n#")[0])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    command = re.search(r"^python (\.ci/reference\.py) \w+$", README, flags=re.MULTILINE)
    assert command, "README.md does not say how the reference is made"
    # A name that does not resolve is a warning.
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / command[1], folder], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}


def words(text):
    """Text without the marks of Markdown and without spaces."""
    return re.sub(r"[\s`*]", "", text)


def test_every_public_name_is_documented(pages):
    page = pages["hf_spp.html"]
    for name in set(hf_spp.__all__) - {"__version__"}:
        assert name in page.anchors, f"{name} is not in the reference"
        first_line = (inspect.getdoc(getattr(hf_spp, name)) or "").splitlines()[0]
        assert words(first_line) in words(page.part(name)), f"{name} stands there without its docstring"


def test_signatures_and_sections_are_shown(pages):
    text = pages["hf_spp.html"].part("apply_spp")
    for parameter in inspect.signature(hf_spp.apply_spp).parameters:
        assert f"{parameter}:" in text
    assert [heading for heading in ("Arguments:", "Returns:", "Raises:") if heading not in text] == []
    assert "Reordering.undo" in pages["hf_spp.html"].anchors


def test_what_readme_and_examples_import_is_documented(pages):
    texts = [README, *(path.read_text() for path in (ROOT / "examples").glob("*.py"))]
    imported = {match for text in texts for match in re.findall(r"^from (hf_spp[\w.]*) import (.+)$", text, re.M)}
    assert imported
    for module, names in imported:
        page = pages[module.replace(".", "/") + ".html"]
        for name in re.findall(r"\w+", names):
            # Data without a docstring is left out by intention of its module.
            if callable(getattr(import_module(module), name)):
                assert name in page.anchors, f"{module}.{name} is not in the reference; add it to .ci/reference.py"


def test_links_lead_somewhere(pages):
    reached, outside = {"hf_spp.html"}, set()
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside.add(link)
                continue
            path = unquote(parts.path) or posixpath.basename(name)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            assert target in pages, f"{name} links to {link}, which does not exist"
            if parts.fragment:
                assert unquote(parts.fragment) in pages[target].anchors, f"{name} links to {link}: no such anchor"
            if name == "hf_spp.html":
                reached.add(target)
    assert reached == pages.keys() - {"index.html"}
    assert outside == {"https://pdoc.dev"}


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = [link for page in pages.values() for link in page.loaded]
    assert [link for link in loaded if urlsplit(link).scheme not in ("", "data") or urlsplit(link).netloc] == []
