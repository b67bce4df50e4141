"""The dispersion recipe: shares against counting, indices against plain formulas, a whole run on a small archive."""

import hashlib
import json
import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from load_recipe import RECIPES, import_recipe, tar_of

from mallowspo.modeling import attach_token_stats, sequence_stats

data, indices, preference, report, run, reviews = import_recipe(
    "dispersion", "data", "indices", "preference", "report", "run", "reviews"
)
scores = st.lists(st.integers(-4, 4), min_size=1, max_size=8)
INNER_FOLDER = "hutto_ICWSM_2014"
WORDS = "good bad fine dull great poor nice sad".split()


def small_files(per_domain=16, raters=6):
    """{file name: text} in the archive's layout, with a byte order mark as some of its files have."""
    generator = np.random.default_rng(0)
    files = {}
    for stem in reviews.DOMAINS.values():
        texts, ratings = [], []
        for i in range(per_domain):
            words = " ".join(generator.choice(WORDS, 4))
            given = generator.integers(-4, 5, raters).tolist()
            texts.append(f"1_{i}\t{np.mean(given)}\t {words} {i}.")
            ratings.append(f"1_{i}\t{np.mean(given)}\t{np.std(given):.5f}\t{given}")
        files[f"{stem}_GroundTruth.txt"] = "\n".join(texts) + "\n"
        files[f"{stem}_anonDataRatings.txt"] = "\ufeff" + "\n".join(ratings) + "\n"
    return files


def write_archive(path, files, inner_name=reviews.INNER):
    inner = tar_of({f"{INNER_FOLDER}/{name}": text.encode() for name, text in files.items()})
    path.write_bytes(tar_of({f"vaderSentiment-3.3.2/{inner_name}": inner}))
    return path


# ---- data ----------------------------------------------------------------------------------------------------------


@given(scores, scores)
def test_shares_count_all_pairs_of_raters(first, second):
    above = sum(a > b for a, b in product(first, second))
    tied = sum(a == b for a, b in product(first, second))
    count = len(first) * len(second)
    assert data.win_shares(first, second) == pytest.approx((above / count, tied / count))
    assert data.preference_share(first, second) == pytest.approx((above + tied / 2) / count)
    assert data.preference_share(first, second) + data.preference_share(second, first) == pytest.approx(1)


def test_the_real_dispersion_is_that_of_the_link():
    a = data.real_dispersion([0.8, 0.2, 0.5, 1.0])
    assert a[0] == a[1] == pytest.approx(math.log(4) / 2)  # sigmoid(2 a) = 0.8
    assert 0 < a[2] < 0.02 and a[3] == pytest.approx(math.log(99) / 2)


def test_sentences_come_with_every_rating(tmp_path):
    files = small_files()
    first = files["tweets_anonDataRatings.txt"].lstrip("\ufeff").splitlines()[0]
    sentences = reviews.read_sentences(write_archive(tmp_path / "a.tar.gz", files))
    assert list(sentences) == list(reviews.DOMAINS) and all(len(part) == 16 for part in sentences.values())
    tweet = sentences["tweet"][0]
    assert tweet.domain == "tweet" and tweet.text.endswith(" 0.") and not tweet.text.startswith(" ")
    assert list(tweet.ratings) == json.loads(first.split("\t")[3])


