"""Token statistics of a model whose output head is adapted, trained as a copy, sharded or of a refused kind."""

import copy
import pickle
import warnings

import pytest
import torch
from test_modeling import BATCH, IDS, ROWS, gradients, weighted
from tiny import plain_alignment, plain_stats, tiny_model, tiny_trainer
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mallowspo.modeling import attach_token_stats, response_stats, sequence_stats

peft = pytest.importorskip("peft")

MODELS = {
    "llama": ("llama", {}),
    "llama (tied)": ("llama", {"tie_word_embeddings": True}),
    "gpt2 (tied)": ("gpt2", {}),
    "gemma2 (tied, cap)": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "phi (bias)": ("phi", {"num_key_value_heads": 2}),
    "cohere (scale)": ("cohere", {"logit_scale": 0.25}),
}
LORA = {"target_modules": r".*lm_head"}
COPY = {"target_modules": r".*(q_proj|c_attn)", "modules_to_save": ["lm_head"]}
ADAPTERS = {
    "lora": LORA,
    "lora everywhere": {"target_modules": r".*(proj|c_attn|dense|lm_head)"},
    "lora, rslora, bias": LORA | {"use_rslora": True, "lora_bias": True, "lora_alpha": 3},
    "copy": COPY,
}
DEFAULTS = {"r": 2, "lora_alpha": 5, "init_lora_weights": False}
BOTH = pytest.mark.parametrize("where", [LORA, COPY], ids=["lora", "copy"])


def config(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", **LORA | DEFAULTS | options)


def adapted(model, **options):
    """A PeftModel, every trained tensor away from where it starts: a copy of the head, too, is not the original."""
    torch.manual_seed(1)
    with warnings.catch_warnings():  # peft's, of tied weights and of a bias that cannot be merged
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config(**options))
    perturb(model)
    return model


