"""Two processes under ``accelerate launch`` (gloo) against one: gradients, weights, metrics and the reference pass.

With each file of recipes/accelerate, on the CPU and in full precision.
"""

import importlib.util
import json
import math
import re

import distributed_worker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_trainer, train_logs

CLOCK = ("runtime", "per_second", "preparation_time")
# Which response is ahead is a matter of rounding where policy and reference are equal.
ROUNDING = ("rewards/accuracies",)
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def of_engines(*rows):
    """Test parameters that begin with an engine's name."""
    skip = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: extra [deepspeed]")
    return [pytest.param(*row, marks=skip if "deepspeed" in row[0] else (), id="-".join(row)) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process left, in alone/, and what two did, in a folder named after their engine."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "alone").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distributed_worker.run(folder / "alone", distributed_worker.RUNS | distributed_worker.HALF)
    distributed_worker.resumable(folder / "alone", "saved")
    for adapter in (False, True):
        distributed_worker.sharded(folder / "alone", adapter)
    for config, what, where, start, processes in (
        ("ddp", "ddp", "ddp", "alone/saved/checkpoint-2", 2),
        ("fsdp2", "fsdp2", "fsdp2", "fsdp2/saved/checkpoint-2", 2),
        ("fsdp2", "resume", "fsdp2-alone", "fsdp2/saved/checkpoint-2", 1),
        ("deepspeed_zero2", "deepspeed_zero2", "deepspeed_zero2", "deepspeed_zero2/saved/checkpoint-2", 2),
        ("deepspeed_zero3", "deepspeed_zero3", "deepspeed_zero3", "deepspeed_zero3/saved/checkpoint-2", 2),
    ):
        if "deepspeed" in config and not HAS_DEEPSPEED:
            continue
        (folder / where).mkdir()
        status, output = distributed_worker.launch(config, what, folder / where, folder / start, processes=processes)
        assert status == 0, output[-20000:]  # the launcher's summary alone is 4000 characters
    distributed_worker.resumable(folder / "alone", "resumed", folder / "ddp/saved/checkpoint-2")
    torch.set_num_threads(threads)
    return folder


def load(folder, name, rank):
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


@pytest.fixture
def run(folder, engine, name):
    """Facts of the single process, of rank 0, of rank 1."""
    return load(folder / "alone", name, 0), load(folder / engine, name, 0), load(folder / engine, name, 1)


def comparable(log):
    return {name: value for name, value in log.items() if not any(word in name for word in (*CLOCK, *ROUNDING))}


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


every_run = pytest.mark.parametrize(
    "engine, name",
    of_engines(
        *(("ddp", name) for name in distributed_worker.RUNS),
        *((engine, name) for engine in distributed_worker.SHARDED for name in distributed_worker.SHARDED_RUNS),
    ),
)


@every_run
def test_the_launch_was_what_it_claims(run, engine, name):
    alone, *ranks = run
    assert alone["world"] == 1 and [rank["world"] for rank in ranks] == [2, 2]
    assert alone["engine"] == "NO" and [rank["engine"] for rank in ranks] == [ENGINES[engine]] * 2
    split = engine in ("fsdp2", "deepspeed_zero3")
    assert not alone["split"] and [rank["split"] for rank in ranks] == [split] * 2
    if name in ("copy", "extrapolated"):
        assert [rank["reference split"] for rank in ranks] == [split] * 2


@every_run
def test_gradients_and_weights_are_those_of_one_process(run, engine):
    alone, *ranks = run
    assert len(alone["gradients"]) == distributed_worker.STEPS
    assert all(max(g.abs().max() for g in step.values()) > 1e-3 for step in alone["gradients"])
    for rank in ranks:
        close(rank["weights"], alone["weights"])  # plain SGD: what DeepSpeed, whose gradients are gone, shows them by
        if ENGINES[engine] != "DEEPSPEED":
            for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
                close(found, expected)
    for ours, theirs in zip(*(rank["gradients"] for rank in ranks), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_run
def test_training_metrics_are_those_of_one_process(run):
    alone, rank, _ = run
    expected = [comparable(log) for log in alone["logs"] if "loss" in log]
    found = [comparable(log) for log in rank["logs"] if "loss" in log]
    assert len(found) == len(expected) == distributed_worker.STEPS
    for ours, theirs in zip(found, expected, strict=True):
        for log in (ours, theirs):
            log.pop("epoch")  # counted in each process's batches
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-6)


@every_run
def test_evaluation_metrics_are_those_of_one_process(run):
    """The ranks' last batches are filled up with pairs from the start; those must not count."""
    alone, *ranks = run
    for when in ("before", "after"):
        expected = comparable(alone[when])
        assert "eval_loss" in expected
        for rank in ranks:
            assert comparable(rank[when]) == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert alone["after"]["eval_loss"] != alone["before"]["eval_loss"]


@every_run
def test_ranks_report_the_same_keys_and_values(run):
    _, *ranks = run
    for ours, theirs in zip(*(rank["logs"] for rank in ranks), strict=True):
        assert list(ours) == list(theirs)
        assert comparable(ours) == comparable(theirs)


@every_run
def test_the_reference_pass_keeps_the_order(run):
    alone, *ranks = run
    for rank in ranks:
        assert rank["columns"].keys() == alone["columns"].keys() and rank["scale"] == pytest.approx(alone["scale"])
        for name, values in alone["columns"].items():
            assert len(set(map(str, values))) == len(values)  # no two alike, so that a wrong order shows
            if isinstance(values[0], list):  # of every token
                assert [len(row) for row in rank["columns"][name]] == [len(row) for row in values]
            assert np.hstack(rank["columns"][name]) == pytest.approx(np.hstack(values), rel=1e-5)


@every_run
def test_scores_are_those_of_one_process(run):
    alone, *ranks = run
    for rank in ranks:
        assert rank["scores"].keys() == alone["scores"].keys()
        for name, values in alone["scores"].items():
            np.testing.assert_allclose(rank["scores"][name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@every_run
def test_what_is_saved_is_that_of_one_process(folder, engine, name):
    """The weights, and the references that the card names."""
    expected, found = (folder / who / name for who in ("alone", engine))
    files = (load_file(next(path.glob("*model.safetensors"))) for path in (found, expected))
    # With an adapter on it, the frozen head is saved too, but not under ZeRO-3.
    close(*({key: value for key, value in weights.items() if "base_layer" not in key} for weights in files))
    told = [re.search("^Reference: (.*)$", (path / "README.md").read_text(), re.M)[1] for path in (found, expected)]
    if (engine, name) == ("deepspeed_zero3", "copy"):  # loaded again, by its name
        told[1] = "`model-0.0`."
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "engine, name",
    of_engines(
        *(("ddp", name) for name in distributed_worker.RUNS),
        *(("deepspeed_zero2", name) for name in distributed_worker.SHARDED_RUNS),
    ),
)
def test_generated_samples_are_those_of_one_process(folder, engine, name):
    expected, found = (
        [json.loads(line) for line in (folder / who / name / "generations.jsonl").read_text().splitlines()]
        for who in ("alone", engine)
    )
    assert found == expected and {row["step"] for row in found} == {0, distributed_worker.STEPS}


def test_batches_that_one_process_hands_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches=True cuts all tensors.*leave it out"):
        tiny_trainer(tmp_path, accelerator_config={"dispatch_batches": True})


def test_on_one_rank_its_own_pairs_are_those_of_all(tmp_path):
    losses = []
    for across in (True, False):
        trainer = tiny_trainer(tmp_path, loss_type="dpo", average_tokens_across_devices=across)
        trainer.train()
        losses.append([log["loss"] for log in train_logs(trainer)])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_runs_cover_what_they_claim(folder):
    cached, small, live = (load(folder / "alone", name, 0) for name in ("cached", "one pair", "copy"))
    assert len(cached["columns"]["train", "ref_chosen_logps"]) == 24 - 2
    assert list(cached["scores"]["row"]) == [0, 1, 2, 4]
    assert len(small["columns"]["train", "ref_chosen_logps"]) == 1 and not live["columns"]


@pytest.mark.parametrize("name", ["sharded", "sharded adapter"])
def test_fsdp_sees_the_head(folder, name):
    """The head's weight is whole only inside its own forward: reading it anywhere else would find a shard."""
    alone, *ranks = load(folder / "alone", name, 0), load(folder / "ddp", name, 0), load(folder / "ddp", name, 1)
    assert min(gradient.abs().max() for gradient in alone.values()) > 1e-3
    for rank in ranks:
        close(rank, alone)


# Saved on two processes, resumed on one, and the other way round


@pytest.mark.parametrize(
    "where, name",
    of_engines(
        *(("ddp", name) for name in ("saved.0", "resumed.0", "resumed.1")),
        ("alone", "resumed.0"),
        *(("fsdp2", name) for name in ("saved.0", "resumed.0", "resumed.1")),
        ("fsdp2-alone", "resumed.0"),
        *(("deepspeed_zero2", name) for name in ("saved.0", "resumed.0", "resumed.1")),
        *(("deepspeed_zero3", name) for name in ("saved.0", "resumed.0", "resumed.1")),
    ),
)
def test_a_resumed_run_ends_where_the_whole_one_does(folder, where, name):
    paths = ("alone/saved.0", f"{where}/{name}")
    expected, found = (torch.load(folder / f"{path}.pt", weights_only=False) for path in paths)
    close(found["weights"], expected["weights"])
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4) and len(found["losses"]) == 5


@pytest.mark.parametrize("engine", of_engines(("fsdp2",), ("deepspeed_zero2",), ("deepspeed_zero3",)))
def test_a_sharded_checkpoint_is_also_a_model(folder, engine):
    """Of whole weights, to load from anywhere."""
    from transformers import AutoModelForCausalLM

    paths = (folder / engine / "saved/checkpoint-4", folder / "alone/saved/checkpoint-4")
    loaded, expected = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    close(loaded, expected)


@pytest.mark.parametrize(
    "engine, name",
    of_engines(*((engine, name) for engine in distributed_worker.SHARDED for name in distributed_worker.HALF)),
)
def test_log_probabilities_are_not_rounded_with_the_layers(run, engine, name):
    """What FSDP's mixed precision does to all that a model returns, and DeepSpeed to all that it is given."""
    alone, *ranks = run
    for rank in ranks:
        assert rank["engine"] == ENGINES[engine]
        if name == "half":  # a live reference is rounded as the policy is
            assert rank["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert sum("loss" in log for log in rank["logs"]) == distributed_worker.STEPS
        for column in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
            found = torch.from_numpy(rank["scores"][column])
            assert not torch.equal(found, found.bfloat16().double())
            np.testing.assert_allclose(found, alone["scores"][column], rtol=0.03)
        for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert found.keys() == (set() if ENGINES[engine] == "DEEPSPEED" else expected.keys())
