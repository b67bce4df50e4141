"""Where the trainer's dispersion comes from, and its scale."""

import math

import numpy as np
import pytest
import torch
from tiny import cache_files, tiny_model, tiny_pairs, tiny_trainer, train_logs

from mallowspo import _C, MallowsTrainer


def test_a_reference_free_objective_gets_its_dispersion_once(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="mallows-simpo", dispersion_scale=0.3, max_steps=2)
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    before = trainer.score(trainer.train_dataset)["neg_log_dispersion"]
    calls.clear()
    trainer.train()
    assert len(calls) == 2 and trainer.ref_model is None and len(cache_files(tmp_path)) == 1
    assert trainer.score(trainer.train_dataset)["neg_log_dispersion"] == pytest.approx(before, rel=1e-7)
    assert all(log["dispersion/neg_log_mean"] > 0 for log in train_logs(trainer))


def test_a_reference_free_objective_without_dispersion_reads_no_reference(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="simpo")
    trainer.train()
    assert trainer.ref_model is None and cache_files(tmp_path) == []
    assert not any("ref" in name or "dispersion" in name for log in train_logs(trainer) for name in log)
    for options in ({"ref_model": tiny_model()}, {"precompute_ref_log_probs": True}):
        with pytest.raises(ValueError, match=f"'simpo' reads no reference; leave out {next(iter(options))}"):
            tiny_trainer(tmp_path, loss_type="simpo", **options)


def test_auto_scale_makes_the_mean_factor_one(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=8, eval_dataset=tiny_pairs(4, seed=1))
    a = trainer.score(trainer.train_dataset)["neg_log_dispersion"]
    assert np.mean(2 * a) == pytest.approx(1, rel=1e-5) and a.std() > 0.01
    trainer.train()
    assert [log["dispersion/scale"] for log in train_logs(trainer)] == [trainer.dispersion_scale] * 2
    number = tiny_trainer(tmp_path, rows=8, dispersion_scale=0.25, max_steps=1)
    number.train()
    assert number.dispersion_scale == train_logs(number)[0]["dispersion/scale"] == 0.25
    ratio = a / number.score(number.train_dataset)["neg_log_dispersion"]
    assert ratio == pytest.approx([trainer.dispersion_scale / 0.25] * 8, rel=1e-5)


def test_the_index_is_over_all_outcomes_of_the_model(tmp_path):
    """A head is often wider than its tokenizer."""
    data = tiny_pairs(3)
    trainer = tiny_trainer(tmp_path, model=tiny_model(vocab_size=30), train_dataset=data, eval_dataset=data)
    scores = trainer.score(data)
    shares = (scores["ref_chosen_entropy"] + scores["ref_rejected_entropy"]) / (2 * math.log(30))
    assert trainer.evaluate()["eval_dispersion/entropy"] == pytest.approx(shares.mean(), rel=1e-5)
    assert scores["neg_log_dispersion"] == pytest.approx(-trainer.dispersion_scale * np.log(shares), rel=1e-5)


def test_a_column_that_is_not_read_may_mean_anything(tmp_path):
    data = tiny_pairs(6, agreement=[3, 5, 0, 1, 2, 4], neg_log_dispersion=[-1.0] * 6)
    for options in ({"loss_type": "dpo"}, {"dispersion_source": "entropy"}):
        logs = []
        for train in (data, data.remove_columns(["agreement", "neg_log_dispersion"])):
            trainer = tiny_trainer(tmp_path, train_dataset=train, **options)
            trainer.train()
            logs.append(train_logs(trainer))
        assert logs[0] == logs[1]
    with pytest.raises(ValueError, match="row 0: 'agreement' must be a number in .* got 3"):
        tiny_trainer(tmp_path, train_dataset=data, dispersion_source="agreement")


AGREEMENT = [0.6, 0.75, 0.99, 1.0, 0.500000001, 0.9]
MEASURED = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("loss_type, factor", [("mallows-theta", 0.5), ("mallows-hinge", 0.5), ("mallows-phi", 1.0)])
@pytest.mark.parametrize("scale", ["auto", 0.5])
def test_dispersion_from_the_agreement(tmp_path, loss_type, factor, scale):
    data = tiny_pairs(6, agreement=AGREEMENT)
    trainer = tiny_trainer(tmp_path, train_dataset=data, loss_type=loss_type, dispersion_scale=scale)
    capped = np.minimum(AGREEMENT, 0.99)
    expected = factor * np.log(capped / (1 - capped)) * (1 if scale == "auto" else scale)
    assert trainer.score(data)["neg_log_dispersion"] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert "dispersion/entropy" not in train_logs(trainer)[0]
    assert train_logs(trainer)[0]["dispersion/scale"] == (1 if scale == "auto" else scale)
    assert cache_files(tmp_path) == []  # no entropy needed


