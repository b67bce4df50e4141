"""Tokenizers built on the spot, chat templates with their text by hand, and small preference data sets."""

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIALS = [BOS, EOS, PAD, "<unk>", "<|im_start|>", "<|im_end|>"]

PROMPTS = ["The sky is", "Question: what is the sea?\n\nAnswer:", "Hello  there,"]
CHOSEN = [" blue.", " The sea is deep and blue.", " my friend."]
REJECTED = [" green and red.", " No idea.", " go away!\n"]
TURNS = [
    [{"role": "user", "content": "What color is the sky?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "<think>a greeting</think>Hello my friend."},
        {"role": "user", "content": "What color is the sea?"},
    ],
]


def chatml_text(messages, generation=False):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" * generation


def bos_text(messages, generation=False):
    return BOS + "".join(f"[{m['role']}] {m['content']}{EOS}" for m in messages) + "[assistant]" * generation


def think_text(messages, generation=False):
    """Drops the thoughts of earlier turns and opens one in the generation prompt."""
    text = ""
    for number, m in enumerate(messages):
        content = m["content"] if number == len(messages) - 1 else m["content"].split("</think>")[-1]
        text += f"<|im_start|>{m['role']}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n<think>" * generation


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        chatml_text,
    ),
    "bos": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        bos_text,
    ),
    "think": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
        think_text,
    ),
}
CORPUS = [*PROMPTS, *CHOSEN, *REJECTED, "What color is the sea and the sky? Hello there my friend."]


def wrap(tokenizer, bos=BOS, eos=EOS, add_bos=False, add_eos=False, template=None):
    if add_bos or add_eos:
        pattern = f"{bos} $A" if add_bos else "$A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pattern} {eos}" if add_eos else pattern,
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in {bos, eos}],
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=PAD)
    fast.chat_template = template
    return fast


def byte_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level():
    split = Regex(r"\s*\w+|\s*[^\w\s]|\s+")  # a word keeps its leading whitespace, so joining the tokens loses nothing
    pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    texts = [
        *CORPUS,
        bos_text(TURNS[0], True),
        *(render(turns, True) for _, render in TEMPLATES.values() for turns in TURNS),
    ]
    words = [word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    words += ["[", "]", "assistant", " It", " is", " blue", "It", "\nIt", ".", "\n", " green", "think", "/", "<", ">"]
    words += [" hm", "hm", "\n<"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*SPECIALS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def letters(**options):
    """One token a letter, except that "ab" is one token."""
    vocab = {name: number for number, name in enumerate([*SPECIALS, "a", "b", "c", " ", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    return wrap(tokenizer, **options)


A, B, C, AB = (letters().convert_tokens_to_ids(t) for t in ("a", "b", "c", "ab"))
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

TOKENIZERS = {
    "word": (word_level, {}),
    "bpe": (byte_bpe, {}),
    "bpe-bos": (byte_bpe, {"add_bos": True}),
    "bpe-bos-eos": (byte_bpe, {"add_bos": True, "add_eos": True}),
    "bpe-eos": (byte_bpe, {"add_eos": True}),
    "bpe-shared": (byte_bpe, {"bos": EOS}),
    "bpe-shared-bos": (byte_bpe, {"bos": EOS, "add_bos": True}),
}


def build(kind, template=None):
    make, options = TOKENIZERS[kind]
    return wrap(make(), template=template, **options), options


def raw_ids(tokenizer, text):
    """Token ids without special tokens, from the `tokenizers` library directly."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def standard(implicit=False):
    if implicit:
        chosen = [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)]
        rejected = [p + r for p, r in zip(PROMPTS, REJECTED, strict=True)]
        return Dataset.from_dict({"chosen": chosen, "rejected": rejected})
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})


def conversational(implicit=False):
    chosen = [{"role": "assistant", "content": "<think>hm</think>It is blue."}]
    rejected = [{"role": "assistant", "content": "It is green."}]
    if implicit:
        return Dataset.from_list([{"chosen": t + chosen, "rejected": t + rejected} for t in TURNS])
    return Dataset.from_list([{"prompt": t, "chosen": chosen, "rejected": rejected} for t in TURNS])


def pair(prompt, chosen, rejected):
    return Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}