def test_lengths_and_repeated_texts_are_left_out(tmp_path):
    files = small_files()
    files["tweets_GroundTruth.txt"] = (
        "1\t0\tToo short.\n2\t0\tthese are just five words\n3\t0\tTHESE are just five words\n"
    )
    files["tweets_anonDataRatings.txt"] = "".join(f"{i}\t0\t0\t[{i}, 0]\n" for i in (1, 2, 3))
    (only,) = reviews.read_sentences(write_archive(tmp_path / "a.tar.gz", files))["tweet"]
    assert only.ratings == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tweets_GroundTruth.txt": None}, "no tweets_GroundTruth.txt"),
        ({"tweets_GroundTruth.txt": "1_0\t0.5\n"}, "tweets_GroundTruth.txt, line 1: expected 3 columns, found 2"),
        ({"tweets_GroundTruth.txt": "7\t0\tone two three four\n"}, "tweets disagree about 17 sentences"),
        ({"tweets_GroundTruth.txt": "1\t0\ta b c d\n", "tweets_anonDataRatings.txt": "1\t0\t0\t[1, 5]\n"}, "-4 to 4"),
        ({"tweets_GroundTruth.txt": "1\t0\ta b c d\n", "tweets_anonDataRatings.txt": "1\t0\t0\t[1]\n"}, "two or more"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    files = {name: text for name, text in (small_files() | change).items() if text is not None}
    with pytest.raises(ValueError, match=message):
        reviews.read_sentences(write_archive(tmp_path / "a.tar.gz", files))


def test_damaged_and_other_archives_are_refused(tmp_path):
    whole = write_archive(tmp_path / "a.tar.gz", small_files())
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.tar.gz is damaged .* delete it"):
        reviews.read_sentences(tmp_path / "cut.tar.gz")
    with pytest.raises(ValueError, match="take the source archive"):
        reviews.read_sentences(write_archive(tmp_path / "b.tar.gz", {}, "README"))


def test_missing_download_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    failed = reviews.subprocess.CompletedProcess([], 1, stdout="ERROR: No matching distribution\n")
    monkeypatch.setattr(reviews.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"No matching distribution.*run: pip download --no-deps --no-binary vader"):
        reviews.fetch_archive()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / reviews.ARCHIVE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="delete it to fetch it again"):
        reviews.fetch_archive()


def test_pairs_are_disjoint_and_of_one_domain(tmp_path):
    sentences = reviews.read_sentences(write_archive(tmp_path / "a.tar.gz", small_files()))
    pairs = data.draw_pairs(sentences, 8, seed=1)
    texts = [(s.domain, s.text) for pair in pairs for s in pair]
    assert len(texts) == len(set(texts)) == 64
    assert all(first.domain == second.domain for first, second in pairs)
    assert data.draw_pairs(sentences, 3, seed=1)[:3] == pairs[:3]
    with pytest.raises(ValueError, match="movie review has 16 sentences, too few for 9"):
        data.draw_pairs(sentences, 9, seed=1)


# ---- the model and the indices -------------------------------------------------------------------------------------


@pytest.fixture
def language_model(tiny_model):
    attach_token_stats(tiny_model)
    return tiny_model.eval()


@torch.no_grad()
def test_sentence_stats_are_those_of_the_logits(language_model):
    generator = np.random.default_rng(0)
    prompts, texts = ([generator.integers(1, 250, n).tolist() for n in lengths] for lengths in ((3, 3, 2), (1, 5, 4)))
    done = []
    found = indices.sentence_stats(language_model, prompts, texts, 2, done.append)
    assert sum(done) == 3
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        output = language_model(torch.tensor([prompt + text]), output_hidden_states=True)
        logps = output.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert found["logps"][i] == pytest.approx(sum(logps[t, id].item() for t, id in enumerate(text)), rel=1e-4)
        assert found["entropy"][i] == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-4)
        assert found["tokens"][i] == len(text)
        hidden = output.hidden_states[-1][0, len(prompt) :].mean(0)
        torch.testing.assert_close(found["features"][i], hidden, rtol=1e-3, atol=1e-5)


