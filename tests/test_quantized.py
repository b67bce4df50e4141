"""QLoRA: adapters on 4-bit weights train as on the same weights dequantised; the reference is the adapter off."""

import math

import pytest
import torch
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mallowspo.data import tokenize_pairs
from mallowspo.dispersion import fingerprint

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: extra [qlora]")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64 weights


@pytest.fixture
def folder(tmp_path):
    tiny_model(**WIDE).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bits(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4), dtype=dtype)


def dequantized(folder):
    """The plain model with the values that the 4-bit weights stand for."""
    plain, quantized = tiny_model(**WIDE), dict(four_bits(folder).named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if hasattr(quantized[name], "quant_state"):
                values = bitsandbytes.functional.dequantize_4bit(quantized[name].data, quantized[name].quant_state)
                assert not torch.equal(values, parameter)
                parameter.copy_(values)
    return plain


@pytest.mark.parametrize("loss", [{"dispersion_scale": 0.3}, {}], ids=["live reference", "cached reference"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_as_on_the_dequantised_weights(tmp_path, folder, loss, checkpointing):
    logs = []
    for model in (four_bits(folder), dequantized(folder)):
        trainer = tiny_trainer(
            tmp_path / str(len(logs)),
            model=model,
            peft_config=lora(init_lora_weights=False),
            eval_dataset=tiny_pairs(3, seed=1),
            eval_strategy="steps",  # an evaluation on the way must not stop the gradients
            eval_steps=1,
            max_steps=3,
            gradient_checkpointing=checkpointing,
            **loss,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        logs.append(train_logs(trainer))
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    for found, expected in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4) and found["grad_norm"] > 0.01


def test_a_model_that_has_been_used_before(tmp_path, folder):
    """On some processors the first evaluation repacks the weights, and no gradient passed them from then on."""
    model = four_bits(folder).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 5, 6]]))
    trainer = tiny_trainer(tmp_path, model=model, peft_config=lora(), loss_type="dpo")
    trainer.train()
    first, second = train_logs(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["grad_norm"] > 0.01 and abs(second["rewards/margins"]) > 1e-4


def test_by_name_from_the_command_line(tmp_path, folder):
    options = {"model_init_kwargs": '{"quantization_config": {"load_in_4bit": true}}', "processing_class": None}
    trainer = tiny_trainer(tmp_path / "run", model=str(folder), peft_config=lora(), bf16=True, **options)
    assert trainer.model.is_loaded_in_4bit
    trainer.train()
    assert all(log["grad_norm"] > 0.01 for log in train_logs(trainer))
    trainer.save_model()
    assert '| quantization | {"load_in_4bit": true' in (tmp_path / "run/README.md").read_text()


def test_the_cache_knows_the_scales(folder):
    """Twice the weight has the same 4-bit codes."""
    pairs = tokenize_pairs(tiny_pairs(2), tiny_tokenizer())
    twice = tiny_model(**WIDE)
    with torch.no_grad():
        twice.model.layers[0].mlp.up_proj.weight *= 2
    twice.save_pretrained(folder / "twice")
    models = four_bits(folder), four_bits(folder / "twice")
    codes = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(*codes)
    assert fingerprint(models[0], pairs, {}) == fingerprint(four_bits(folder), pairs, {})
    assert fingerprint(models[0], pairs, {}) != fingerprint(models[1], pairs, {})


def test_without_an_adapter(tmp_path, folder):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        tiny_trainer(tmp_path, model=four_bits(folder))
