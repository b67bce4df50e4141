"""Dispersion from measurements, its scale, and the cached pass of the reference: its key and its file."""

import errno
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import lora, tiny_model

from mallowspo import functional as F
from mallowspo import reference
from mallowspo.dispersion import (
    AGREEMENT_CEILING,
    agreement_to_neg_log_dispersion,
    answer_log_odds,
    calibrated_scale,
    fingerprint,
    fit_log_odds,
    load_cache,
    log_odds_to_neg_log_dispersion,
    save_cache,
)

THETA_LINKS = ("mallows-theta", "mallows-ipo", "mallows-hinge")
SHARES = st.floats(0.5, AGREEMENT_CEILING, exclude_min=True)


# Agreement


@given(SHARES, st.sampled_from(THETA_LINKS))
def test_theta_link_returns_the_agreement(share, link):
    (a,) = agreement_to_neg_log_dispersion([share], link)
    assert 1 / (1 + np.exp(-2 * a)) == pytest.approx(share, rel=1e-14)
    assert a > 0 or share < 0.5 + 1e-15


@given(SHARES)
def test_phi_link_returns_the_agreement(share):
    (a,) = agreement_to_neg_log_dispersion([share], "mallows-phi")
    one = torch.ones(1, dtype=torch.float64)
    assert F.mallows_log_prob(one, torch.tensor([a])).exp().item() == pytest.approx(share, rel=1e-12)
    assert np.exp(reference.mallows_log_prob(1.0, a)[0]) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("link", sorted(F.MALLOWS_LINKS))
def test_agreement_above_the_ceiling_counts_as_the_ceiling(link):
    values = agreement_to_neg_log_dispersion([0.75, AGREEMENT_CEILING, 0.995, 1.0, 1], link)
    assert values.dtype == np.float64 and values.shape == (5,)
    assert values[1] == values[2] == values[3] == values[4] > values[0] > 0 and np.isfinite(values).all()
    factor = 1 if link == "mallows-phi" else 0.5
    assert values[:2] == pytest.approx([factor * np.log(3), factor * np.log(99)])


@pytest.mark.parametrize("value", [0.5, 0.0, -1.0, 1.0000001, np.nan, np.inf])
def test_agreement_outside_its_range(value):
    with pytest.raises(ValueError, match=rf"\(0.5, 1\], got {value}.* at index 1"):
        agreement_to_neg_log_dispersion([0.7, value, 0.2], "mallows-theta")


@pytest.mark.parametrize("link", ["bradley-terry", "ipo", "nonsense"])
def test_a_link_without_dispersion_has_no_inverse(link):
    with pytest.raises(ValueError, match=f"'{link}' has no dispersion.*mallows-phi"):
        agreement_to_neg_log_dispersion([0.7], link)


# A model's opinion

LOG_ODDS = st.lists(st.floats(-20, 20), min_size=1, max_size=20)


@given(LOG_ODDS, st.sampled_from(sorted(F.MALLOWS_LINKS)), st.floats(-3, 3), st.floats(0, 3))
def test_log_odds_stand_for_the_agreement_that_the_link_then_returns(log_odds, link, offset, slope):
    a = log_odds_to_neg_log_dispersion(log_odds, link, offset=offset, slope=slope)
    logit = np.array([max(offset + slope * abs(x), 0.0) for x in log_odds])
    assert a.dtype == np.float64 and a == pytest.approx(logit / (1 if link == "mallows-phi" else 2))
    known = logit[(logit > 1e-6) & (logit < np.log(99))]
    if len(known):
        share = 1 / (1 + np.exp(-known))
        expected = agreement_to_neg_log_dispersion(share, link)
        assert log_odds_to_neg_log_dispersion(-known, link) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(0.1, 2))
def test_offset_and_slope_are_found_again(seed, offset, slope):
    index = np.random.default_rng(seed).uniform(1.5, 3, 30)
    logit = offset + slope * index
    index, logit = index[(logit >= 0) & (logit < 4.5)], logit[(logit >= 0) & (logit < 4.5)]
    if len(index) < 3:
        return
    signs = np.where(np.arange(len(index)) % 2, 1, -1)
    assert fit_log_odds(signs * index, 1 / (1 + np.exp(-logit))) == pytest.approx((offset, slope), abs=1e-3)


