"""The page of a recipe's results: whole, self-contained, and clear about what it lacks."""

import base64
import json
import os
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from mallowspo import report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TEXT = """# Bandit & *co*

Means <script>alert(1)</script> over seeds.

| method | reward |
|---|---|
| dpo | 0.5 ± 0.1 |
| phi, a < b | -0.25 |

![Entropy < "of" contexts](entropy.png)
![two](<of two words.png>)
"""
RESULTS = {
    "results": [1.5, None],
    "settings": {"training": {"beta": 0.1, "name": "<b>"}, "list": [1, 2]},
    "versions": {"torch": "2"},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "results.md").write_text(TEXT)
    for name in ("entropy", "of two words", "training_loss"):
        (tmp_path / f"{name}.png").write_bytes(PIXEL)
    return tmp_path


class Page(HTMLParser):
    """The elements of a page, as a browser would see them: their attributes, their text, and that all are closed."""

    EMPTY = {"meta", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in self.EMPTY:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for _, _, parts in self.open:
            parts.append(text)

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag):
        return ["".join(parts).strip() for name, _, parts in self.elements if name == tag]


def test_the_page_holds_text_tables_plots_and_record(folder):
    page = Page(report.page(folder))
    assert page.texts("title") == ["Bandit & *co*"] and page.texts("h1") == ["Bandit & co"]
    assert page.texts("td")[:4] == ["dpo", "0.5 ± 0.1", "phi, a < b", "-0.25"]
    assert page.texts("figcaption") == ['Entropy < "of" contexts', "two", "training loss"]
    assert page.texts("h2") == ["More plots"]
    assert [image["alt"] for image in page.attributes("img")] == page.texts("figcaption")
    assert page.texts("td")[4:] == ["training.beta", "0.1", "training.name", "<b>", "list", "[1, 2]", "torch", "2"]
    assert page.attributes("details") == [{}]  # collapsed


def test_the_page_needs_nothing_else(folder):
    page = Page(report.page(folder))
    sources = [value for _, found, _ in page.elements for name, value in found.items() if name in ("src", "href")]
    assert len(sources) == 4 and all(source.startswith("data:") for source in sources)
    assert {base64.b64decode(image["src"].partition("base64,")[2]) for image in page.attributes("img")} == {PIXEL}
    assert not page.attributes("script") and not page.attributes("link")
    assert "<script>alert(1)</script>" in page.texts("p")[0]


def download(page):
    (link,) = page.attributes("a")
    assert link["download"] == "results.json"
    return base64.b64decode(link["href"].removeprefix("data:application/json;base64,"))


def test_results_json_can_be_downloaded_as_it_is(folder):
    assert download(Page(report.page(folder))) == (folder / "results.json").read_bytes()


def test_numbers_that_json_lacks_become_null_and_the_page_says_so(folder):
    (folder / "results.json").write_text('{"loss": [NaN, -Infinity, 1.5], "settings": {"beta": NaN}}')
    page = Page(report.page(folder))
    assert json.loads(download(page)) == {"loss": [None, None, 1.5], "settings": {"beta": None}}
    assert "null for NaN" in page.texts("p")[-1] and page.texts("td")[-2:] == ["beta", "null"]


def test_neither_settings_nor_plots_nor_a_heading(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    (folder / "results.json").write_text("{}")
    (folder / "results.md").write_text("Nothing but {braces}.\n")
    page = Page(report.page(folder))
    assert page.texts("title") == page.texts("h1") == [folder.name] and page.texts("p")[0] == "Nothing but {braces}."
    assert not page.attributes("details") and not page.attributes("img") and not page.attributes("h2")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("results.json", None, FileNotFoundError, "no results.json.*run it again"),
        ("results.md", None, FileNotFoundError, "no results.md.*run it again"),
        (
            "results.json",
            '{"loss": [1.5',
            ValueError,
            "is no JSON .*line 1 column .*run the recipe again",
        ),
        ("results.json", b"\xff\xfe{", ValueError, "results.json is no JSON"),
        ("results.json", "[1]", ValueError, "must hold a JSON object.*not a list"),
        ("results.md", b"# caf\xe9", ValueError, "results.md is no UTF-8 text.*run the recipe again"),
        ("entropy.png", None, FileNotFoundError, "shows entropy.png, no PNG file"),
        ("results.md", "![far](https://example.org/x.png)", FileNotFoundError, "shows https://example.org/x.png"),
        ("results.md", "![up](../x.png)", FileNotFoundError, "shows ../x.png"),
    ],
)
def test_what_is_missing_or_damaged_is_said(folder, name, content, error, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        report.page(folder)


def test_the_command(folder):
    done = subprocess.run([sys.executable, "-m", "mallowspo.report", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8") == report.page(folder)


def test_the_command_says_what_is_wrong_without_a_traceback(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        report.main([str(folder / "none")])
    assert capsys.readouterr().err.endswith("none is no folder; give the output_dir of a recipe's run\n")


def test_the_command_says_that_the_page_cannot_be_written(folder, capsys):
    (folder / "report.html").mkdir()
    with pytest.raises(SystemExit, match="1"):
        report.main([str(folder)])
    said = f"{folder / 'report.html'} cannot be written: Is a directory; put that right and run this again\n"
    assert capsys.readouterr().err == said
    assert not list(folder.glob("*.tmp"))


def test_a_missing_markdown_library_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    with pytest.raises(ImportError, match=r"markdown-it-py; run: pip install 'mallowspo\[recipes\]'"):
        report.page(folder)


def test_a_caption_is_text(folder):
    (folder / "results.md").write_text("![where x<b>y</b>](entropy.png)\n")
    assert Page(report.page(folder)).texts("figcaption")[0] == "where x<b>y</b>"


def test_the_time_is_that_of_the_run_in_utc(folder, monkeypatch):
    os.utime(folder / "results.json", (0, 0))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert "written 1970-01-01 00:00 UTC" in report.page(folder)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_plots_that_the_text_does_not_show_come_by_their_names(folder, monkeypatch):
    (folder / "results.md").write_text("# Bandit\n")
    paths = sorted(folder.glob("*.png"), reverse=True)
    monkeypatch.setattr(type(folder), "glob", lambda self, pattern: iter(paths))
    page = Page(report.page(folder))
    assert page.texts("figcaption") == ["entropy", "of two words", "training loss"]
    assert page.texts("h2") == ["Plots"]


def test_names_of_settings_are_text(folder):
    (folder / "results.json").write_text(json.dumps({"settings": {"<b>a": 1}}))
    assert Page(report.page(folder)).texts("td")[-2:] == ["<b>a", "1"]


def test_only_short_cells_stay_on_one_line(folder):
    (folder / "results.md").write_text(f"| a | b |\n|---|---|\n| {'x' * 30} | {'y' * 31} |\n")
    cells = [attributes.get("class") for attributes in Page(report.page(folder)).attributes("td")]
    assert cells[:2] == ["unbroken", None]


def test_an_image_in_a_cell_is_no_figure(folder):
    table = "| plot |\n|---|\n| ![two](<of two words.png>) |"
    (folder / "results.md").write_text(f"{table}\n\n![a](entropy.png)\n\n![b](training_loss.png)\n")
    page = Page(report.page(folder))
    assert len(page.attributes("figure")) == 2 and page.texts("figcaption") == ["a", "b"]
