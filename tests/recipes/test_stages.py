"""Results kept on disk: computed once for their inputs, whole or absent, refused where corrupt."""

import numpy as np
import pytest
from load_recipe import import_recipe

(stages,) = import_recipe(".", "stages")


def never(*_):
    pytest.fail("this stage was run again")


def fill(folder):
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text("x")


def test_a_stage_runs_once_for_its_inputs(tmp_path, capsys):
    kept = stages.Stages(tmp_path / "stages")
    assert kept.value("name", ["x", 1], lambda: {"a": (1.5, None), "b": "é"}) == {"a": [1.5, None], "b": "é"}
    assert kept.value("name", ["x", 1], never) == {"a": [1.5, None], "b": "é"}
    assert kept.value("name", ["x", 2], lambda: "other") == "other"
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for compute in (lambda: {"pixels": pixels}, never):
        (found,) = kept.arrays("name", ["x", 1], compute).values()
        assert found.dtype == np.uint8 and (found == pixels).all()
    for compute in (fill, never):
        assert (kept.folder("name", ["x", 1], compute) / "below/file").read_text() == "x"
    assert len(list((tmp_path / "stages").iterdir())) == 4
    assert not capsys.readouterr().out
    stages.Stages(tmp_path / "stages", verbose=True).value("name", ["x", 2], never)
    assert capsys.readouterr().out == "name: kept from an earlier run\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        kept.value("nan", [], lambda: [float("nan")])
    with pytest.raises(TypeError, match="not JSON serializable"):  # its text could be that of another
        kept.value("name", object(), never)


CUTS = [lambda data: data[:-9], lambda data: data[:20], lambda data: b""]
CHANGES = [*CUTS, lambda data: b"[]", lambda data: data.replace(b"12", b"13")]
CASES = [("value", lambda: 12, change) for change in CHANGES]
FLIPS = [lambda data, i=i: data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :] for i in (0, 20, 60, 80, 100, 150)]
CASES += [("arrays", lambda: {"a": np.arange(99)}, change) for change in CUTS + FLIPS]


@pytest.mark.parametrize(("kind", "compute", "damage"), CASES)
def test_a_corrupt_file_is_refused_by_name(tmp_path, kind, compute, damage):
    stage = getattr(stages.Stages(tmp_path), kind)
    stage("draw", 1, compute)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=f"{path} is corrupt; delete it"):
        stage("draw", 1, never)


DAMAGE = [
    lambda path: path.write_text(""),
    lambda path: path.write_text("y"),
    lambda path: path.unlink(),
    lambda path: path.rename(path.parent / "other"),
    lambda path: (path.parent / "more").touch(),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_with_a_changed_file_is_refused(tmp_path, damage):
    kept = stages.Stages(tmp_path)
    damage(kept.folder("name", 1, fill) / "below" / "file")
    with pytest.raises(ValueError, match=f"{tmp_path}/name-.* is corrupt; delete it"):
        kept.folder("name", 1, never)


def test_an_interrupted_stage_leaves_nothing(tmp_path):
    kept = stages.Stages(tmp_path)

    def interrupted(folder=None):
        if folder:
            fill(folder)
        raise KeyboardInterrupt

    for stage in (kept.value, kept.arrays, kept.folder):
        with pytest.raises(KeyboardInterrupt):
            stage("name", 1, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        stages.Stages(tmp_path / "file")


def test_interrupted_chunks_go_on_where_they_were(tmp_path):
    kept, seen = stages.Stages(tmp_path), []

    def double(items, start, stop=99):
        if start >= stop:
            raise KeyboardInterrupt
        seen.append(start)
        return [2 * item for item in items]

    with pytest.raises(KeyboardInterrupt):
        kept.chunks("double", {}, [1, 2, 3, 4, 5], 2, lambda *chunk: double(*chunk, stop=4))
    assert kept.chunks("double", {}, [1, 2, 3, 4, 5], 2, double) == [2, 4, 6, 8, 10]
    assert seen == [0, 2, 4]
