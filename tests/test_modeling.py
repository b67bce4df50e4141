"""Token statistics inside the model's own forward, against log-softmax of its whole logits."""

import copy
import io
import math
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import GPT2_SHAPE, VOCABULARY, lora, plain_alignment, plain_stats, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from mallowspo.adapters import add_adapter, without_adapter
from mallowspo.collator import PreferenceCollator
from mallowspo.modeling import attach_token_stats, disable_dropout, evaluating, response_stats, sequence_stats

# Everything a supported model may do between its decoder and its logits: bias, tied head, soft cap, scale, divisor.
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi (bias)": ("phi", {"num_key_value_heads": 2}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "mixtral": ("mixtral", {"num_local_experts": 2}),
    "llama4": ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}),
}
ROWS = [
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9]},
    {"prompt_ids": [], "chosen_ids": [4, 5, 6, 7, 8], "rejected_ids": [10, 11]},
    {"prompt_ids": [12], "chosen_ids": [13], "rejected_ids": [14, 15, 16, 17, 18, 19]},
]
IDS = torch.tensor([[1, 5, 6, 7, 8], [9, 10, 11, 12, 0]])
BATCH = PreferenceCollator(pad_token_id=0)(ROWS)


@pytest.fixture(params=MODELS)
def model(request):
    model_type, config = MODELS[request.param]
    return tiny_model(model_type, **config)


def weighted(logps, entropy):
    """A loss that gives every sequence and both statistics a weight of its own."""
    weights = torch.linspace(0.5, 2.0, len(logps))
    return (weights * logps).sum() + (weights.flip(0) * entropy).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_statistics_and_gradients_are_those_of_the_whole_logits(model):
    expected = plain_stats(model, ROWS)  # before attaching: the model as it is
    expected_gradients = gradients(model, weighted(*expected))
    attach_token_stats(model)
    stats = sequence_stats(model, BATCH)
    assert stats.logps.shape == stats.entropy.shape == (6,) and stats.logps.dtype == torch.float32
    for found, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model, weighted(*stats))
    assert found_gradients.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    for name, wanted in expected_gradients.items():
        scale = wanted.abs().max().item()
        torch.testing.assert_close(found_gradients[name], wanted, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=name)
    assert max(g.abs().max() for g in found_gradients.values()) > 0.1


def test_the_alignment_is_that_of_the_whole_logits(model):
    expected = plain_alignment(model, ROWS)
    attach_token_stats(model)
    plain, stats = (response_stats(model, BATCH, aligned=aligned) for aligned in (False, True))
    torch.testing.assert_close(stats.alignment, expected, rtol=1e-5, atol=1e-5)
    assert not stats.alignment.requires_grad and plain.alignment is None
    assert torch.equal(stats.logps, plain.logps) and torch.equal(stats.entropy, plain.entropy)


def test_the_head_options_matter():
    """The table above would prove little if the cap, scale and divisor changed nothing."""
    for model_type, name, values in (
        ("gemma2", "final_logit_softcapping", (2.0, 4.0)),
        ("cohere", "logit_scale", (0.25, 0.5)),
        ("granite", "logits_scaling", (3.0, 1.5)),
    ):
        entropies = []
        for value in values:
            model = tiny_model(model_type, **{name: value} | ({"head_dim": 8} if model_type == "gemma2" else {}))
            attach_token_stats(model)
            entropies.append(sequence_stats(model, BATCH).entropy)
        assert (entropies[0] - entropies[1]).abs().min() > 1e-3


def test_only_completion_tokens_reach_the_head(model):
    attach_token_stats(model)
    rows = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape))
    sequence_stats(model, BATCH)
    scored = sum(
        max(len(row[side]) - (not row["prompt_ids"]), 0) for row in ROWS for side in ("chosen_ids", "rejected_ids")
    )
    assert rows == [(scored, 16)] and BATCH["num_tokens"].sum() == scored < BATCH["input_ids"].numel()


