"""Adapters as a user brings them to the trainer: what is trained of them, and models of which nothing is."""

import copy

import pytest
import torch
from tiny import cache_files, lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import AutoModelForCausalLM

from mallowspo import AcceleratedRounds, AcceleratedTrainer
from mallowspo.adapters import add_adapter, check_adapter_off, without_adapter
from mallowspo.modeling import attach_token_stats, share_prompts

# What an adapter may hold, and how its reference is read.
ADAPTERS = {"lora": {}, "its own head": {"modules_to_save": ["lm_head"]}}
REFERENCES = {
    "cached": {"loss_type": "dpo", "precompute_ref_log_probs": True},
    "for the scale": {"loss_type": "mallows-theta"},
    "live": {"loss_type": "dpo"},
}


def partly_frozen(**options):
    """A PEFT model of which the second layer's adapter is trained alone."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("qwen2"), lora(init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.1." in name and "lora_" in name)
    return model


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_reference_pass_leaves_what_is_trained(adapter):
    model = partly_frozen(**ADAPTERS[adapter])
    before = trained_names(model)
    with without_adapter(model):
        assert trained_names(model) == before
    assert trained_names(model) == before and 0 < len(before) < len(list(model.parameters()))
    with pytest.raises(KeyError), without_adapter(model):
        raise KeyError
    assert trained_names(model) == before


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_frozen_part_of_an_adapter_stays_frozen(tmp_path, reference):
    """A pass with the adapter off made all of it trained: the second run, with a cache, was another than the first."""
    runs, options = [], {"eval_dataset": tiny_pairs(3, seed=1)} | REFERENCES[reference]
    for _ in range(2):
        model = partly_frozen()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = tiny_trainer(tmp_path, model=model, **options)
        trainer.train()
        trainer.evaluate()
        after = dict(model.named_parameters())
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert changed == trained_names(model) == [n for n in before if ".layers.1." in n and "lora_" in n]
        runs.append((train_logs(trainer), [value.tolist() for value in after.values()]))
    assert runs[0] == runs[1] and len(cache_files(tmp_path)) == (0 if reference == "live" else 2)


@pytest.mark.parametrize("init", ["pissa_niter_4", "OLoRA", "corda", "lora_ga", "loftq"])
def test_an_adapter_that_changed_the_weights_below_it(init):
    """As peft's LoraLayer does with each of them, whichever adapter is active."""
    model = add_adapter(tiny_model(), lora())
    model.add_adapter("other", lora())
    model.peft_config["other"].init_lora_weights = init  # what it does needs data or a GPU
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the weights below.*ref_model"):
        check_adapter_off(model, for_good=False)


def test_an_inactive_adapter_that_looks_for_its_invocation():
    model = add_adapter(tiny_model(), lora())
    model.add_adapter("other", lora(alora_invocation_tokens=[10]))
    attach_token_stats(model)
    assert "invocation tokens once in each row" in share_prompts(model, 32)


def test_trained_tokens_are_the_adapters(tmp_path):
    trainer = tiny_trainer(tmp_path, loss_type="dpo", peft_config=lora(trainable_token_indices={"embed_tokens": [5]}))
    assert any("trainable_tokens_" in name for name in trained_names(trainer.model))
    before = trainer.score(trainer.train_dataset)
    trainer.train()
    after = trainer.score(trainer.train_dataset)
    assert after["ref_chosen_logps"] == pytest.approx(before["chosen_logps"], rel=1e-6)


def test_a_reference_of_another_form_has_no_rounds(tmp_path):
    """It was found out in the middle of the extrapolation, after an epoch of training."""
    options = {"kind": AcceleratedTrainer, "alpha": 0.3, "loss_type": "dpo"}
    trainer = tiny_trainer(tmp_path, ref_model=tiny_model(), peft_config=lora(), **options)
    with pytest.raises(ValueError, match="parameter by parameter: pass one with the same parameters, .* that adapter"):
        AcceleratedRounds(trainer)
    model = add_adapter(tiny_model(), lora())
    AcceleratedRounds(tiny_trainer(tmp_path, model, ref_model=copy.deepcopy(model), **options))
    with pytest.raises(ValueError, match="the rounds need a reference of their own: pass ref_model"):
        AcceleratedRounds(tiny_trainer(tmp_path, model, ref_model=None, **options))


def frozen_models(folder):
    """Models as peft gives them: without a weight that is trained."""
    peft = pytest.importorskip("peft")
    for own in (tiny_model(), tiny_tokenizer()):
        own.save_pretrained(folder / "base")
    adapter = folder / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(adapter)
    yield peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    yield peft.AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True).merge_and_unload()
    yield str(adapter)


def test_a_model_with_nothing_to_train(tmp_path):
    """It ran for all its steps and came out as it was; what it is worth can be asked all the same."""
    for model in frozen_models(tmp_path):
        trainer = tiny_trainer(tmp_path / "run", model=model, eval_dataset=tiny_pairs(3, seed=1))
        assert trainer.evaluate()["eval_loss"] > 0 and len(trainer.score(trainer.train_dataset)["losses"]) == 6
        with pytest.raises(
            ValueError,
            match="no parameter of this .* requires a gradient.*is_trainable=True.*merge_and_unload.. call "
            "model.requires_grad_.True. or give a peft_config",
        ):
            trainer.train()


def test_an_optimizer_of_what_is_not_trained(tmp_path):
    """Made of the base model, whose parameters the adapter froze, or of another model: it ran and changed nothing."""
    peft = pytest.importorskip("peft")
    for options in ({"peft_config": lora()}, {"model": tiny_model(seed=1)}):
        model = tiny_model()
        given = {"model": model, "optimizers": (torch.optim.SGD(model.parameters(), lr=0.3), None)}
        trainer = tiny_trainer(tmp_path, **given | options)
        with pytest.raises(ValueError, match="optimizer holds no parameter .* a gradient.*get_peft_model"):
            trainer.train()
    model = peft.get_peft_model(tiny_model(), lora())  # the way out of it
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    before = trainer.score(trainer.train_dataset)["chosen_logps"]
    for _ in range(2):
        trainer.train()
    assert (trainer.score(trainer.train_dataset)["chosen_logps"] != before).all()


def test_the_ways_out_of_it(tmp_path):
    _, merged, folder = frozen_models(tmp_path)
    with_adapter = tiny_trainer(tmp_path / "run", model=copy.deepcopy(merged), peft_config=lora())
    for trainer in (with_adapter, tiny_trainer(tmp_path / "run", model=merged.requires_grad_(True))):
        before = trainer.score(trainer.train_dataset)["chosen_logps"]
        trainer.train()
        assert (trainer.score(trainer.train_dataset)["chosen_logps"] != before).all()
    with pytest.raises(ValueError, match="already has an adapter; merge it, or leave peft_config out"):
        tiny_trainer(tmp_path, model=folder, peft_config=lora())  # peft would have begun its adapter anew