@pytest.mark.parametrize("index", [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]], ids=["the wrong way round", "all the same"])
def test_an_index_that_says_nothing_gives_the_mean_agreement(index):
    assert fit_log_odds(index, [0.9, 0.8, 0.55]) == pytest.approx((np.log(3), 0.0))


def test_fitted_line_beats_its_neighbours():
    generator = np.random.default_rng(0)
    index, agreement = generator.exponential(size=200), generator.uniform(0.5, 1, 200)
    agreement = np.maximum(agreement, 1 / (1 + np.exp(-0.5 * index)))

    def likelihood(offset, slope):
        share, target = 1 / (1 + np.exp(-offset - slope * index)), np.minimum(agreement, AGREEMENT_CEILING)
        return np.sum(target * np.log(share) + (1 - target) * np.log(1 - share))

    offset, slope = fit_log_odds(index, agreement)
    assert slope > 0.05
    for change in (1e-3, -1e-3):
        assert likelihood(offset, slope) > likelihood(offset + change, slope)
        assert likelihood(offset, slope) > likelihood(offset, slope + change)


@pytest.mark.parametrize(
    ("log_odds", "agreement", "message"),
    [
        ([1.0, np.nan], [0.6, 0.7], "log_odds must be finite, got nan"),
        ([1.0, 2.0], [0.6], r"shapes \(1,\) and \(2,\)"),
        ([], [], r"shapes \(0,\)"),
        ([1.0, 2.0], [0.6, 0.4], r"\[0.5, 1\], got 0.4 at index 1"),
        ([1.0], [np.nan], "got nan at index 0"),
    ],
)
def test_bad_opinions(log_odds, agreement, message):
    with pytest.raises(ValueError, match=message):
        fit_log_odds(log_odds, agreement)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@given(
    questions=st.lists(st.lists(st.integers(3, 19), min_size=1, max_size=6), min_size=1, max_size=5),
    answers=st.lists(st.integers(3, 19), min_size=2, max_size=2, unique=True),
    batch_size=st.integers(1, 3),
)
def test_answers_are_compared_as_next_tokens(model_type, questions, answers, batch_size):
    model, done = tiny_model(model_type).eval(), []
    expected = torch.empty(len(questions))
    for i, question in enumerate(questions):
        with torch.no_grad():
            logps = model(torch.tensor([question])).logits[0, -1].double().log_softmax(-1)
        expected[i] = logps[answers[0]] - logps[answers[1]]
    found = answer_log_odds(model.train(), questions, answers, batch_size, done.append)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer_log_odds(model, questions, answers[::-1]), -expected, rtol=1e-4, atol=1e-5)
    assert model.training and sum(done) == len(questions) and max(done) <= batch_size


def test_a_question_has_the_same_answer_in_a_batch_and_alone():
    model, questions = tiny_model(), [[5], [3, 9, 12, 4, 17, 8], [6, 6, 7], [19, 3]]
    together = answer_log_odds(model, questions, [7, 8])
    assert together.abs().min() > 0.01 and not together.requires_grad
    for question, odds in zip(questions, together, strict=True):
        torch.testing.assert_close(answer_log_odds(model, [question], [7, 8]), odds[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_answers_of_other_weights_are_float32(dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 6]])).logits[0, -1].double()
    found = answer_log_odds(model, torch.tensor([[5, 9, 6]]), np.array([7, 8]))  # what else ids may come in
    expected = (logits[7] - logits[8])[None].float()
    torch.testing.assert_close(found, expected, **({"rtol": 3e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}))


def test_no_questions_have_no_answers():
    assert answer_log_odds(tiny_model(), [], [7, 8]).shape == (0,)


@pytest.mark.parametrize(
    ("questions", "answers", "batch_size", "error", "message"),
    [
        ([[5]], [7, 7], 1, ValueError, "begin with the same token, 7"),
        ([[5]], [7, 8, 9], 1, ValueError, r"answers must be two token ids.* got \[7, 8, 9\]"),
        ([[5]], [[7], [8]], 1, TypeError, r"answers must be a list of token ids, got \[\[7\], \[8\]\]"),
        ([[5]], [" yes", " no"], 1, TypeError, r"answers must .* got \[' yes', ' no'\]; tokenize"),
        ([[5]], [7, 20], 1, ValueError, "token 20 of answers is outside the vocabulary of 20"),
        ([[5], []], [7, 8], 1, ValueError, "question 1 has no tokens"),
        ([[5], [6, -1]], [7, 8], 1, ValueError, "token -1 of question 1 is outside"),
        ([[5], "good?"], [7, 8], 1, TypeError, "question 1 must be a list of token ids, got 'good[?]'"),
        ([5, 6], [7, 8], 1, TypeError, "question 0 must be a list of token ids, got 5"),
        ({"input_ids": [[5]]}, [7, 8], 1, TypeError, "question 0 must be .* got 'input_ids'"),
        ([[5.5]], [7, 8], 1, TypeError, r"question 0 must be .* got \[5.5\]"),
        ([[5]], [7, 8], 0, ValueError, "batch_size must be at least 1, got 0"),
        ([[5]], [7, 8], -1, ValueError, "batch_size must be at least 1, got -1"),  # gave whatever was in memory
    ],
)
def test_questions_without_an_answer(questions, answers, batch_size, error, message):
    with pytest.raises(error, match=message):
        answer_log_odds(tiny_model(), questions, answers, batch_size)


