"""The memory formula of mallowspo.sizing against what a model really allocates, and the page against the formula."""

import gc
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import WORDS, lora, tiny_trainer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from mallowspo import sizing
from mallowspo.collator import pack
from mallowspo.functional import MEMORY_BUDGET
from mallowspo.linear import CPU_TILE
from mallowspo.modeling import attach_token_stats, sequence_stats, share_prompts

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RANK = 2  # of tiny.lora
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def llama(model):
    config = LlamaConfig(
        vocab_size=model.vocab, hidden_size=model.hidden, num_hidden_layers=model.layers, head_dim=model.head_size,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, intermediate_size=model.mlp,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=model.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def all_linear(model):
    """LoRA as the formula has it: on every linear layer but the head."""
    config = lora()
    config.target_modules = "all-linear"
    return pytest.importorskip("peft").get_peft_model(model, config)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def peak(run):
    """Bytes by which the CPU allocator's balance rises during `run`, from the profiler's record of its calls."""
    gc.collect()  # what others left behind and the allocator would take back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    balance = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        balance += event.nbytes()
        highest = max(highest, balance)
    return highest


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_a_step_of_the_trainer_takes_what_the_formula_says(rank, checkpointing, tmp_path):
    """Two micro-batches, so that the second has its gradients beside the first one's; within 2%."""
    shape = sizing.Model(vocab=8192, hidden=256, layers=4, heads=8, kv_heads=2, mlp=704, head_size=32)
    batch = sizing.Batch(pairs=3, prompt=384, response=192)
    prompt, response = (" ".join((WORDS[4:] * 24)[:n]) for n in (batch.prompt, batch.response - 1))  # and EOS
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": " " + response, "rejected": " " + response}] * 6)
    trainer = tiny_trainer(
        tmp_path,
        model=all_linear(llama(shape)) if rank else llama(shape),
        train_dataset=pairs,
        per_device_train_batch_size=batch.pairs,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_length=None,
        loss_type="dpo",
        precompute_ref_log_probs=True,
        activation_checkpointing=checkpointing,
    )
    (collated,) = [trainer.data_collator([trainer._prepared(pairs)[i] for i in range(batch.pairs)])]
    assert collated["input_ids"].shape == (1, batch.tokens) and len(collated["target_ids"]) == batch.scored
    weights = nbytes(trainer.model.parameters())
    found = peak(trainer.train)
    moments = nbytes(value for state in trainer.optimizer.state.values() for value in state.values())
    trained = nbytes(p for p in trainer.model.parameters() if p.requires_grad)

    assert weights + trained + moments == pytest.approx(sizing.states(shape, None, 1, rank), rel=1e-3)
    budget = CPU_TILE if rank else MEMORY_BUDGET["cpu"]  # a frozen head holds one tile
    formula = sizing.activations(shape, batch, None, rank, checkpointing, budget)
    assert found == pytest.approx(trained + formula, rel=0.02)
    assert formula > moments  # which are made when the activations are gone


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("sharding", [None, "fsdp2", "ddp"], ids=["float32", "bfloat16", "autocast"])
def test_a_layer_saves_what_the_formula_says(sharding, rank):
    """Every storage that autograd keeps, counted once; a layer is what a third one adds to two. Within 1%."""
    batch = sizing.Batch(pairs=2, prompt=96, response=64)
    collated = pack([[5] * batch.prompt] * batch.pairs, [([6] * batch.response, [7] * batch.response)] * batch.pairs)

    def saved(layers):
        shape = sizing.Model(vocab=512, hidden=128, layers=layers, heads=4, kv_heads=2, mlp=352, head_size=32)
        model = llama(shape)
        if sharding == "fsdp2" or rank and sharding == "ddp":  # LoRA: a base in bfloat16, adapters in float32
            model = model.bfloat16()
        attach_token_stats(model)
        assert share_prompts(model, None) is None
        if rank:
            model = all_linear(model)
        if sharding == "fsdp2":  # which casts every weight
            model = model.bfloat16()
        weights = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}  # autocast's copies, too
        kept = {}

        def keep(tensor):
            if tensor.shape not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16) if sharding == "ddp" else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            sequence_stats(model.train(), collated)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), shape

    (three, shape), (two, _) = saved(3), saved(2)
    assert three - two == pytest.approx(sizing.saved_by_layer(shape, batch, sharding, rank), rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_model(tied, tmp_path):
    shape = sizing.Model(vocab=40, hidden=16, layers=3, heads=4, kv_heads=2, mlp=24, head_size=8, tied=tied)
    model = llama(shape)
    model.config.save_pretrained(tmp_path)
    assert sizing.Model.from_config(tmp_path) == shape == sizing.Model.from_config(tmp_path / "config.json")
    assert sum(p.numel() for p in model.parameters()) == shape.sizes()[0]
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == shape.sizes()[1]
    trained = sum(p.numel() for p in all_linear(model).parameters() if p.requires_grad)
    assert trained == shape.sizes(RANK)[3]


def test_a_config_without_the_newer_fields(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert sizing.Model.from_config(tmp_path) == sizing.Model(40, 16, 3, 4, 4, 24, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file; give a config.json, or the folder"),
        (b"\xff{", r"is no JSON \(.*\); give a config.json"),
        (b"[1]", "must hold a JSON object, not a list"),
        (
            b'{"n_embd": 16}',
            "has no whole number >= 1 as vocab_size, hidden_size, .*intermediate_size; give the config.json of",
        ),
        (CONFIG | {"hidden_size": 0, "head_dim": "8"}, "has no whole number >= 1 as hidden_size, head_dim; give"),
        (CONFIG | {"vocab_size": True}, "has no whole number >= 1 as vocab_size; give"),
        (CONFIG | {"num_local_experts": 8}, "has num_local_experts=8, a mixture of experts; give a dense model's"),
        (CONFIG | {"num_experts": 60}, "has num_experts=60, a mixture of experts"),
        (CONFIG | {"n_routed_experts": 64}, "has n_routed_experts=64, a mixture of experts"),
    ],
)
def test_a_config_that_the_formulas_do_not_fit_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        sizing.Model.from_config(path)
    with pytest.raises(SystemExit, match="2"):
        sizing.main(["--model", str(path)])
    assert re.search(f"error: --model: {path} {message}", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["gpus", "rank", *sizing.Batch._fields])
@pytest.mark.parametrize("value", ["0", "-8", "1.5", "many"])
def test_a_count_is_a_whole_number_from_one_on(name, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        sizing.main([f"--{name}", value])
    assert capsys.readouterr().err.endswith(f"argument --{name}: must be a whole number >= 1, got '{value}'\n")


def test_the_command_prints_the_tables(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    sizing.main(
        ["--model", str(tmp_path), "--gpus", "2", "--rank", "2", "--pairs", "1", "--prompt", "3", "--response", "5"]
    )
    model = sizing.Model(40, 16, 3, 4, 4, 24, 4)
    assert capsys.readouterr().out == sizing.report(model, sizing.Batch(1, 3, 5), [2], 2) + "\n"


def test_llama_3_8b_has_the_parameters_of_its_model_card():
    assert sizing.Model().sizes()[0] == 8_030_261_248


@pytest.mark.parametrize("library", ["accelerate", "DeepSpeed", "TRL"])
def test_the_page_was_read_against_the_pinned_versions(library):
    pins = (PAGE.parents[1] / "constraints.txt").read_text()
    (said,) = re.findall(rf"\b{library} ([\d.]*\d)", PAGE.read_text())
    assert re.search(rf"^{library.lower()}=={re.escape(said)}\b", pins, re.M), (
        f"{said} is not what constraints.txt pins"
    )


def test_sharding_halves_with_twice_the_ranks_and_traffic_levels_off():
    model = sizing.Model()
    whole = sizing.states(model, "fsdp2", 10**12)  # what is gathered on every rank
    assert sizing.states(model, "fsdp2", 8) - whole == pytest.approx(2 * (sizing.states(model, "fsdp2", 16) - whole))
    assert sizing.states(model, "ddp", 8) == sizing.states(model, "ddp", 64)
    for sharding in ("ddp", "zero2", "fsdp2"):
        assert sizing.sent(model, sharding, 1) == 0
        assert sizing.sent(model, sharding, 64) == pytest.approx(sizing.sent(model, sharding, 8) * (63 / 64) / (7 / 8))
    assert sizing.sent(model, "ddp", 8) == pytest.approx(7 / 8 * 2 * 4 * model.sizes()[0])


def test_the_page_has_the_tables_of_the_formula():
    tables = sizing.report(sizing.Model(), sizing.Batch(), gpus=(8, 64), rank=16)
    for table in tables.split("\n\n"):
        assert table in PAGE.read_text(), "docs/scaling.md is stale: paste what python -m mallowspo.sizing prints"
