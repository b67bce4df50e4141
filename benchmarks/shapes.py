"""Vocabulary and hidden size of real models."""

MODELS = {  # name: (hidden size, vocabulary)
    "Pythia-2.8B": (2560, 50304),
    "SmolLM2-135M": (576, 49152),
    "Llama-2-7B": (4096, 32000),
    "Llama-3-8B": (4096, 128256),
    "Qwen3-0.6B": (1024, 151936),
}