def test_dispersion_from_the_data(tmp_path):
    data = tiny_pairs(6, neg_log_dispersion=MEASURED)
    trainer = tiny_trainer(tmp_path, train_dataset=data, eval_dataset=data)
    assert trainer.score(data)["neg_log_dispersion"].tolist() == MEASURED and trainer.dispersion_scale == 1
    assert trainer.evaluate()["eval_dispersion/neg_log_mean"] == pytest.approx(np.mean(MEASURED))
    halved = tiny_trainer(tmp_path, train_dataset=data, dispersion_scale=0.5).score(data)["neg_log_dispersion"]
    assert (2 * halved).tolist() == MEASURED
    trainer.train()
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) for log in train_logs(trainer))


def test_choosing_between_sources(tmp_path):
    both = tiny_pairs(6, agreement=AGREEMENT, neg_log_dispersion=MEASURED)
    with pytest.raises(ValueError, match="both 'neg_log_dispersion' and 'agreement'; choose one by dispersion_source"):
        tiny_trainer(tmp_path, train_dataset=both)
    values = {}
    for source in ("agreement", "neg_log_dispersion", "entropy"):
        trainer = tiny_trainer(tmp_path, train_dataset=both, eval_dataset=both, dispersion_source=source)
        values[source] = trainer.score(both)["neg_log_dispersion"]
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert values["neg_log_dispersion"].tolist() == MEASURED
    assert values["agreement"][1] == pytest.approx(math.log(3) / 2) and values["entropy"].mean() == pytest.approx(0.5)
    tiny_trainer(tmp_path, train_dataset=both, loss_type="dpo")  # which reads neither


def test_a_data_set_without_the_column_is_refused(tmp_path):
    data = tiny_pairs(6, agreement=AGREEMENT)
    with pytest.raises(ValueError, match="train data set lacks the column 'neg_log_dispersion'"):
        tiny_trainer(tmp_path, train_dataset=data, dispersion_source="neg_log_dispersion")
    with pytest.raises(ValueError, match="^the eval data set lacks the column 'agreement', the .* 'mallows-theta'"):
        tiny_trainer(tmp_path, train_dataset=data, eval_dataset=tiny_pairs(2))
    with pytest.raises(ValueError, match="^the eval held out data set lacks the column 'agreement'"):
        tiny_trainer(tmp_path, train_dataset=data, eval_dataset={"held out": tiny_pairs(2)})
    with pytest.raises(ValueError, match="new data set lacks the column 'agreement'"):
        tiny_trainer(tmp_path, train_dataset=data).score(tiny_pairs(2))


def test_an_agreement_that_the_smoothed_link_would_not_return_is_refused(tmp_path):
    options = {"train_dataset": tiny_pairs(6, agreement=AGREEMENT), "loss_type": "mallows-phi"}
    with pytest.raises(ValueError, match="smoothing=2.0 changes the mallows-phi link.*set smoothing to 1 or less"):
        tiny_trainer(tmp_path, smoothing=2.0, **options)
    tiny_trainer(tmp_path, smoothing=2.0, dispersion_source="entropy", **options)
    tiny_trainer(tmp_path, smoothing=0.5, **options)


@pytest.mark.parametrize("value, error", [(-0.1, "row 1"), (math.inf, "row 1"), (math.nan, "row 1")])
def test_an_impossible_dispersion_is_refused(tmp_path, value, error):
    with pytest.raises(ValueError, match=f"{error}: 'neg_log_dispersion' must be a finite number >= 0"):
        tiny_trainer(tmp_path, train_dataset=tiny_pairs(2, neg_log_dispersion=[1.0, value]))


@pytest.mark.parametrize("head_gain, entropy", [(0.0, 1.0), (1e4, 0.0)])
@pytest.mark.parametrize("loss_type", ["mallows-theta", "mallows-phi"])
def test_a_reference_that_knows_all_or_nothing(tmp_path, head_gain, entropy, loss_type):
    """Normalised entropy 1 and 0: -log of it was 0 and infinite, and the run ended in NaN."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= head_gain
    trainer = tiny_trainer(tmp_path, model=model, loss_type=loss_type, eval_dataset=tiny_pairs(2, seed=1))
    assert math.isfinite(trainer.dispersion_scale) and math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.train()
    for log in train_logs(trainer):
        assert log["dispersion/entropy"] == pytest.approx(entropy, abs=0.01)
        assert all(math.isfinite(value) for value in log.values())


def test_another_version_asks_the_reference_again(tmp_path, monkeypatch):
    for version, files in (("0.1", 1), ("0.2", 2), ("0.2", 2)):
        monkeypatch.setitem(_C.build, "version", version)
        tiny_trainer(tmp_path)
        assert len(cache_files(tmp_path)) == files


def test_a_cache_that_cannot_be_written_stops_the_run_before_the_pass(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(MallowsTrainer, "_over_pairs", None)
    with pytest.raises(OSError, match="could not be written.*set reference_cache_dir"):
        tiny_trainer(tmp_path / "a", reference_cache_dir=str(tmp_path / "file"))
