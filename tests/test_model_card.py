"""The card beside a saved model says what was done, and the hub's own parser reads it."""

import dataclasses
import re
import shutil
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer

import mallowspo
from mallowspo.model_card import markdown_table


def rows(card):
    """The cells of every table, by the first one of their row."""
    lines = re.findall(r"^\| (.*) \|$", card.text, re.M)
    return {first: rest for first, *rest in (line.split(" | ") for line in lines)}


def written(folder):
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def test_the_card_of_a_run(tmp_path):
    pairs = tiny_pairs(7).to_list()
    pairs[2]["prompt"] = "red " * 20
    train, held_out = Dataset.from_list(pairs), tiny_pairs(3, seed=1)
    trainer = tiny_trainer(
        tmp_path / "mine",
        train_dataset=train,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        max_length=20,
        beta=0.3,
        gradient_accumulation_steps=2,
        seed=11,
    )
    trainer.train()
    trainer.save_model()
    card = written(tmp_path / "mine")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["generated_from_trainer", "mallowspo", "mallows-theta"]
    assert card.data.base_model is None and card.data.datasets is None and card.data.eval_results is None
    assert card.text.strip().startswith("# mine\n")
    cells = rows(card)
    for name, value in dataclasses.asdict(trainer.objective).items():
        assert cells[name] == [str(value)]
    assert cells["beta"] == ["0.3"] and cells["link"] == ["mallows-theta"]
    scale = f"phi_star = {trainer.dispersion_scale:.6g}, calibrated on the training set"
    assert f"from the token entropies of the reference model; dispersion scale {scale}." in card.text
    assert "Reference: the model as it was before training." in card.text
    assert cells["train"] == ["not named", "7", "6", train._fingerprint]
    assert cells["eval"] == ["not named", "3", "3", held_out._fingerprint]
    settings = {"learning_rate": 0.01, "seed": 11, "max_length": 20, "steps done": 2, "pairs per step": 4}
    settings |= {"lr_scheduler_type": "linear", "optim": trainer.args.optim.value}
    assert {name: cells[name] for name in settings} == {name: [str(value)] for name, value in settings.items()}
    assert cells["parameters trained"] == [str(trainer.model.num_parameters())]
    loss = trainer.score(held_out)["losses"].mean()
    assert cells["step"] == ["2"] and float(cells["eval_loss"][0]) == pytest.approx(loss, rel=1e-4)
    for name, package in {"mallowspo": "mallowspo", "Transformers": "transformers", "PyTorch": "torch"}.items():
        number = mallowspo.__version__ if package == "mallowspo" else version(package)
        assert f"\n- {name} {number}\n" in card.text
    assert f"\n- Datasets {version('datasets')}\n- Accelerate {version('accelerate')}\n" in card.text
    assert "title     = {{MallowsPO}: Fine-Tune" in card.text and "arXiv:2405.14953" in card.text


METHODS = {
    "a measured dispersion": (
        {"train_dataset": tiny_pairs(3, agreement=[0.6, 0.8, 0.7])},
        ["the column `agreement`", "phi_star = 1."],
    ),
    "a given scale": ({"dispersion_scale": 0.25}, ["reference model; dispersion scale phi_star = 0.25."]),
    "no dispersion": (
        {"loss_type": ["dpo"]},
        ["with mallowspo, method `dpo`", "the method uses none", "Reference: the model as it was before"],
    ),
    "no reference": ({"loss_type": "simpo"}, ["Reference: none."]),
    "an adapter": ({"peft_config": None}, ["Reference: the model with its adapter off.", "LORA, r 2, lora_alpha 8"]),
    "a second model": ({"ref_model": None}, ["Reference: `org/reference`."]),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_references(tmp_path, name):
    options, told = METHODS[name]
    if "peft_config" in options:
        options = {"peft_config": lora()}
    if "ref_model" in options:
        options = {"ref_model": tiny_model()}
        options["ref_model"].config._name_or_path = "org/reference"
    trainer = tiny_trainer(tmp_path, **options)
    trainer.create_model_card()
    card = written(tmp_path)
    for text in told:
        assert text in card.text
    assert "These weights were not evaluated." in card.text and rows(card)["steps done"] == ["0"]
    assert ("MallowsPO" in card.text) == trainer.objective.uses_dispersion
    assert trainer.args.loss_type in card.data.tags and ("lora" in card.data.tags) == ("peft_config" in options)


def test_what_its_writer_knows_better(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "org/base"
    trainer = tiny_trainer(tmp_path, model=model, peft_config=lora(), eval_dataset=tiny_pairs(3, seed=1))
    accuracy = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.create_model_card("Mine", "org/pairs", "house", license="mit", language="en")
    card = written(tmp_path)
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/pairs"]
    assert card.data.license == "mit" and card.data.language == "en" and card.data.library_name == "peft"
    assert {"house", "lora", "base_model:adapter:org/base"} < set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", accuracy, "org/pairs")
    assert "# Mine\n" in card.text and "[org/base](https://huggingface.co/org/base)" in card.text
    assert f"\n- PEFT {version('peft')}\n" in card.text and rows(card)["train"][0] == "org/pairs"
    trainer.model.save_pretrained(tmp_path)  # PEFT adds to a card it finds, by the headings it knows
    assert written(tmp_path).text.rstrip() == card.text.rstrip()


def test_folders_of_this_machine_stay_out_of_it(tmp_path):
    folder = tmp_path / "secret" / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    trainer = tiny_trainer(tmp_path / "mine", model=str(folder), ref_model=str(folder), processing_class=None)
    trainer.save_model()
    text = (tmp_path / "mine/README.md").read_text()
    assert "Fine-tuned from `base`" in text and "Reference: `base`." in text
    assert "secret" not in text and written(tmp_path / "mine").data.base_model is None
    shutil.rmtree(folder)
    trainer.create_model_card()
    assert (tmp_path / "mine/README.md").read_text() == text


@pytest.mark.parametrize("adapter", [False, True])
def test_every_saved_model_has_one(tmp_path, adapter):
    options = {"peft_config": lora()} if adapter else {}
    trainer = tiny_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, **options)
    trainer.train()
    trainer.save_model(tmp_path / "elsewhere")
    for folder, steps in {"run/checkpoint-1": "1", "run/checkpoint-2": "2", "elsewhere": "2"}.items():
        assert rows(written(tmp_path / folder))["steps done"] == [steps], folder


def test_the_evaluation_is_that_of_the_saved_weights(tmp_path):
    held_out = tiny_pairs(6, seed=1)
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=held_out,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=6,
        learning_rate=5e-2,
    )
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_global_step < 6
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert rows(written(tmp_path))["step"] == [str(trainer.state.best_global_step)]
    for folder, loss in {
        "checkpoint-6": losses[6],
        ".": trainer.score(held_out)["losses"].mean(),
    }.items():
        assert float(rows(written(tmp_path / folder))["eval_loss"][0]) == pytest.approx(loss, rel=1e-4)


