"""What a model says of a token may depend on those before it alone: models that look ahead are refused."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, XLNetConfig, XLNetLMHeadModel

from mallowspo.modeling import attach_token_stats

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
