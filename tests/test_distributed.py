"""Two processes under ``accelerate launch`` (gloo) against one: gradients, weights, metrics and the reference pass."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import numpy as np
import pytest
import torch

CLOCK = ("runtime", "per_second", "preparation_time")
# Which response is ahead is a matter of rounding where policy and reference are equal.
ROUNDING = ("rewards/accuracies",)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{run: (facts of the single process, facts of rank 0, facts of rank 1)}."""
    folder = tmp_path_factory.mktemp("distributed")
    alone, together = folder / "alone", folder / "together"
    alone.mkdir()
    together.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process = subprocess.run(
        [*launch, distributed_worker.__file__, str(together)],
        env=environment, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distributed_worker.run(alone)
    for adapter in (False, True):
        distributed_worker.sharded(alone, adapter)
    torch.set_num_threads(threads)

    def load(path):
        return torch.load(path, weights_only=False)

    return {
        name: (load(alone / f"{name}.0.pt"), *(load(together / f"{name}.{rank}.pt") for rank in range(2)))
        for name in (*distributed_worker.RUNS, "sharded", "sharded adapter")
    }


@pytest.fixture(params=distributed_worker.RUNS)
def run(request, results):
    return results[request.param]


def comparable(log):
    return {name: value for name, value in log.items() if not any(word in name for word in (*CLOCK, *ROUNDING))}


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_launch_had_two_processes(run):
    alone, *ranks = run
    assert alone["world"] == 1 and [rank["world"] for rank in ranks] == [2, 2]


def test_gradients_and_weights_are_those_of_one_process(run):
    alone, *ranks = run
    assert len(alone["gradients"]) == distributed_worker.STEPS
    assert all(max(g.abs().max() for g in step.values()) > 1e-3 for step in alone["gradients"])
    for rank in ranks:
        for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            close(found, expected)
        close(rank["weights"], alone["weights"])
    for ours, theirs in zip(*(rank["gradients"] for rank in ranks), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_metrics_are_those_of_one_process(run):
    alone, rank, _ = run
    expected = [comparable(log) for log in alone["logs"] if "loss" in log]
    found = [comparable(log) for log in rank["logs"] if "loss" in log]
    assert len(found) == len(expected) == distributed_worker.STEPS
    for ours, theirs in zip(found, expected, strict=True):
        for log in (ours, theirs):
            log.pop("epoch")  # counted in each process's batches
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-6)


def test_evaluation_metrics_are_those_of_one_process(run):
    """The ranks' last batches are filled up with pairs from the start; those must not count."""
    alone, *ranks = run
    for when in ("before", "after"):
        expected = comparable(alone[when])
        assert "eval_loss" in expected
        for rank in ranks:
            assert comparable(rank[when]) == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert alone["after"]["eval_loss"] != alone["before"]["eval_loss"]


def test_ranks_report_the_same_keys_and_values(run):
    _, *ranks = run
    for ours, theirs in zip(*(rank["logs"] for rank in ranks), strict=True):
        assert list(ours) == list(theirs)
        assert comparable(ours) == comparable(theirs)


def test_the_reference_pass_keeps_the_order(run):
    alone, *ranks = run
    for rank in ranks:
        assert rank["columns"].keys() == alone["columns"].keys() and rank["scale"] == pytest.approx(alone["scale"])
        for name, values in alone["columns"].items():
            assert len(set(values)) == len(values)  # no two alike, so that a wrong order shows
            assert rank["columns"][name] == pytest.approx(values, rel=1e-5)


def test_scores_are_those_of_one_process(run):
    alone, *ranks = run
    for rank in ranks:
        assert rank["scores"].keys() == alone["scores"].keys()
        for name, values in alone["scores"].items():
            np.testing.assert_allclose(rank["scores"][name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_runs_cover_what_they_claim(results):
    assert results["cached"][0]["columns"] and results["reference-free"][0]["columns"]
    assert not results["copy"][0]["columns"] and not results["adapter"][0]["columns"]


@pytest.mark.parametrize("name", ["sharded", "sharded adapter"])
def test_fsdp_sees_the_head(results, name):
    """The head's weight is whole only inside its own forward: reading it anywhere else would find a shard."""
    alone, *ranks = results[name]
    assert min(gradient.abs().max() for gradient in alone.values()) > 1e-3
    for rank in ranks:
        close(rank, alone)
