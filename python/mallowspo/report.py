"""``python -m mallowspo.report OUTPUT_DIR``: what a recipe wrote there as one HTML page that needs no other file.

results.md gives text, tables and the places and captions of the plots; results.json the settings and versions, and
itself for download. Needs markdown-it-py, which the extra ``recipes`` installs.
"""

import argparse
import base64
import json
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from urllib.parse import unquote

from mallowspo.files import write_whole

MOST_UNBROKEN = 30  # characters of a table's cell that stay on one line; a number with its interval has about 20
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --faint: #5c6570; --line: #d9dde2;
  --band: #f1f3f5; --link: #0b62a4; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15181c; --ink: #e4e7ea; --faint: #9aa4af; --line: #363d45;
  --band: #1e2329; --link: #7dbcf0; }} }}
body {{ max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, sans-serif; }}
h1, h2, h3 {{ line-height: 1.25; margin: 2.2em 0 .6em; text-wrap: balance; }}
h1 {{ margin-top: 0; font-size: 2rem; }}
h2 {{ font-size: 1.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2em; }}
h3 {{ font-size: 1.1rem; }}
p, li {{ max-width: 46rem; }}
a {{ color: var(--link); }}
code {{ font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th {{ color: var(--faint); font-weight: 600; vertical-align: bottom; }}
.unbroken {{ white-space: nowrap; }}
tbody tr:hover {{ background: var(--band); }}
figure {{ margin: 2rem 0; }}
figure img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; padding: .5rem; box-sizing: border-box;
  background: #fff; border: 1px solid var(--line); border-radius: .4rem; }}
figcaption {{ color: var(--faint); font-size: .9375rem; margin-top: .5rem; }}
details {{ margin: 2.5rem 0 1rem; }}
summary {{ cursor: pointer; font-weight: 600; }}
footer {{ border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: .5rem; color: var(--faint); }}
</style>
</head>
<body>
<main>
{body}</main>
<footer>
{record}
<p><a download="results.json" href="data:application/json;base64,{download}">results.json</a>{note}, written {when}</p>
</footer>
</body>
</html>
"""


def page(folder):
    """The page of a recipe's output folder, as text.

    Plots that results.md does not show follow its text, captioned by their file names. Raw HTML in results.md is
    shown, not obeyed.

    Args:
        folder: with results.json, results.md and any number of PNG files.

    Raises:
        FileNotFoundError: the folder, one of the two files or a plot that results.md shows is missing. ValueError:
            results.json is no JSON object, or results.md no UTF-8. ImportError: markdown-it-py is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the output_dir of a recipe's run")
    for name in ("results.json", "results.md"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, which a recipe writes at its end: give the output_dir of one that has "
                "finished, or run it again"
            )
    path = folder / "results.json"
    results, data, note = _read(path)
    title, body = _render(folder)
    record = "".join(_table(part, results[part]) for part in ("settings", "versions") if part in results)
    return PAGE.format(
        title=escape(title),
        body=body,
        record=record and f"<details>\n<summary>Settings and versions</summary>\n{record}</details>",
        download=_base64(data),
        note=note,
        when=datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _read(path):
    """(results.json as a dict, the bytes to offer for download, a remark on them)"""
    data, not_json = path.read_bytes(), []
    try:
        results = json.loads(data, parse_constant=not_json.append)  # NaN, Infinity -> None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): damaged or cut off; run the recipe again") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} must hold a JSON object, as recipes write it, not a {type(results).__name__}")
    if not_json:
        return results, json.dumps(results, indent=1).encode(), " (with null for NaN and Infinity, which JSON lacks)"
    return results, data, ""


def _render(folder):
    """(title, HTML) of results.md with the folder's plots in it."""
    try:
        from markdown_it import MarkdownIt
        from markdown_it.token import Token
    except ImportError as error:
        raise ImportError("the page needs markdown-it-py; run: pip install 'mallowspo[recipes]'") from error
    plots = {path.name: path for path in sorted(folder.glob("*.png"))}
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    path = folder / "results.md"
    try:
        tokens = markdown.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): damaged; run the recipe again") from error
    shown = {unquote(image.attrs["src"]) for token in tokens for image in _images(token)}
    others = [f"![{Path(name).stem.replace('_', ' ')}](<{name}>)" for name in plots if name not in shown]
    if others:
        tokens += markdown.parse("\n\n".join(["## More plots" if shown else "## Plots", *others]))
    if not any(token.tag == "h1" for token in tokens):
        tokens = markdown.parse(f"# {folder.resolve().name}") + tokens
    title = next(text.content for token, text in zip(tokens, tokens[1:], strict=False) if token.tag == "h1")
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.type != "inline":
            continue
        if before.tag == "td" and len(token.content) <= MOST_UNBROKEN:
            before.attrSet("class", "unbroken")
        for image in _images(token):
            name = unquote(image.attrs["src"])
            if name not in plots:
                raise FileNotFoundError(f"results.md shows {name}, no PNG file in {folder}; run the recipe again")
            image.attrs["src"] = f"data:image/png;base64,{_base64(plots[name].read_bytes())}"
            if before.type == "paragraph_open":
                before.tag = after.tag = "figure"
                caption = Token("html_inline", "", 0, content=f"<figcaption>{escape(image.content)}</figcaption>")
                token.children.insert(token.children.index(image) + 1, caption)
    html = markdown.renderer.render(tokens, markdown.options, {})
    # The keyboard can scroll what it can reach.
    html = html.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return title, html


def _images(token):
    return [child for child in token.children or () if child.type == "image"]


def _table(heading, value):
    """Any JSON value as a table of names and values, those of dicts in it as name.name."""
    cells = ((escape(name), escape(text)) for name, text in _flat(value))
    rows = "".join(f"<tr><td>{name}</td><td><code>{text}</code></td></tr>\n" for name, text in cells)
    return f'<h3>{heading}</h3>\n<div class="scroll" tabindex="0"><table>\n{rows}</table></div>\n'


def _flat(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _base64(data):
    return base64.b64encode(data).decode()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m mallowspo.report", description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path, help="of a recipe's run; report.html is written into it")
    folder = parser.parse_args(arguments).output_dir
    path = folder / "report.html"
    try:
        html = page(folder)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{error}\n")
    try:
        write_whole(path, html.encode())
    except OSError as error:
        parser.exit(1, f"{path} cannot be written: {error.strerror}; put that right and run this again\n")
    print(path)


if __name__ == "__main__":
    main()