def test_every_other_call_is_the_models_own(model, tmp_path):
    plain = copy.deepcopy(model)
    attach_token_stats(model)
    for kwargs in ({}, {"labels": IDS}, {"output_hidden_states": True}, {"use_cache": True}):
        found, expected = model(IDS, **kwargs), plain(IDS, **kwargs)
        assert found.keys() == expected.keys()
        assert torch.equal(found.logits, expected.logits) and (found.loss == expected.loss or "labels" not in kwargs)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **options), plain.generate(IDS[:1], **options))
    padded = {"input_ids": IDS.flip(1), "attention_mask": (IDS != 0).long().flip(1)}  # on the left: positions count
    assert torch.equal(model.generate(**padded, **options), plain.generate(**padded, **options))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, plain(IDS).logits)


def test_training_mode_is_left_as_it_was():
    for training in (True, False):
        model = tiny_model().train(training)
        attach_token_stats(model)
        assert model.training is training and all(module.training is training for module in model.modules())


def test_evaluating_returns_every_module_to_its_own_mode():
    """DDP's wrapper stays in training mode around a model in evaluation: it must not take the model along."""
    wrapper = nn.Sequential(tiny_model()).train()
    wrapper[0].eval()
    wrapper[0].model.layers[1].train()
    before = [module.training for module in wrapper.modules()]
    with pytest.raises(RuntimeError), evaluating(wrapper):
        assert not any(module.training for module in wrapper.modules())
        raise RuntimeError
    assert [module.training for module in wrapper.modules()] == before and True in before and False in before


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_deep_copy_computes_with_its_own_weights(model_type):
    model = tiny_model(model_type)
    attach_token_stats(model)
    before = sequence_stats(model, BATCH).logps
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(sequence_stats(twin, BATCH).logps, before)
    assert torch.allclose(sequence_stats(model, BATCH).logps, -math.log(VOCABULARY) * BATCH["num_tokens"])


def test_pickle_and_torch_save_give_a_plain_model_that_can_be_attached_again():
    model = tiny_model()
    attach_token_stats(model)
    expected = sequence_stats(model, BATCH).logps
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        attach_token_stats(twin)
        with torch.no_grad():
            twin.lm_head.weight *= 2
        assert not torch.allclose(sequence_stats(twin, BATCH).logps, expected)
    assert torch.equal(sequence_stats(model, BATCH).logps, expected)


