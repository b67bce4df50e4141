"""What goes to the hub: model, tokenizer and card. The hub itself is replaced by a record of what it would get."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from tiny import cache_files, lora, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import AutoTokenizer

WEIGHTS = {False: {"model.safetensors", "config.json"}, True: {"adapter_model.safetensors", "adapter_config.json"}}


@pytest.fixture
def uploads(monkeypatch):
    """(repository, files, card) of every upload, as the folder was at that moment."""
    seen = []

    def create_repo(self, repo_id, **kwargs):
        return type("RepoUrl", (), {"repo_id": f"me/{repo_id.split('/')[-1]}"})

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **kwargs):
        folder = Path(folder_path)
        paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files = set(filter_repo_objects(paths, ignore_patterns=[*(ignore_patterns or []), "checkpoint-*/*"]))
        seen.append((repo_id, files, ModelCard.load(folder / "README.md")))
        job = Future()
        job.set_result(None)
        return job

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return seen


@pytest.mark.parametrize("adapter", [False, True])
def test_push_to_hub(tmp_path, uploads, adapter):
    trainer = tiny_trainer(tmp_path / "mine", **({"peft_config": lora()} if adapter else {}))
    trainer.train()
    trainer.push_to_hub(dataset_name="org/pairs", license="mit", tags="house")
    ((repository, files, card),) = uploads
    assert repository == "me/mine"
    assert cache_files(tmp_path / "mine") and not [name for name in files if "reference_cache" in name]
    assert files >= WEIGHTS[adapter] | {"tokenizer.json", "tokenizer_config.json", "README.md", "training_args.bin"}
    assert card.data.datasets == ["org/pairs"] and card.data.license == "mit"
    tags = card.data.tags
    assert {"mallowspo", "mallows-theta", "house"} < set(tags) and len(set(tags)) == len(tags)
    assert "# mine\n" in card.text and 'model="me/mine"' in card.text


@pytest.mark.parametrize("adapter", [False, True])
def test_pushing_while_training(tmp_path, uploads, adapter):
    """Each checkpoint's push, and the one of save_model: what transformers does with push_to_hub=True."""
    options = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/ours"}
    trainer = tiny_trainer(tmp_path, **options, **({"peft_config": lora()} if adapter else {}))
    trainer.train()
    trainer.save_model()
    assert [repository for repository, *_ in uploads] == ["me/ours"] * 3
    for (_, files, card), steps in zip(uploads, (1, 2, 2), strict=True):
        assert files >= WEIGHTS[adapter] | {"tokenizer.json", "README.md"}
        assert f"| steps done | {steps} |" in card.text and "mallowspo" in card.data.tags
        assert 'model="me/ours"' in card.text


def test_the_tokenizer_is_of_the_models_revision(tmp_path, monkeypatch):
    for part in (tiny_model(), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    asked, load = {}, AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **given: asked.update(given) or load(name, **given)
    )
    origin = {"revision": "v2", "dtype": "float32"}
    tiny_trainer(tmp_path, model=str(tmp_path / "model"), processing_class=None, model_init_kwargs=origin)
    assert asked == {"revision": "v2"}
