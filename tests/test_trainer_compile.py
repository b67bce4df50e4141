"""torch_compile=True: the same training, from code that the lengths of a batch do not make anew."""

import pytest
import torch
from tiny import lora, tiny_pairs, tiny_trainer, train_logs
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, TrainerCallback


class Graphs(TrainerCallback):
    """The number of graphs that were compiled until the end of each step and of each evaluation."""

    def __init__(self):
        self.trained, self.evaluated = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.trained.append(counters["stats"]["unique_graphs"])

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")  # as accelerate launch does
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # restored afterwards: TrainingArguments leave theirs set
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder, is_compiled, peft_config=None, **options):
    graphs = Graphs()
    if peft_config is not None:
        torch.manual_seed(0)
        peft_config = lora(target_modules=peft_config, init_lora_weights=False)
    trainer = tiny_trainer(
        folder, rows=12, eval_dataset=tiny_pairs(9, seed=1), eval_strategy="steps", eval_steps=4, max_steps=12,
        callbacks=[graphs], peft_config=peft_config, torch_compile_backend="eager" if is_compiled else None, **options,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer, graphs


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="packed"),
        pytest.param({"share_prompt": False}, id="padded"),
        pytest.param({"peft_config": ["q_proj", "lm_head"], "loss_type": "mallows-theta+wpo"}, id="adapter"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed"),
    ],
)
def test_a_compiled_model_trains_as_the_model_does(tmp_path, options):
    (plain, none), (compiled, graphs) = (run(tmp_path / str(way), way, **options) for way in (False, True))
    assert not any(none.trained) and graphs.trained[0] > 0
    assert len(graphs.trained) == 12 and graphs.trained[3] > graphs.trained[0]  # other lengths were met
    assert graphs.trained[7] == graphs.trained[4]  # between two evaluations nothing is compiled
    assert graphs.trained[11] == graphs.evaluated[1] == graphs.trained[7]  # and nothing from the second one on
    for ours, expected in zip(train_logs(compiled), train_logs(plain), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_is_compiled_is_saved_as_the_model(tmp_path):
    trainer, _ = run(tmp_path, True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = {name.removeprefix("_orig_mod."): value for name, value in trainer.model.state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