def test_attaching_twice_does_nothing(monkeypatch):
    model = tiny_model()
    attach_token_stats(model)
    forwards = model.forward, model.lm_head.forward
    monkeypatch.setattr("mallowspo.modeling._compare_with_logits", lambda model: pytest.fail("attached again"))
    attach_token_stats(model)
    assert (model.forward, model.lm_head.forward) == forwards


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_and_unwraps(precision):
    model = tiny_model()
    attach_token_stats(model)
    expected = sequence_stats(model, BATCH)
    AcceleratorState._reset_state(reset_partial_state=True)  # of another test
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared = accelerator.prepare_model(model)
    found = sequence_stats(prepared, BATCH)
    assert found.logps.dtype == torch.float32
    tolerance = {"no": 1e-6, "bf16": 0.02}[precision]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.logps, expected.logps) == (precision == "no")  # bf16 is really used
    attach_token_stats(prepared)  # harmless, and autocast stays
    assert torch.equal(sequence_stats(prepared, BATCH).logps, found.logps)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(sequence_stats(unwrapped, BATCH), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_model(model):
    model = model.to(torch.bfloat16)
    expected = plain_stats(model, ROWS)  # softmax in float32 of the model's bfloat16 logits
    attach_token_stats(model)
    stats = sequence_stats(model, BATCH)
    assert stats.logps.dtype == torch.float32
    # Padding changes the shapes of the bfloat16 matrix products, and the products are rounded to 8 bits.
    for found, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.06)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(model, weighted(*stats)).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        attach_token_stats(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        results.append(gradients(model, weighted(*sequence_stats(model, BATCH))))
        assert len(calls) == 1 + checkpointing  # the block really ran again
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_lora_on_attention_goes_through_the_peft_model():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    plain, model = (peft.get_peft_model(tiny_model(), lora) for _ in range(2))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    attach_token_stats(model)
    expected = plain_stats(plain, ROWS)
    stats = sequence_stats(model, BATCH)
    torch.testing.assert_close(tuple(stats), expected, rtol=1e-5, atol=1e-5)
    wanted, found = gradients(plain, weighted(*expected)), gradients(model, weighted(*stats))
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        off = sequence_stats(model, BATCH)
    torch.testing.assert_close(tuple(off), plain_stats(tiny_model(), ROWS), rtol=1e-5, atol=1e-5)
    assert (off.logps - stats.logps).abs().max() > 1e-3


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt learning"):
        attach_token_stats(peft.get_peft_model(tiny_model(), config))


def test_router_logits_are_refused():
    with pytest.raises(ValueError, match="output_router_logits.*set it to False"):
        attach_token_stats(tiny_model("mixtral", num_local_experts=2, output_router_logits=True))


CHANGES = {
    "scale": lambda logits: 1.2 * logits,
    "cap": lambda logits: torch.tanh(logits),
    "bias": lambda logits: logits + 0.3 * torch.linspace(0, 1, logits.shape[-1], dtype=logits.dtype),
    "mask": lambda logits: logits.index_fill(-1, torch.tensor([4]), -1e4),
}


def test_weights_that_are_nan_are_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="LlamaForCausalLM gives logits that are NaN: a weight is"):
        attach_token_stats(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_something_unknown_to_its_logits_is_refused(change, dtype):
    model = tiny_model().to(dtype)

    class Strange(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = CHANGES[change](output.logits)
            return output

    model.__class__ = Strange
    before = model(IDS).logits
    with pytest.raises(ValueError, match="Strange does something to its logits"):
        attach_token_stats(model)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)  # and left as it was
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("which", ["model", "head"])
def test_a_replaced_forward_is_refused(which):
    model = tiny_model()
    module = {"model": model, "head": model.lm_head}[which]
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(TypeError, match=f"the forward of this {type(module).__name__} was replaced"):
        attach_token_stats(model)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(model_type):
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    shape |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2} if model_type == "bart" else {}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **shape))
    with pytest.raises(ValueError, match="is an encoder-decoder; use a causal language model"):
        attach_token_stats(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="the output head is a NoneType"):
        attach_token_stats(tiny_model().model)


def test_a_head_behind_another_layer_is_refused():
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM does something to its logits"):
        attach_token_stats(tiny_model("modernbert-decoder"))


def test_resized_embeddings():
    model = tiny_model()
    model.resize_token_embeddings(VOCABULARY + 4)
    expected = plain_stats(model, ROWS)
    attach_token_stats(model)
    torch.testing.assert_close(tuple(sequence_stats(model, BATCH)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        (
            "opt",
            {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 24, "word_embed_proj_dim": 16, "layerdrop": 0.5},
        ),
    ],
)
def test_disable_dropout(model_type, config):
    model = tiny_model(model_type, **config).train()
    attach_token_stats(model)
    noisy = [sequence_stats(model, BATCH).logps for _ in range(2)]
    assert not torch.equal(*noisy)
    disable_dropout(model)
    still = [sequence_stats(model, BATCH).logps for _ in range(2)]
    assert torch.equal(*still) and torch.equal(still[0], sequence_stats(model.eval(), BATCH).logps)


def test_gpt2_head_is_tied():
    """The gradient of a tied matrix is the sum of its two uses; the table of models would not notice an untied one."""
    model = tiny_model("gpt2", **GPT2_SHAPE)
    assert model.lm_head.weight is model.transformer.wte.weight and isinstance(model.lm_head, nn.Linear)


def test_without_an_adapter_the_same_weights_are_trained():
    model = add_adapter(tiny_model(), lora(init_lora_weights=False))
    ids = torch.tensor([[1, 5, 6, 7]])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with without_adapter(model):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        torch.testing.assert_close(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


class Power(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = 3.0


def test_disable_dropout_leaves_another_modules_p():
    model = nn.Sequential(nn.Dropout(0.5), Power())
    disable_dropout(model)
    assert model[0].p == 0 and model[1].p == 3.0
