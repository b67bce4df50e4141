"""Packed batches with shared prompts against each sequence by itself, through the models' own logits."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHAPE, lora, tiny_model, tiny_trainer
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, MllamaForCausalLM, MllamaTextConfig

from mallowspo import attention
from mallowspo.adapters import add_adapter
from mallowspo.attention import ATTENTION, block_mask, packed_inputs
from mallowspo.collator import pack, pad
from mallowspo.modeling import attach_token_stats, sequence_stats, share_prompts

PROMPTS = [[1, 5, 6, 7, 8], [9], [1, 4, 4, 13]]
RESPONSES = [([10, 11, 2], [12, 2]), ([13, 14, 15, 16, 17, 2], [18]), ([5, 5, 2], [6, 7, 8, 9, 2])]
MODELS = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "mistral": {"sliding_window": 64},
    "phi": {"num_key_value_heads": 2},
    "olmo2": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}


def sharing(model, longest=32):
    attach_token_stats(model)
    assert share_prompts(model, longest) is None
    return model


def separate(model, prompts, responses):
    """(logps, entropies) of each sequence: summed, and averaged, over the tokens of the response."""
    logps, entropies = [], []
    for side in zip(*responses, strict=True):
        for prompt, response in zip(prompts, side, strict=True):
            ids = torch.tensor([prompt + list(response)])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            scored = range(max(len(prompt), 1), ids.shape[1])
            logps.append(sum(log_p[t - 1, ids[0, t]] for t in scored))
            entropies.append(-sum((log_p[t - 1].exp() * log_p[t - 1]).sum() for t in scored) / len(scored))
    return torch.stack(logps), torch.stack(entropies)


def gradients(model, stats):
    """Of a sum in which every log-probability and entropy has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1.0, 2.0, len(stats[0]), dtype=stats[0].dtype)
    (weights @ stats[0] + weights.flip(0) @ stats[1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected, **tolerances):
    torch.testing.assert_close(found, expected, check_dtype=False, **tolerances)


# Exactness
# Norms and rotations are in float32 whatever the model's dtype: their gradients round in the order of the sums.
GRADIENT = {"rtol": 1e-5, "atol": 3e-6}


@pytest.mark.parametrize("model_type", MODELS)
def test_values_and_gradients_are_those_of_separate_sequences(model_type):
    model = sharing(tiny_model(model_type, gain=4.0, **MODELS[model_type]).double())
    assert model.config._attn_implementation == ATTENTION
    found = sequence_stats(model, pack(PROMPTS, RESPONSES))
    expected = separate(model, PROMPTS, RESPONSES)
    close(tuple(found), expected, rtol=1e-9, atol=1e-9)
    assert expected[0].unique().numel() == 6
    expected = gradients(model, expected)
    assert min(gradient.abs().max() for name, gradient in expected.items() if "bias" not in name) > 1e-6
    close(gradients(model, found), expected, **GRADIENT)


IDS = st.lists(st.integers(3, 19), min_size=1, max_size=7)


@st.composite
def groups(draw):
    """Prompts, some empty, with one to four responses each; a response to an empty prompt has a token to score."""
    prompts = draw(st.lists(st.one_of(st.just([]), IDS), min_size=1, max_size=4))
    count = draw(st.integers(1, 4))
    return prompts, [tuple(draw(IDS) + [2] * (not prompt) for _ in range(count)) for prompt in prompts]


LLAMA = sharing(tiny_model(gain=4.0).double())


@settings(max_examples=40, deadline=None)
@given(groups())
def test_any_number_of_responses_and_empty_prompts(case):
    batch = pack(*case)
    found, expected = sequence_stats(LLAMA, batch), separate(LLAMA, *case)
    close(tuple(found), expected, rtol=1e-9, atol=1e-9)
    close(gradients(LLAMA, found), gradients(LLAMA, expected), **GRADIENT)
    assert batch["input_ids"].numel() == sum(map(len, case[0])) + sum(len(r) for group in case[1] for r in group)


def test_a_decoder_that_get_decoder_does_not_find():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(0)
    model = MllamaForCausalLM(MllamaTextConfig(**SHAPE, rope_parameters=rope, cross_attention_layers=[])).eval()
    model = sharing(model.double())
    found = sequence_stats(model, pack(PROMPTS, RESPONSES))
    expected = separate(model, PROMPTS, RESPONSES)
    close(tuple(found), expected, rtol=1e-6, atol=1e-6)  # its rotations are in float32
    close(gradients(model, found), gradients(model, expected), **GRADIENT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = sharing(tiny_model(gain=4.0).double())
    expected = gradients(model, sequence_stats(model, pack(PROMPTS, RESPONSES)))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    close(gradients(model, sequence_stats(model, pack(PROMPTS, RESPONSES))), expected, rtol=1e-10, atol=1e-12)


def test_adapter():
    from peft import get_peft_model

    model = tiny_model(gain=4.0).double()
    model = get_peft_model(model, lora(init_lora_weights=False)).double().eval()
    attach_token_stats(model)
    assert share_prompts(model, 32) is None
    batch = pack(PROMPTS, RESPONSES)
    close(tuple(sequence_stats(model, batch)), separate(model, PROMPTS, RESPONSES), rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        without = sequence_stats(model, batch)
        close(tuple(without), separate(model, PROMPTS, RESPONSES), rtol=1e-9, atol=1e-9)
    assert (without.logps - sequence_stats(model, batch).logps).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes_round_no_more_than_padded_rows(dtype):
    exact = tiny_model(gain=4.0).double()
    truth = separate(exact, PROMPTS, RESPONSES)[0]
    model = sharing(copy.deepcopy(exact).to(dtype))
    errors = [
        (sequence_stats(model, batch).logps - truth).abs().max().item()
        for batch in (pack(PROMPTS, RESPONSES), pad(PROMPTS, RESPONSES, pad_token_id=0))
    ]
    assert errors[0] < 3 * errors[1] + torch.finfo(dtype).eps


def test_dropout_is_that_of_separate_sequences():
    """All of the attention is dropped, so that nothing is drawn; a model in training mode shares as any other."""
    model = sharing(tiny_model(attention_dropout=1.0).double().train())
    found, expected = (sequence_stats(model, b) for b in (pack(PROMPTS, RESPONSES), pad(PROMPTS, RESPONSES, 0)))
    close(tuple(found), tuple(expected), rtol=1e-9, atol=1e-9)
    assert (found.logps - sequence_stats(model.eval(), pack(PROMPTS, RESPONSES)).logps).abs().min() > 1e-3


# The model is otherwise as it was


def test_other_calls_are_the_models_own(tmp_path):
    plain, model = tiny_model(), sharing(tiny_model())
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    for mask in (None, (ids != 0).long()):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    one = {"input_ids": ids[1:, :1], "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    assert torch.equal(model(**one).logits, plain(**one).logits)
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    batch = pack(PROMPTS, RESPONSES)
    close(tuple(sequence_stats(copy.deepcopy(model), batch)), tuple(sequence_stats(model, batch)))
    assert share_prompts(model, 32) is None  # once more


# What cannot share


SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
SPARSE |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SPARSE |= {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "first_k_dense_replace": 1, "head_dim": 4}
SPARSE |= {"num_key_value_heads": 2}
CHUNKS = {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2, "attn_temperature_tuning": False}
REFUSED = {
    "eager attention": ("llama", {"attn_implementation": "eager"}, "runs with 'eager' attention; load it with"),
    "a sliding window": ("mistral", {"sliding_window": 31}, "sliding_window of 31 tokens; set max_length"),
    "chunks of tokens": ("llama4_text", CHUNKS | {"attention_chunk_size": 31}, "attention_chunk_size of 31 tokens"),
    "layers with one": ("gemma3_text", {"sliding_window": 8, "head_dim": 8}, "sliding_window of 8 tokens"),
    "a recurrence alone": ("mamba", {"state_size": 4}, "has no attention"),
    "convolutions between": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        "has conv layers, which carry a state",
    ),
    "attention to chosen tokens": ("glm_moe_dsa", SPARSE, "chooses the tokens that it attends to"),
    "layers that hand nothing on": ("stablelm", {}, "hand nothing on to their StableLmAttention"),
    "a learnt mask": ("doge", {}, "make a mask of their own for their DogeAttention"),  # of zeros until it is trained
    "a temperature by the row": (
        "llama4_text",
        {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2},
        "scales its attention by the place of a token in its row",
    ),
    "ALiBi": ("bloom", {"n_head": 2, "n_layer": 2}, "has no attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_share_says_why(case):
    model_type, options, reason = REFUSED[case]
    model = tiny_model(model_type, gain=4.0, **options)
    before = model.config._attn_implementation
    attach_token_stats(model)
    assert reason in share_prompts(model, 32)
    assert model.config._attn_implementation == before


WEAK = {
    "falcon_h1": ({"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}, "hybrid"),
    "jamba": ({"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4}, "linear_attention"),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention"], "num_dense_layers": 2}, "conv"),
    "minimax": ({"head_dim": 8, "num_local_experts": 2}, "linear_attention"),
    "zamba": ({"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1}, "hybrid"),
}


@pytest.mark.parametrize("model_type", WEAK)
def test_a_recurrence_within_the_roundings_of_bfloat16_is_refused(model_type):
    options, layers = WEAK[model_type]
    model = tiny_model(model_type, gain=1.0, **options).to(torch.bfloat16)
    attach_token_stats(model)
    assert f"has {layers} layers, which carry a state from token to token" in share_prompts(model, 32)


def test_a_hybrid_of_attention_alone_shares():
    types = ["full_attention", "full_attention"]
    sharing(tiny_model("granitemoehybrid", layer_types=types, num_local_experts=0, mamba_n_heads=2))


def test_an_adapter_that_looks_for_its_invocation_is_refused():
    model = add_adapter(tiny_model(), lora(alora_invocation_tokens=[10]))
    attach_token_stats(model)
    assert "invocation tokens once in each row" in share_prompts(model, 32)


def test_a_model_that_looks_at_its_neighbour_is_found_out():
    model = tiny_model()
    attach_token_stats(model)

    def shift(module, inputs, output):
        return output + 0.01 * output.roll(1, dims=1)

    model.model.embed_tokens.register_forward_hook(shift)
    assert "hidden states differ by" in share_prompts(model, 32)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_is_not_used_does_no_harm():
    sharing(tiny_model("qwen2_moe", use_sliding_window=False, num_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("longest, shares", [(64, True), (65, False), (None, False)])
def test_a_window_as_long_as_the_sequences_does_no_harm(longest, shares):
    model = tiny_model("mistral", sliding_window=64)
    attach_token_stats(model)
    assert (share_prompts(model, longest) is None) == shares


# FlexAttention


def allowed(segments):
    """Who attends to whom, from the definition: [T, T] bool."""
    who = [(p, k) for p, (n, group) in enumerate(segments) for k, m in enumerate((n, *group)) for _ in range(m)]
    size = range(len(who))
    return torch.tensor([[t <= q and who[t] in ((who[q][0], 0), who[q]) for t in size] for q in size])


@settings(max_examples=30, deadline=None)
@given(groups())
def test_block_mask(case):
    segments = pack(*case)["segments"]
    expected = allowed(segments)
    mask = block_mask(segments, torch.device("cpu"))
    size = len(expected)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, size, size, device="cpu")[0, 0].bool(), expected)
    q, k, v = torch.randn(3, 1, 2, size, 8, dtype=torch.float64)
    found = flex_attention(q, k, v, block_mask=mask)
    weights = (q @ k.mT / 8**0.5).masked_fill(~expected, -torch.inf).softmax(-1)
    close(found, weights @ v)


# The trainer


@pytest.mark.parametrize("loss_type", ["mallows-theta", "simpo"])
@pytest.mark.parametrize("reference", ["cached", "live", "adapter"])
def test_training_is_the_same_with_and_without(tmp_path, loss_type, reference):
    options = {"loss_type": loss_type, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    if loss_type == "mallows-theta":
        options |= {"cached": {}, "live": {"dispersion_scale": 0.3}, "adapter": {"dispersion_scale": 0.3}}[reference]
    runs = []
    for share in (True, False):
        torch.manual_seed(0)
        adapter = {"peft_config": lora(init_lora_weights=False)} if reference == "adapter" else {}
        trainer = tiny_trainer(tmp_path / str(share), share_prompt=share, **options, **adapter)
        assert trainer.data_collator.share_prompt is share
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs.append((losses, trainer.score(trainer.train_dataset), trainer.model.state_dict()))
    (losses, scores, weights), (found_losses, found_scores, found_weights) = runs
    assert len(losses) == 3 and len(set(losses)) == 3
    assert found_losses == pytest.approx(losses, rel=1e-4)
    for name, values in scores.items():
        assert found_scores[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
    for name, value in weights.items():
        close(found_weights[name], value, rtol=1e-3, atol=1e-5)


def test_sharing_is_the_default_and_a_model_that_cannot_is_padded_with_a_warning(tmp_path, caplog):
    assert tiny_trainer(tmp_path).data_collator.share_prompt is True
    assert tiny_trainer(tmp_path, pad_to_multiple_of=8).data_collator.share_prompt is False
    assert tiny_trainer(tmp_path, neftune_noise_alpha=5.0).data_collator.share_prompt is False
    model = tiny_model("mistral", sliding_window=16)
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, model=model)
    assert trainer.data_collator.share_prompt is False
    trainer = tiny_trainer(tmp_path, model=tiny_model("mistral", sliding_window=16), max_length=16)
    assert trainer.data_collator.share_prompt is True


def test_both_models_must_be_able_to(tmp_path):
    reference = tiny_model("mistral", sliding_window=16)
    assert tiny_trainer(tmp_path, ref_model=reference).data_collator.share_prompt is False
    with pytest.raises(ValueError, match="share_prompt=True, but .*Mistral.*_window of 16.*share_prompt=False"):
        tiny_trainer(tmp_path, ref_model=tiny_model("mistral", sliding_window=16), share_prompt=True)
    with pytest.raises(ValueError, match="share_prompt packs batches without padding; leave pad_to_multiple_of out"):
        tiny_trainer(tmp_path, share_prompt=True, pad_to_multiple_of=8)


def test_lengths_can_be_bucketed(tmp_path):
    """The samplers of transformers group by the tokens of prompt, chosen and rejected together."""

    def lengths(strategy):
        options = {"rows": 80, "per_device_train_batch_size": 4, "train_sampling_strategy": strategy}
        options["dataloader_drop_last"] = True  # there is no last step to drop; the sampler is refused without
        batches = tiny_trainer(tmp_path, **options).get_train_dataloader()
        return [[n + sum(responses) for n, responses in batch["segments"]] for batch in batches]

    def spread(strategy):
        return sum(max(batch) - min(batch) for batch in lengths(strategy))

    assert spread("group_by_length") < 0.3 * spread("random")
    sums = [sum(batch) for batch in lengths("batch_rebalance")]
    assert len(sums) == 20 and sum(sums) == sum(map(sum, lengths("random")))


def test_masks_are_as_memory_efficient_attention_takes_them_without_a_copy(monkeypatch):
    """ATen pads a mask whose rows do not begin at whole eights, once a layer, and keeps it for the backward."""
    masks = []

    def spy(*inputs, **options):
        masks.append(inputs[3])
        return sdpa(*inputs, **options)

    sdpa, narrow = attention.scaled_dot_product_attention, sharing(tiny_model())
    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    sequence_stats(LLAMA, pack(PROMPTS, RESPONSES))
    assert len(masks) == 2 * len(PROMPTS)
    for mask, prompt, (_, response) in zip(masks, PROMPTS * 2, RESPONSES * 2, strict=True):
        length, width = len(response), len(prompt) + len(response)
        assert torch.equal(mask.isfinite(), torch.ones(length, width, dtype=torch.bool).tril(len(prompt)))
        assert mask.stride(-2) % 8 == 0 and mask.stride(-1) == 1
    masks.clear()
    with torch.autocast("cpu", torch.bfloat16):
        sequence_stats(narrow, pack(PROMPTS, RESPONSES))
    assert {mask.dtype for mask in masks} == {torch.bfloat16}


def test_layers_of_different_dtypes_have_masks_of_their_own():
    masks = {}
    for dtype in (torch.float32, torch.float64):
        attention._continuation(*(torch.zeros(1, 2, n, 8, dtype=dtype) for n in (3, 5, 5)), 2, masks)
    assert [mask.dtype for mask in masks.values()] == [torch.float32, torch.float64]


def test_the_layers_share_their_masks_under_fsdp_too():
    """FSDP maps a function over the arguments of every layer, which makes new dictionaries of plain ones."""
    batch = pack([[5] * 4], [([6] * 3, [7] * 2)])
    packed = packed_inputs(tiny_model().config, batch["input_ids"], batch["segments"])["packed"]
    assert tree_map(lambda leaf: leaf, {"packed": packed})["packed"] is packed
