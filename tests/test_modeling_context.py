"""What a model says of a token may depend on those before it alone: models that look ahead, RoPE of a whole batch. And
the tokens and positions that it has at all."""

import math

import pytest
import torch
from tiny import SHAPE, VOCABULARY, lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, XLNetConfig, XLNetLMHeadModel

from mallowspo.adapters import add_adapter
from mallowspo.collator import pack, pad
from mallowspo.modeling import attach_token_stats, check_rope, response_stats, share_prompts

# Later tokens


def xlnet():
    torch.manual_seed(0)
    return XLNetLMHeadModel(XLNetConfig(vocab_size=20, d_model=16, n_layer=2, n_head=2, d_inner=24)).eval()


XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
EXPERTS = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}  # routed by scores that mix positions
LOOKS_AHEAD = {
    "cpmant": lambda: tiny_model("cpmant", dim_head=8, dim_ff=24, prompt_types=3, prompt_length=2),
    "xlnet": xlnet,
    "xlm": lambda: tiny_model("xlm", causal=False, **XLM),
    "bert-generation": lambda: tiny_model("bert-generation", is_decoder=False),
    "doge": lambda: tiny_model("doge", **EXPERTS),
}


@pytest.mark.parametrize("model_type", LOOKS_AHEAD)
def test_a_model_that_looks_at_later_tokens_is_refused(model_type):
    model = LOOKS_AHEAD[model_type]()
    with pytest.raises(ValueError, match=f"{type(model).__name__} looks at later tokens, which change the logits"):
        attach_token_stats(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("bert-generation", {"is_decoder": True}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}),
        ("jamba", {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_experts_and_recurrences_do_not(model_type, config, dtype):
    attach_token_stats(tiny_model(model_type, **config).to(dtype))


def test_outliers_of_8_bit_layers_are_found_over_all_rows_which_is_no_looking_ahead(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: extra [qlora]")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.0)
    attach_token_stats(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight, dtype=torch.float32))


def test_a_state_that_no_layer_type_tells_of_keeps_prompts_apart(monkeypatch):
    model = tiny_model()
    attach_token_stats(model)
    model.config.layer_types = None
    assert share_prompts(model, 32) is None
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert share_prompts(model, 32) == "LlamaForCausalLM carries a state from token to token"


def test_flex_attention_is_compared_as_it_is(monkeypatch):
    """On a CPU, transformers' own looks ahead in heads as small as these."""
    model, tried = tiny_model(), []
    attach_token_stats(model)
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr("mallowspo.modeling._packed_difference", lambda model, name: tried.append(name) or (0.0, 1.0))
    assert share_prompts(model, 32) is None and tried == ["flex_attention"]


# RoPE by the longest sequence of a batch

HALF = SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
LONG = {"rope_type": "longrope", "short_factor": [1.0] * HALF, "long_factor": [4.0] * HALF, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LAYERS = {"full_attention": LONG, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
LIMIT = 24
SCALED = {
    "longrope": ("llama", {"rope_parameters": LONG}),
    "phi3": ("phi3", {"rope_parameters": dict(LONG), "original_max_position_embeddings": LIMIT}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "by layer": (
        "gemma3_text",
        {"rope_parameters": LAYERS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def scaled(name):
    model_type, config = SCALED[name]
    return tiny_model(model_type, gain=4.0, **config)


@pytest.mark.parametrize("max_length", [LIMIT + 1, None])
@pytest.mark.parametrize("name", SCALED)
def test_rope_by_the_longest_of_a_batch_is_refused_beyond_its_limit(name, max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length}, but .*set max_length to no more than {LIMIT}$"):
        check_rope(scaled(name), max_length)


@pytest.mark.parametrize("name", SCALED)
def test_up_to_the_limit_a_pair_is_the_same_in_any_batch(name):
    model = scaled(name).double()
    check_rope(model, LIMIT)
    attach_token_stats(model)
    prompts, responses = [[1, 5, 6], [7] * 4], [([8, 9, 2], [10, 2]), ([11, 12] * 10, [13])]  # the longest: 24

    def of_the_first(ids, collate):
        return response_stats(model, collate(prompts[: len(ids)], ids)).logps[:: len(ids)]

    longer = [responses[0], ([11, 12] * 10 + [2], [13])]
    for collate in (lambda *groups: pad(*groups, pad_token_id=0), pack):
        if collate is pack:
            assert share_prompts(model, LIMIT) is None
        alone = of_the_first(responses[:1], collate)
        torch.testing.assert_close(of_the_first(responses, collate), alone, rtol=1e-12, atol=1e-12)
        assert (of_the_first(longer, collate) - alone).abs().max() > 1e-5  # that is where it begins


def test_pad_tokens_count(tmp_path):
    model = scaled("dynamic")
    check_rope(model, 24, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="set max_length to no more than 14$"):
        check_rope(model, 15, pad_to_multiple_of=14)
    with pytest.raises(ValueError, match="set max_length to no more than 14$"):
        tiny_trainer(tmp_path, model=model, max_length=15, pad_to_multiple_of=14)


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_rope_that_is_the_same_for_every_length_has_no_limit(rope):
    check_rope(tiny_model(rope_parameters=rope | {"rope_theta": 1e4}), None)


@pytest.mark.parametrize("share", [True, False])
def test_the_trainer_refuses_such_a_limit_for_policy_and_reference(tmp_path, share):
    options = {"share_prompt": share, "loss_type": "dpo", "precompute_ref_log_probs": True}
    long = add_adapter(scaled("phi3"), lora(target_modules=["o_proj"]))
    for models in ({"model": long}, {"ref_model": scaled("phi3")}):
        with pytest.raises(ValueError, match=f"'longrope' RoPE of .* set max_length to no more than {LIMIT}"):
            tiny_trainer(tmp_path, **models, **options)
    pairs = tiny_pairs(4, chosen=[" red" * 60, " blue", " sky" * 60, " sea up"])
    trainer = tiny_trainer(
        tmp_path, model=scaled("phi3"), train_dataset=pairs, max_length=LIMIT, precompute_ref_batch_size=1, **options
    )
    trainer.train()
    assert train_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# Tokens and positions


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_token_that_the_model_has_not_is_named(tmp_path, which):
    pairs = tiny_pairs(3, chosen=[" red", " blue bad", " sky"])
    small = {which: tiny_model(vocab_size=VOCABULARY - 1)}
    has = f"token id {VOCABULARY - 1}, but LlamaForCausalLM has embeddings for {VOCABULARY - 1} tokens"
    with pytest.raises(ValueError, match=f"the train data set has {has}: pass .* own tokenizer, or .*resize_token"):
        tiny_trainer(tmp_path, train_dataset=pairs, loss_type="dpo", **small)


def test_a_pad_token_that_the_model_has_not_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tiny_trainer(tmp_path, processing_class=tokenizer).train()  # no padding where prompts are shared
    with pytest.raises(ValueError, match=f"the padding has token id {VOCABULARY}, but .* {VOCABULARY} tokens"):
        tiny_trainer(tmp_path, processing_class=tokenizer, share_prompt=False)


TABLES = {
    "gpt2": {"n_positions": 16},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
}


@pytest.mark.parametrize("model_type", TABLES)
def test_a_position_that_the_model_has_not_is_named(tmp_path, model_type):
    def trainer(responses, model_type=model_type, **table):
        pairs = tiny_pairs(2, prompt=["red", "blue"], chosen=[" up", " sky" * responses], rejected=[" no", " down"])
        return tiny_trainer(tmp_path, model=tiny_model(model_type, **table), train_dataset=pairs)

    trainer(14, **TABLES[model_type]).train()  # with the prompt and the EOS 16
    with pytest.raises(ValueError, match="sequence of 17 tokens, but .* has 16 positions: set max_length to no more"):
        trainer(15, **TABLES[model_type])
    for limit in (16, VOCABULARY):
        trainer(30, "llama", max_position_embeddings=limit).train()  # computes them
