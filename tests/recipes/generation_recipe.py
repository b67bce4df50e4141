"""What the tests of controllable generation share: its modules, an archive and models of a few kilobytes."""

import pytest
import torch
from load_recipe import RECIPES, import_recipe, tar_of
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

FOLDER = RECIPES / "controllable_generation"
compare, run, report, sampling, preferences, reviews = import_recipe(
    "controllable_generation", "compare", "run", "report", "sampling", "preferences", "reviews"
)


@pytest.fixture
def small_archive(tmp_path, monkeypatch):
    """An archive of 30 sentences a domain where the recipe looks for the real one."""
    inner = {}
    for domain, stem in reviews.DOMAINS.items():
        rows = [(str(i), f"{domain} number {i} is all about item {i} and no more") for i in range(30)]
        inner[f"x/{stem}_GroundTruth.txt"] = "".join(f"{key}\t0.5\t{text}\n" for key, text in rows).encode()
        ratings = "".join(f"{key}\t0.5\t0.1\t[1, -2, 0]\n" for key, _ in rows)
        inner[f"x/{stem}_anonDataRatings.txt"] = ratings.encode()
    data = tar_of({f"vader/{reviews.INNER}": tar_of(inner)})
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reviews, "ARCHIVE_SHA256", reviews.hashlib.sha256(data).hexdigest())
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / reviews.ARCHIVE
    path.write_bytes(data)
    return path


@pytest.fixture
def byte_model(tmp_path):
    """A folder with a random model that reads bytes."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def save_classifier(folder):
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=64, pad_token_id=0)
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config).eval()
    model.score.weight.data *= 50
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def command(model, out, **options):
    chosen = {
        "model": model,
        "output_dir": out,
        "grid": '{"dpo": [0.1], "mallows-simpo": [2.0]}',
        "seeds": 2,
        "train_prefixes": 4,
        "eval_prefixes": 2,
        "sft_texts": 8,
        "max_new_tokens": 4,
        "sample_batch_size": 3,
        "min_gap": -1,  # what random bytes say has no sentiment
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "max_length": 80,
        "use_cpu": "true",
        "save_strategy": "no",
        "report_to": "none",
    } | options
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