def test_log_odds_that_cannot_be_a_dispersion():
    with pytest.raises(ValueError, match="log_odds must be finite, got -inf"):
        log_odds_to_neg_log_dispersion([0.0, -np.inf], "mallows-theta")
    with pytest.raises(ValueError, match="'ipo' has no dispersion"):
        log_odds_to_neg_log_dispersion([1.0], "ipo")


# Scale


@given(st.lists(st.floats(1e-6, 14.0), min_size=1, max_size=20))
def test_calibrated_scale_makes_the_mean_factor_one(values):
    assert np.mean(2 * calibrated_scale(values) * np.array(values)) == pytest.approx(1, rel=1e-12)
    assert calibrated_scale(torch.tensor(values, dtype=torch.float64)) == calibrated_scale(values)


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_scale_that_cannot_be_calibrated(values):
    with pytest.raises(ValueError, match="cannot calibrate.*give a number"):
        calibrated_scale(np.array(values))


@pytest.mark.parametrize("entropy, at_most", [(0.0, 1e-6), (np.log(1000), 1 - 1e-6)])
def test_entropy_at_its_ends_gives_a_finite_dispersion(entropy, at_most):
    """Entropy 0 (a certain reference) gave infinity, entropy log V a pair without a gradient."""
    ends = torch.full((2,), entropy, dtype=torch.float64)
    a = F.neg_log_dispersion(ends, ends, 1000)
    assert a.numpy() == pytest.approx([-np.log(at_most)] * 2, rel=1e-9) and (a > 0).all()


# Key

TOKENS = {"prompt_ids": [[1, 5], [1]], "chosen_ids": [[7, 2], [8, 9, 2]], "rejected_ids": [[6, 2], [2]]}
DATA = Dataset.from_dict(TOKENS)
SETTINGS = {"version": "1", "mixed_precision": "no"}


def key(model=None, data=DATA, settings=SETTINGS):
    return fingerprint(tiny_model() if model is None else model, data, settings)


def test_the_same_model_and_data_have_the_same_key(tmp_path):
    model = tiny_model()
    wider = DATA.add_column("row", [0, 1])  # columns that the pass does not read
    assert key(model) == key() == key(model, wider) == key(model, settings=dict(reversed(SETTINGS.items())))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.config.use_cache = not loaded.config.use_cache
    assert key(loaded) == key()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_one_changed_weight_changes_the_key(name):
    model = tiny_model()
    with torch.no_grad():
        flat = model.get_parameter(name).view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    assert key(model) != key()


def test_a_changed_buffer_dtype_or_config_changes_the_key():
    """Neither is in the weights: stale numbers of another rotary base, norm or precision must not be taken."""
    buffer = tiny_model()
    buffer.model.rotary_emb.inv_freq[1] *= 2
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    keys = [key(), key(buffer), key(tiny_model().double()), key(eager)]
    keys += [key(tiny_model(rms_norm_eps=1e-3)), key(tiny_model(hidden_act="gelu")), key(tiny_model("mistral"))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("column", TOKENS)
def test_changed_tokens_change_the_key(column):
    for row, position in ((0, 0), (1, -1)):
        tokens = {name: [list(ids) for ids in rows] for name, rows in TOKENS.items()}
        tokens[column][row][position] += 1
        assert key(data=Dataset.from_dict(tokens)) != key()


def test_moved_boundaries_and_rows_change_the_key():
    moved = TOKENS | {"chosen_ids": [[7, 2, 8], [9, 2]]}
    swapped = {name: rows[::-1] for name, rows in TOKENS.items()}
    between = {"prompt_ids": [[1], [1]], "chosen_ids": [[5, 7, 2], [8, 9, 2]], "rejected_ids": [[5, 6, 2], [2]]}
    keys = [key(), *(key(data=Dataset.from_dict(tokens)) for tokens in (moved, swapped, between))]
    keys.append(key(data=DATA.select([0])))
    assert len(set(keys)) == len(keys)


def test_settings_change_the_key():
    assert key(settings=SETTINGS | {"mixed_precision": "bf16"}) != key() != key(settings=SETTINGS | {"new": 1})


@pytest.mark.parametrize(
    "lora", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}]
)
def test_adapters_do_not_change_the_key(lora):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    )
    assert key(model) == key()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert key(model) == key()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] += 1
    assert key(model) != key()


