"""Models whose weights are not on every rank: parted by DeepSpeed's ZeRO-3 as they are loaded, or still without any.

DeepSpeed marks a weight that it has parted with ``ds_id``. Its engine brings the whole weights back around the call of
each module, for a reference as for the model that it trains.
"""

import copy
from contextlib import nullcontext


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
    """The model in a DeepSpeed engine that calls it, without an optimiser; whole on every rank, unless partitioned."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for of_training in ("optimizer", "scheduler"):
        config.pop(of_training, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    if not is_partitioned(model):
        config["zero_optimization"]["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def check_loaded(model):
    """ValueError for a model whose weights this rank does not have."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the reference needs its weights on every rank before training: with FSDP set "
            "fsdp_cpu_ram_efficient_loading to false"
        )
