"""Hidden size and vocabulary (rows of the output head) of real models, from their published configurations."""

import os

MODELS = {  # name: (hidden size, vocabulary)
    "TinyLlama-1.1B": (2048, 32000),
    "SmolLM2-135M": (576, 49152),
    "GPT-2": (768, 50257),
    "Pythia-160M": (768, 50304),
    "Llama-3.2-1B": (2048, 128256),
    "Qwen3-0.6B": (1024, 151936),
    "Gemma-3-270M": (640, 262144),
}

# The machinery's own test runs every case at sizes of no meaning.
TOY = os.environ.get("MALLOWSPO_BENCHMARK_TOY") == "1"


def sizes(model):
    """(hidden size, vocabulary) of a model."""
    hidden, vocabulary = MODELS[model]
    return (32, vocabulary // 256) if TOY else (hidden, vocabulary)


def count(number):
    """`number` tokens or pairs."""
    return 8 if TOY else number