@pytest.mark.parametrize("change", ["weight", "alpha", "off"])
def test_an_adapter_that_is_part_of_the_reference_changes_the_key(change):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora(init_lora_weights=False))
    before = fingerprint(model, DATA, SETTINGS, with_adapter=True)
    assert before == fingerprint(model, DATA, SETTINGS, with_adapter=True) != key(model)
    if change == "weight":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] += 1
    elif change == "alpha":
        model.peft_config["default"].lora_alpha *= 2
    else:
        model.add_adapter("other", lora(init_lora_weights=False))
        model.set_adapter("other")
    assert fingerprint(model, DATA, SETTINGS, with_adapter=True) != before


# File

COLUMNS = {
    "ref_chosen_logps": torch.tensor([-1.5, -0.0, float("-inf"), 1e-45, float("nan")]),
    "ref_chosen_entropy": torch.tensor([0.1, 0.2, 0.3, 1 / 3, 3e38]),
}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some" / "folder" / "abc.safetensors"
    save_cache(path, COLUMNS, "abc")
    return path


def test_round_trip_is_exact(path):
    assert same_bits(load_cache(path, "abc", 5), COLUMNS)
    assert os.listdir(path.parent) == ["abc.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_cache_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"corrupt.*delete {path}"):
        load_cache(path, "abc", 5)


def test_any_flipped_byte_is_refused(path):
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    described = json.loads(whole[8 : 8 + header])
    assert described["__metadata__"].keys() == {"fingerprint", "checksum"}
    for position in range(len(whole)):
        raw = bytearray(whole)
        raw[position] ^= 0x15
        path.write_bytes(raw)
        try:
            found = load_cache(path, "abc", 5)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a blank of the header's padding, say: nothing that says anything
            assert same_bits(found, COLUMNS), position
    assert 8 + header < len(whole)


def test_a_cache_of_another_model_is_refused(path, tmp_path):
    other = tmp_path / "def.safetensors"
    shutil.copy(path, other)  # under the other's name
    with pytest.raises(ValueError, match=f"belongs to another model, data set or setting; delete {other}"):
        load_cache(other, "def", 5)


def test_a_file_of_somebody_else_is_refused(path):
    from safetensors.torch import save_file

    save_file(COLUMNS, path)
    with pytest.raises(ValueError, match=f"another model.*{path}"):
        load_cache(path, "abc", 5)
    path.write_text("not even that")
    with pytest.raises(ValueError, match=f"corrupt.*{path}"):
        load_cache(path, "abc", 5)


@pytest.mark.parametrize("rows", [4, 6, 0])
def test_a_cache_of_another_length_is_refused(path, rows):
    with pytest.raises(ValueError, match=f"length.*{path}"):
        load_cache(path, "abc", rows)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """Takes half of what is written."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        full_disk()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    if call == "write":
        monkeypatch.setattr("mallowspo.files.open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, call, full_disk)
    path = tmp_path / "cache" / "abc.safetensors"
    with pytest.raises(OSError, match="could not be written.*free space or set reference_cache_dir") as caught:
        save_cache(path, COLUMNS, "abc")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert os.listdir(path.parent) == []


def test_a_failed_write_keeps_the_cache_that_was_there(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="could not be written"):
        save_cache(path, {name: column + 1 for name, column in COLUMNS.items()}, "abc")
    assert os.listdir(path.parent) == ["abc.safetensors"] and same_bits(load_cache(path, "abc", 5), COLUMNS)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not be written.*set reference_cache_dir"):
        save_cache(tmp_path / "file" / "abc.safetensors", COLUMNS, "abc")
