"""Reference models whose weights are shared out over the ranks, as FSDP2 and DeepSpeed do it to the model in training.

ZeRO-3 parts the weights of a model as they are loaded, and marks each with ``ds_id``; FSDP2 parts those of a model
that is whole. Either brings them back around the call of each module, for a reference as for the policy.
"""

import copy
from contextlib import nullcontext

from accelerate.utils import fsdp2_prepare_model


def is_partitioned(model):
    """Whether ZeRO-3 has parted the model's weights over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(tensor):
    """A context in which a weight is whole on every rank; all ranks enter it together."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def inference_engine(model, accelerator):
    """The model in a DeepSpeed engine without an optimiser; whole on every rank, unless it is partitioned."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for of_training in ("optimizer", "scheduler"):
        config.pop(of_training, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    if not is_partitioned(model):
        config["zero_optimization"]["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def fully_sharded(model, accelerator):
    """The model, parted by FSDP2 as the accelerator's plugin says."""
    plugin = accelerator.state.fsdp_plugin
    before = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    model = fsdp2_prepare_model(accelerator, model)
    # It has learned the names of this model's layers, which the policy's may not have.
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = before
    return model


def check_loaded(model):
    """ValueError for a model whose weights this rank does not have."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the reference needs its weights on every rank before training: with FSDP set "
            "fsdp_cpu_ram_efficient_loading to false"
        )