def test_indices_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    pairs, vocabulary = 5, 50
    found = {
        f"{prompt}_{what}": torch.rand(pairs, 2, generator=generator) * size + 0.1
        for prompt in indices.WRITE
        for what, size in (("logps", -9.0), ("entropy", 3.0), ("tokens", 7.0))
    }
    found |= {
        "asked": torch.randn(pairs, 2, 3, generator=generator),
        "chosen": torch.randn(pairs, 2, generator=generator),
    }
    got = indices.agreement_indices(found, vocabulary)
    for i in range(pairs):
        row = {name: column[i].tolist() for name, column in found.items()}
        entropy = sum(row["neutral_entropy"]) / 2 / math.log(vocabulary)
        assert got[indices.PAPER][i] == pytest.approx(-math.log(entropy))
        entropy = sum(row["positive_entropy"]) / 2 / math.log(vocabulary)
        assert got["entropy index, positive prompt"][i] == pytest.approx(-math.log(entropy))
        a, b = (logps / tokens for logps, tokens in zip(row["neutral_logps"], row["neutral_tokens"], strict=True))
        assert got["margin per token"][i] == pytest.approx(abs(a - b))
        a, b = (up - down for up, down in zip(row["positive_logps"], row["negative_logps"], strict=True))
        assert got["contrast margin"][i] == pytest.approx(abs(a - b))
        difference = [a - b for a, b in zip(*row["asked"], strict=True)]
        assert got[indices.ASKED][i] == pytest.approx(abs(sum(difference) / 3))
        assert got["paraphrase variance"][i] == pytest.approx(math.log1p(1 / np.var(difference)))
        shares = [1 / (1 + math.exp(-d)) for d in difference]
        assert got["paraphrase variance of p"][i] == pytest.approx(math.log1p(1 / np.var(shares)))
        p = 1 / (1 + math.exp(-(row["chosen"][0] - row["chosen"][1]) / 2))
        outcome = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
        assert got["choice entropy"][i] == pytest.approx(-math.log(outcome), abs=2e-6)


# ---- the whole recipe ----------------------------------------------------------------------------------------------


