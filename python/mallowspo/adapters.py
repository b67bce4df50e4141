"""PEFT adapters around a model: added, and off for a while, where the model below is the reference."""

from contextlib import contextmanager


def add_adapter(model, peft_config):
    """The model wrapped as a ``PeftModel``. Raises ImportError without peft, TypeError for what is no
    ``PeftConfig``, ValueError for a second adapter."""
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs the package peft; run: pip install 'mallowspo[peft]'") from error
    if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):  # loaded by its name
        raise ValueError("model already has an adapter; merge it, or leave peft_config out and train this one")
    if not isinstance(peft_config, PeftConfig):
        kind = type(peft_config).__name__
        raise TypeError(f"peft_config must be a peft.PeftConfig, such as peft.LoraConfig(r=8), got {kind}")
    return get_peft_model(model, peft_config)


def check_adapter_off(model, for_good):
    """ValueError where a PEFT model with its adapter off is no reference; for_good: it is to stay one in training."""
    for adapter in model.peft_config.values():
        init = str(getattr(adapter, "init_lora_weights", ""))
        if init.lower().startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
            raise ValueError(
                f"init_lora_weights={init!r} changes the weights below the adapter, so that with the adapter off the "
                "model is not the one that was given: pass that one as ref_model too, loaded again"
            )
    of_adapter = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = [name for name in trained if not any(part in name for part in of_adapter)]
    if for_good and outside:
        raise ValueError(
            f"{outside[0]} is trained and is not the adapter's, so that with the adapter off the model would not stay "
            "the reference: pass ref_model, or set precompute_ref_log_probs=True for the constructor's data sets"
        )


@contextmanager
def without_adapter(model):
    """The PEFT model with its adapter off for a while. peft freezes and trains other weights on entry, and on exit all
    of the adapter's; here each keeps its own ``requires_grad``, which FSDP asks once, in the first forward of all."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def keep():
        for name, parameter in model.named_parameters():  # by name: FSDP changes the objects
            parameter.requires_grad_(trained[name])

    try:
        with model.disable_adapter():
            keep()
            yield
    finally:
        keep()