def test_the_best_step_is_that_of_its_checkpoint(tmp_path):
    """An evaluation may be better where no checkpoint is; then other weights are loaded, or none."""
    held_out, options = tiny_pairs(5, seed=1), {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=held_out,
        load_best_model_at_end=True,
        save_steps=2,
        max_steps=4,
        learning_rate=0.1,  # so much that the first step is the best one
        **options,
    )
    trainer.train()
    trainer.save_model()
    loss = trainer.score(held_out)["losses"].mean()
    assert trainer.state.best_global_step == 1
    assert float(rows(written(tmp_path))["eval_loss"][0]) == pytest.approx(loss, rel=1e-4)


def test_a_batch_that_was_made_smaller(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4)
    trainer._train_batch_size = 2  # as by auto_find_batch_size
    trainer.create_model_card()
    cells = rows(written(tmp_path))
    assert cells["per_device_train_batch_size"] == cells["pairs per step"] == ["2"]


def test_several_evaluation_sets(tmp_path):
    sets = {"a": tiny_pairs(3, seed=1), "b": tiny_pairs(4, seed=2)}
    trainer = tiny_trainer(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    trainer.create_model_card()
    cells = rows(written(tmp_path))
    for name, data in sets.items():
        assert cells[f"eval {name}"][1] == str(len(data))
        assert float(cells[f"eval_{name}_loss"][0]) == pytest.approx(metrics[f"eval_{name}_loss"], rel=1e-4)
    assert not any("runtime" in name or "per_second" in name for name in cells)


def test_a_set_that_was_exchanged_is_none_of_the_data(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_pairs(3, seed=1))
    trainer.create_model_card()
    assert {"train", "eval"} <= rows(written(tmp_path)).keys()
    trainer.eval_dataset = tiny_pairs(4, seed=2)
    trainer.create_model_card()
    cells = rows(written(tmp_path))
    assert "train" in cells and "eval" not in cells


def test_the_first_rank_writes_it(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_only_what_is_trained_is_counted(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=lora())
    trainer.create_model_card()
    count = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name)
    assert rows(written(tmp_path))["parameters trained"] == [str(count)]


def test_weights_that_other_ranks_hold_are_counted(tmp_path):
    """ZeRO-3 leaves an empty tensor, with the number of its elements."""
    trainer = tiny_trainer(tmp_path)
    expected, head = trainer.model.num_parameters(), trainer.model.lm_head.weight
    head.ds_numel, head.data = head.numel(), torch.empty(0)
    trainer.create_model_card()
    assert rows(written(tmp_path))["parameters trained"] == [str(expected)]


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_the_quick_start_asks_as_the_tokenizer_takes_it(tmp_path, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tiny_trainer(tmp_path, processing_class=tokenizer).create_model_card()
    question = '"What is a GPU?"' if template is None else '[{"role": "user", "content": "What is a GPU?"}]'
    assert f"generator({question}, max_new_tokens" in written(tmp_path).text


def test_a_folder_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("org/base")
    tiny_trainer(tmp_path / "mine", model="org/base").create_model_card()
    card = written(tmp_path / "mine")
    assert card.data.base_model is None and "Fine-tuned from `base`" in card.text


def test_the_batch_of_all_ranks(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(mallowspo.MallowsConfig, "world_size", 4)
    trainer.create_model_card()
    assert rows(written(tmp_path))["pairs per step"] == ["8"]


def test_the_reference_that_gives_the_dispersion_alone(tmp_path):
    tiny_trainer(tmp_path, loss_type="mallows-simpo").create_model_card()
    assert "Reference: the model as it was before training." in written(tmp_path).text


def test_a_cell_stays_one_cell():
    assert markdown_table(("a", "b"), [("x\ny", "p|q")]) == "| a | b |\n| --- | --- |\n| x<br>y | p\\|q |"


def test_no_clock(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_pairs(3, seed=1))
    assert "eval_model_preparation_time" in trainer.evaluate()
    trainer.create_model_card()
    assert not any("time" in name or "per_second" in name for name in rows(written(tmp_path)))
