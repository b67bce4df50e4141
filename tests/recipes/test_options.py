"""The options that every recipe reads from a YAML file and the command line."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from load_recipe import import_recipe

(options,) = import_recipe(".", "options")


@dataclass
class Options:
    config: str
    length: int | None = 7
    names: list[str] | None = field(default_factory=lambda: ["a"])
    seeds: int = 3


@pytest.fixture
def parse(tmp_path):
    """A function of the file's text and the command line."""
    path = tmp_path / "x.yaml"

    def parsed(text, *arguments):
        path.write_text(text)
        return options.parse_options(Options, "", ["--config", str(path), *arguments])[0]

    return parsed


def test_null_is_none_unless_the_command_line_has_a_value(parse):
    found = parse("length: null\nnames: null\n")
    assert (found.length, found.names, found.seeds) == (None, None, 3)
    assert parse("length: null\n", "--length", "5").length == 5
    assert parse("seeds: 4\n").length == 7
    with pytest.raises(ValueError, match="null for seeds, which must have a value; leave it out"):
        parse("seeds: null\n")


def test_no_option_is_abbreviated(parse):
    for short in ("--conf", "--seed"):
        with pytest.raises(ValueError, match=short):
            parse("", short, "9")


@pytest.mark.parametrize("text", ["seeds: 2\nlength: 1\nseeds: 5\n", "names: [{seeds: 2, seeds: 5}]\n"])
def test_an_option_that_is_given_twice_is_refused(parse, text):
    with pytest.raises(ValueError, match="seeds is given twice"):
        parse(text)


def test_a_file_that_cannot_be_read_is_named(parse, tmp_path):
    with pytest.raises(ValueError, match=r"--config .*x.yaml cannot be read: while parsing.*line 1"):
        parse("names: [a\n")
    (tmp_path / "latin").write_bytes(b"names: [\xe9]")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin"):
        with pytest.raises(ValueError, match=f"--config {path} cannot be read"):
            options.parse_options(Options, "", ["--config", str(path)])


def test_a_scripts_wrong_option_ends_it_with_the_message_alone(monkeypatch, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 4\n")
    monkeypatch.setattr("sys.argv", ["path/to/run.py", "--config", str(path)])
    with pytest.raises(SystemExit, match="^run.py: error: .*x.yaml has unknown options: seed"):
        options.parse_options(Options, "")

    @options.ends_the_script
    def parse(arguments=None):
        raise ValueError("no such thing")

    for given in ((), (None,)):
        with pytest.raises(SystemExit, match="^run.py: error: no such thing"):
            parse(*given)
    with pytest.raises(ValueError, match="^no such thing"):
        parse([])


@pytest.mark.parametrize(
    ("check", "meant", "refused"),
    [
        (options.check_at_least_one, (1, [1, 2]), (0, -3, [2, 0])),
        (options.check_positive, (1e-9, [0.5, 2]), (0, -1, math.inf, math.nan, [1, math.inf])),
        (options.check_not_negative, (0, [0, 0.5]), (-0.1, math.inf, math.nan, [1, -1])),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(check, meant, refused):
    for value in meant:
        check(SimpleNamespace(size=value), "size")
    for value in refused:
        with pytest.raises(ValueError, match=r"size must be .*got "):
            check(SimpleNamespace(other=1, size=value), "other", "size")