def perturb(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def check(model, expected_model=None, dtype=torch.float64):
    """Values, and the gradient of every trained tensor, are those of the whole logits; returns the SequenceStats."""
    expected = plain_stats(expected_model or model, ROWS, dtype)
    wanted = gradients(expected_model or model, weighted(*expected))
    stats = sequence_stats(model, BATCH)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(tuple(stats), expected, rtol=tolerance, atol=tolerance)
    found = gradients(model, weighted(*stats))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == wanted.keys() == trained and any("lm_head" in name for name in trained)
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max().item(), 1)
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)
        assert gradient.any()
    return stats


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_head_equals_its_whole_logits(name, adapter):
    model_type, options = MODELS[name]
    base = tiny_model(model_type, **options).double()
    off = plain_stats(base, ROWS, torch.float64)
    model = adapted(base, **ADAPTERS[adapter])
    attach_token_stats(model)
    stats = check(model)
    with model.disable_adapter():
        disabled = sequence_stats(model, BATCH)
    torch.testing.assert_close(tuple(disabled), off, rtol=1e-9, atol=1e-9)
    assert (stats.logps - disabled.logps).abs().min() > 1e-3
    alignment = response_stats(model, BATCH, aligned=True).alignment
    torch.testing.assert_close(alignment, plain_alignment(model, ROWS, torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tuple(sequence_stats(model, BATCH)), tuple(stats), rtol=0, atol=0)


@BOTH
def test_float32_and_the_models_other_calls(where):
    model = adapted(tiny_model(), **where)
    plain = copy.deepcopy(model)
    attach_token_stats(model)
    check(model, plain, torch.float32)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found, expected = (m.generate(input_ids=IDS[:1], **options) for m in (model, plain))
    assert torch.equal(found, expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    expected = sequence_stats(model, BATCH)
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    attach_token_stats(loaded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (twin, loaded):
        assert torch.equal(sequence_stats(other, BATCH).logps, expected.logps)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_float32_adapters_on_a_bfloat16_model(lora_bias):
    model = adapted(tiny_model().to(torch.bfloat16), lora_bias=lora_bias)
    head = model.get_base_model().lm_head
    assert head.lora_B["default"].weight.dtype == torch.float32 and head.weight.dtype == torch.bfloat16
    attach_token_stats(model)
    stats, expected = sequence_stats(model, BATCH), plain_stats(model, ROWS)
    for found, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.06)
    found, wanted = gradients(model, weighted(*stats)), gradients(model, weighted(*expected))
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "active", [["default"], ["other"], ["default", "other"], ["default", "elsewhere"], ["elsewhere"]]
)
def test_several_adapters(active):
    """One, the other, both at once, one of them not on the head, none on the head."""
    model = adapted(tiny_model().double())
    model.add_adapter("other", config(r=3, lora_alpha=1))
    model.add_adapter("elsewhere", config(target_modules=["q_proj"]))
    attach_token_stats(model)
    model.base_model.set_adapter(active)
    perturb(model)
    expected = plain_stats(model, ROWS, torch.float64)
    wanted = gradients(model, weighted(*expected))
    stats = sequence_stats(model, BATCH)
    torch.testing.assert_close(tuple(stats), expected, rtol=1e-9, atol=1e-9)
    found = gradients(model, weighted(*stats))
    assert {name.split(".")[-2] for name in found} == set(active)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_merged_adapter():
    model = adapted(tiny_model().double())
    attach_token_stats(model)
    before = sequence_stats(model, BATCH)
    model.merge_adapter()
    torch.testing.assert_close(tuple(sequence_stats(model, BATCH)), tuple(before), rtol=1e-9, atol=1e-9)
    with model.disable_adapter(), warnings.catch_warnings():
        torch.testing.assert_close(
            tuple(sequence_stats(model, BATCH)),
            plain_stats(tiny_model().double(), ROWS, torch.float64),
            rtol=1e-9,
            atol=1e-9,
        )


def test_two_copies_of_the_head():
    model = adapted(tiny_model().double(), **COPY)
    attach_token_stats(model)
    model.add_adapter("other", config(**COPY))  # copied from the original, forward and all
    attach_token_stats(model)
    logps = []
    for name in ("default", "other"):
        model.set_adapter(name)
        logps.append(check(model).logps)
    assert (logps[0] - logps[1]).abs().max() > 1e-3


def test_an_adapter_that_comes_later():
    model = adapted(tiny_model().double())
    attach_token_stats(model)
    model.add_adapter("late", config())
    model.set_adapter("late")
    with pytest.raises(ValueError, match="the adapter 'late' came after attach_token_stats; call it again"):
        sequence_stats(model, BATCH)
    attach_token_stats(model)
    check(model)


def test_lora_on_the_head_of_a_model_that_was_attached_before():
    base = tiny_model().double()
    attach_token_stats(base)
    model = adapted(base)
    attach_token_stats(model)
    check(model)


@pytest.mark.parametrize(
    "where",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)
def test_weights_that_peft_ties(where):
    """ensure_weight_tying: the adapter or the copy of the embedding is that of the head as well."""
    model = adapted(tiny_model("llama", tie_word_embeddings=True).double(), ensure_weight_tying=True, **where)
    attach_token_stats(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    assert any("lm_head" in name and ("lora_B" in name or "modules_to_save" in name) for name in names)
    expected = plain_stats(model, ROWS, torch.float64)
    wanted = gradients(model, weighted(*expected))
    stats = sequence_stats(model, BATCH)
    torch.testing.assert_close(tuple(stats), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(model, weighted(*stats)), wanted, rtol=1e-9, atol=1e-9)


def test_dropout_on_the_head():
    model = adapted(tiny_model().double(), lora_dropout=0.5)
    attach_token_stats(model)
    head, hidden = model.get_base_model().lm_head.train(), torch.randn(5, 16, dtype=torch.float64)
    labels = torch.arange(5)

    def seeded(*inputs):
        torch.manual_seed(3)
        return head(*inputs)

    expected = seeded(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(seeded(hidden, labels).logps, expected)
    assert not torch.allclose(head(hidden, labels).logps, expected)


# ---- sharded heads -------------------------------------------------------------------------------------------------


def shard_as_zero3_does(module):
    """The weights of one module are there from before its forward to after it, and so around its backward."""
    whole = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

    def gather(*_):
        for name, data in whole.items():
            module.get_parameter(name).data = data

    def release(*_):
        for name in whole:
            module.get_parameter(name).data = torch.empty(0, dtype=whole[name].dtype)

    def around_backward(_module, _inputs, outputs):
        release()
        for output in [outputs] if torch.is_tensor(outputs) else outputs:
            if output.requires_grad:
                output.register_hook(gather)

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(around_backward)
    release()


@pytest.mark.parametrize(("where", "modules"), [(None, 1), (LORA, 3), (COPY, 2)], ids=["plain", "lora", "copy"])
def test_a_head_that_is_whole_only_within_its_forward(where, modules):
    model = tiny_model().double()
    if where is not None:
        model = adapted(model, **where)
    plain = copy.deepcopy(model)
    attach_token_stats(model)
    expected = plain_stats(plain, ROWS, torch.float64)
    wanted = gradients(plain, weighted(*expected))
    head = model.lm_head if where is None else model.get_base_model().lm_head
    owners = [module for module in head.modules() if list(module.parameters(recurse=False))]
    for module in owners:
        shard_as_zero3_does(module)
    assert len(owners) == modules and head.weight.numel() == 0
    stats = sequence_stats(model, BATCH)
    assert not any(parameter.numel() for parameter in head.parameters())
    torch.testing.assert_close(tuple(stats), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(model, weighted(*stats)), wanted, rtol=1e-9, atol=1e-9)


# ---- refused -------------------------------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """What a quantised head looks like: a subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x.round())


def quantised():
    model = tiny_model()
    model.lm_head.__class__ = Linear4bit
    return model


REFUSED = {
    "DoRA": (lambda: adapted(tiny_model(), use_dora=True), "DoraLinearVariant, not plain LoRA"),
    "LoHa": (
        lambda: peft.get_peft_model(tiny_model(), peft.LoHaConfig(r=2, target_modules=["lm_head"])),
        "the output head is a Linear, not an nn.Linear, nor one under LoRA",
    ),
    "quantised": (quantised, "the output head is a Linear4bit, .* leave the head out of quantisation"),
    "quantised, LoRA": (lambda: adapted(quantised()), "the output head is a Linear4bit"),
    "trained tokens, tied": (
        lambda: adapted(tiny_model("llama", tie_word_embeddings=True), trainable_token_indices=[4]),
        "trainable_token_indices",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_heads_that_are_refused(kind):
    build, message = REFUSED[kind]
    model = build()
    with pytest.raises(TypeError, match=message):
        attach_token_stats(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_tensor_parallel_head_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        parallelize_module(model.lm_head, mesh, ColwiseParallel())
        with pytest.raises(TypeError, match="weight is a DTensor: leave the head out of tensor parallelism"):
            attach_token_stats(model)
        assert "forward" not in vars(model)
    finally:
        torch.distributed.destroy_process_group()


@BOTH
def test_an_unknown_change_of_the_logits_is_still_refused(where):
    model = tiny_model()

    class Strange(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 1.2 * output.logits
            return output

    model.__class__ = Strange
    model = adapted(model, **where)
    with pytest.raises(ValueError, match="Strange does something to its logits"):
        attach_token_stats(model)
    assert not any("forward" in vars(module) for module in model.modules())


# ---- the trainer ---------------------------------------------------------------------------------------------------


@BOTH
def test_training_and_loading_again(tmp_path, where):
    """The reference is the head without its adapter, and what is saved is what was trained."""
    trainer = tiny_trainer(tmp_path / "run", peft_config=config(**where, init_lora_weights=True))
    rows = list(trainer._prepared(trainer.train_dataset))
    start = plain_stats(tiny_model(), rows)
    first = trainer.score(trainer.train_dataset)
    trainer.train()
    scores = trainer.score(trainer.train_dataset)
    assert abs(scores["losses"] - first["losses"]).max() > 1e-4
    trained = plain_stats(trainer.model.eval(), rows)
    trainer.save_model(tmp_path / "saved")
    loaded = plain_stats(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "saved"), rows)
    for side, side_start, side_trained, side_loaded in zip(
        ("chosen", "rejected"), start[0].chunk(2), trained[0].chunk(2), loaded[0].chunk(2), strict=True
    ):
        found, reference = (torch.tensor(scores[f"{kind}{side}_logps"]).float() for kind in ("", "ref_"))
        torch.testing.assert_close(reference, side_start, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, side_trained, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, side_loaded, rtol=1e-4, atol=1e-4)
        assert (found - reference).abs().max() > 1e-3