def test_options():
    assert run.parse_arguments([]) == run.RecipeArguments()  # default.yaml says what the dataclass says
    assert run.parse_arguments(["--seeds", "5"]).seeds == 5
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        run.parse_arguments(["--seeds", "1"])
    with pytest.raises(ValueError, match="pairs_per_domain must be at least 5"):
        run.parse_arguments(["--pairs_per_domain", "4"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run.parse_arguments(["--batch_size", "0"])
    paper = run.parse_arguments(["--config", str(RECIPES / "dispersion" / "paper.yaml")])
    assert (paper.model, paper.dtype) == ("EleutherAI/pythia-2.8b", "bfloat16")
    assert paper.pairs_per_domain <= 1570 and paper.output_dir != run.RecipeArguments().output_dir


def test_a_wrong_option_ends_the_script_with_its_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--seeds", "1"])
    with pytest.raises(SystemExit, match="^run.py: error: seeds must be at least 2"):
        run.main()


@pytest.fixture
def small_options(tmp_path, monkeypatch, tiny_model, tiny_tokenizer):
    """Options of a run of seconds, on a small archive and a tiny model."""
    archive = write_archive(tmp_path / reviews.ARCHIVE, small_files())
    monkeypatch.setattr(reviews, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    monkeypatch.setattr(report, "RESAMPLES", 20)
    monkeypatch.setattr(preference, "PENALTIES", (1.0, 0.1))
    # One letter is a token of the tiny model, and both of these answers would begin with the same.
    monkeypatch.setattr(indices, "ASK", tuple((template, "p", "n") for template, *_ in indices.ASK))
    monkeypatch.setattr(indices, "CHOOSE", (indices.CHOOSE[0], "A", "B"))
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--pairs_per_domain", 8, "--seeds", 2]
    return [str(option) for option in [*options, "--train_votes", 80, "--held_out_pairs", 40]]


def test_a_whole_run_and_its_cache(tmp_path, monkeypatch, small_options):
    output = tmp_path / "out"
    run.main(small_options)
    names = {"results.json", "results.md", "correlation.png", "calibration.png", "preference.png", "cache"}
    assert {path.name for path in output.iterdir()} == names
    text = (output / "results.md").read_text()
    assert all(f"({name})" in text for name in names if name.endswith(".png"))
    results = json.loads((output / "results.json").read_text())
    assert [row["pairs"] for row in results["domains"].values()] == [8] * 4
    assert all(-1 <= row["all"][0] <= 1 for row in results["correlation"].values())
    assert set(results["preference"]) == {*preference.METHODS, preference.PEOPLE}

    # Again: from the cache, to the same numbers, without a pass of the model or a fit.
    with monkeypatch.context() as patch:
        patch.setattr(indices, "_hidden_states", None)
        patch.setattr(preference, "fit_head", None)
        run.main(small_options)
    assert json.loads((output / "results.json").read_text()) == results

    damaged = next((output / "cache").glob("tweet-neutral-*"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(ValueError, match="corrupt.*delete .*tweet-neutral"):
        run.main(small_options)
    damaged.unlink()
    damaged = next((output / "cache").glob("votes-0-*"))
    damaged.write_text("{")
    with pytest.raises(ValueError, match="votes-0-.*is corrupt.*delete it"):
        run.main(small_options)


def watch_batches(monkeypatch, see):
    """Shows every batch that the model is about to read."""

    def watched(read):
        return lambda model, batch: (see(batch), read(model, batch))[1]

    monkeypatch.setattr(indices, "_hidden_states", watched(indices._hidden_states))
    monkeypatch.setattr("mallowspo.dispersion.sequence_stats", watched(sequence_stats))


def test_an_interrupted_stage_is_done_again_and_no_other(tmp_path, monkeypatch, small_options):
    """Two domains of seven passes are through when the process dies in the middle of the third one's second."""
    passes, calls = 4 * 7, []  # one batch each

    def count(batch):
        calls.append(len(batch["input_ids"]))
        if len(calls) == 16:
            raise KeyboardInterrupt

    watch_batches(monkeypatch, count)
    with pytest.raises(KeyboardInterrupt):
        run.main(small_options)
    cache = tmp_path / "out" / "cache"
    assert len(list(cache.iterdir())) == 15 and not list(cache.glob("*.tmp"))
    assert not (tmp_path / "out" / "results.json").exists()
    run.main(small_options)
    assert len(calls) == 16 + passes - 15
    assert len(list(cache.glob("*.safetensors"))) == passes and (tmp_path / "out" / "results.json").exists()


@torch.no_grad()
def test_what_begins_a_sequence_has_the_tokenizers_bos(tmp_path, monkeypatch, language_model, tiny_tokenizer):
    def with_bos(text, add_special_tokens=True):
        return {"input_ids": [7] * add_special_tokens + tiny_tokenizer(text, add_special_tokens=False)["input_ids"]}

    read = []
    watch_batches(monkeypatch, lambda batch: read.append(batch["input_ids"]))
    reader = indices._Reader(language_model, with_bos, tmp_path, 4, indices.tqdm(disable=True))
    reader.write("write", "a:", ["good", "bad"])
    reader.ask("ask", ["good?", "bad?"], ("yes", "no"))
    assert len(read) == 2
    for batch in read:
        assert (batch == 7).sum(1).tolist() == [1, 1] and (batch[:, 0] == 7).all()


def test_answers_with_one_first_token_are_refused(tmp_path, language_model, tiny_tokenizer):
    pair = tuple(reviews.Sentence("tweet", text, (0,)) for text in ("one two", "three"))
    with pytest.raises(ValueError, match="begin with the same token"):
        indices.read_with_model(language_model, tiny_tokenizer, [pair], tmp_path, 4)


def test_the_code_of_the_page_runs(tmp_path, tiny_model, tiny_tokenizer):
    (block,) = re.findall(r"^```python\n(.*?)^```", (RECIPES / "dispersion" / "README.md").read_text(), re.M | re.S)
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    words = '[" positive", " negative"]'
    assert words in block
    namespace = {"NAME": tmp_path}
    code = block.replace(words, '["p", "n"]')  # a token each for the tiny model
    exec(compile(code, "README.md", "exec"), namespace)
    offset, slope, odds = (namespace[name] for name in ("offset", "slope", "log_odds"))
    expected = [max(0, offset + slope * abs(value)) / 2 for value in odds]
    assert len(set(odds)) == 4 and namespace["pairs"]["neg_log_dispersion"][:] == pytest.approx(expected)
