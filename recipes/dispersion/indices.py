"""What a language model says about a pair of sentences, and the indices of agreement made from it.

Plain text without a chat template: small instruction-tuned models answer a completion better than a question. Every
sentence is read once per prompt, whatever the number of pairs it is in; each pass is cached by domain.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from data import by_domain
from tqdm.auto import tqdm

from mallowspo import functional as F
from mallowspo.collator import pad
from mallowspo.dispersion import answer_log_odds, load_cache, save_cache
from mallowspo.modeling import attach_token_stats, evaluating
from mallowspo.token_weights import response_sums
from models import model_key

# The sentence as a completion of these: the first for the paper's index, the others for the contrast between them.
WRITE = {
    "neutral": "A sentence from a {domain}:\n",
    "positive": "A positive sentence from a {domain}:\n",
    "negative": "A negative sentence from a {domain}:\n",
}
# Paraphrases of one question about one sentence, and its two answers.
ASK = (
    ("Sentence: {text}\nSentiment:", " positive", " negative"),
    ("Text: {text}\nTone:", " positive", " negative"),
    ("Comment: {text}\nThe writer of this comment feels", " good", " bad"),
)
# The question about both sentences, asked in both orders.
CHOOSE = ("A: {first}\nB: {second}\nThe more positive of these two sentences is", " A", " B")

PAPER, ASKED = "entropy index (paper)", "asked margin"
SMALLEST_VARIANCE = 1e-6  # of paraphrases that all say the same, in squared nats


# ---- the model's passes --------------------------------------------------------------------------------------------


def sentence_stats(model, prompts, texts, batch_size, done=None):
    """Log-probability, entropy and features of texts as completions of their prompts.

    Args:
        model: causal LM that ``attach_token_stats`` has seen.
        prompts, texts: n lists of token ids each, none empty.
        batch_size: sequences at a time. done: called with the number of sequences after each batch.

    Returns:
        dict of float32 tensors on the CPU: ``logps`` [n] summed, ``entropy`` [n] mean nats a token, ``tokens`` [n],
        ``features`` [n, D], the mean of the last hidden states at the text's own tokens.
    """
    rows = {}
    longest = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(texts[i]))  # first: little is padding
    for start in range(0, len(longest), batch_size):
        indices = longest[start : start + batch_size]
        batch = pad([prompts[i] for i in indices], [[texts[i]] for i in indices], pad_token_id=0)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden = _hidden_states(model, batch)
        stats = model.get_output_embeddings()(hidden[batch["target_index"]], target_ids=batch["target_ids"])
        lengths = batch["num_tokens"]
        sums = [response_sums(values, lengths) for values in stats]
        features = torch.segment_reduce(hidden[batch["target_index"] + 1], "mean", lengths=lengths, axis=0)
        columns = (sums[0], sums[1] / lengths, lengths, features)
        rows |= dict(zip(indices, zip(*(column.float().cpu() for column in columns), strict=True), strict=True))
        if done is not None:
            done(len(indices))
    columns = zip(*(rows[i] for i in range(len(rows))), strict=True)
    return {
        name: torch.stack(column)
        for name, column in zip(("logps", "entropy", "tokens", "features"), columns, strict=True)
    }


def _hidden_states(model, batch):
    """[R * T, D]: last hidden states of every position of a padded batch."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


@dataclass
class _Reader:
    """Runs passes of the model, each from its cache file if that is there."""

    model: torch.nn.Module
    tokenizer: object
    cache_dir: Path
    batch_size: int
    bar: tqdm

    def __post_init__(self):
        self.model_key = model_key(self.model, {})

    def write(self, name, prompt, texts):
        """:func:`sentence_stats` of texts behind one prompt."""
        prompts = [self._begin(prompt)] * len(texts)
        return self._cached(name, sentence_stats, prompts, [self._continue(text) for text in texts])

    def ask(self, name, questions, answers):
        """``answer_log_odds`` of texts."""

        def odds(*inputs):
            return {"odds": answer_log_odds(*inputs)}

        answers = tuple(self._continue(answer)[0] for answer in answers)
        return self._cached(name, odds, [self._begin(text) for text in questions], answers)["odds"]

    def _begin(self, text):
        return self.tokenizer(text)["input_ids"]  # with a BOS where the tokenizer has one

    def _continue(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _cached(self, name, compute, *inputs):
        count = len(inputs[0])
        key = xxhash.xxh3_128_hexdigest(repr((self.model_key, compute.__name__, inputs)).encode())
        path = Path(self.cache_dir) / f"{name.replace(' ', '-')}-{key[:12]}.safetensors"
        if path.exists():
            self.bar.update(count)
            return load_cache(path, key, count)
        columns = compute(self.model, *inputs, self.batch_size, self.bar.update)
        save_cache(path, columns, key)
        return columns


def read_with_model(model, tokenizer, pairs, cache_dir, batch_size):
    """Everything the indices and the features need, from one pass per prompt and domain, each cached.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        pairs: of :func:`data.draw_pairs`, P of them, domain by domain.
        cache_dir: of files named by what they depend on: an interrupted run goes on where it stopped.
        batch_size: sequences at a time.

    Returns:
        dict of float32 tensors over pairs and their two sentences: ``<prompt>_logps``, ``<prompt>_entropy``,
        ``<prompt>_tokens`` [P, 2] for the prompts of WRITE, ``features`` [P, 2, D], ``asked`` [P, 2, len(ASK)],
        ``chosen`` [P, 2]: the log-odds that the one shown first is the more positive, in both orders.

    Raises:
        ValueError: a corrupt cache file (the message says to delete it), answers that begin with the same token.
    """
    attach_token_stats(model)
    passes = len(WRITE) + len(ASK) + 1  # the last reads as many sequences: each pair in both orders
    bar, parts = tqdm(total=passes * 2 * len(pairs), desc="Reading sentences", unit="sequence"), []
    with bar, torch.no_grad(), evaluating(model):
        reader = _Reader(model, tokenizer, cache_dir, batch_size, bar)
        for domain, rows in by_domain([first.domain for first, _ in pairs]).items():
            texts = [sentence.text for row in rows for sentence in pairs[row]]
            part = {}
            for name, template in WRITE.items():
                found = reader.write(f"{domain}-{name}", template.format(domain=domain), texts)
                part |= {f"{name}_{column}": found[column] for column in ("logps", "entropy", "tokens")}
                if name == "neutral":
                    part["features"] = found["features"]
            asked = [
                reader.ask(f"{domain}-ask{i}", [template.format(text=text) for text in texts], answers)
                for i, (template, *answers) in enumerate(ASK)
            ]
            part["asked"] = torch.stack(asked, dim=1)
            template, *answers = CHOOSE
            orders = [order for pair in zip(texts[::2], texts[1::2], strict=True) for order in (pair, pair[::-1])]
            questions = [template.format(first=first, second=second) for first, second in orders]
            part["chosen"] = reader.ask(f"{domain}-choose", questions, answers)
            parts.append(part)
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, (-1, 2)) for name in parts[0]}


# ---- indices -------------------------------------------------------------------------------------------------------


def agreement_indices(found, vocabulary):
    """The indices of each pair: neg-log dispersions up to a scale, larger where people should agree more.

    Args:
        found: of :func:`read_with_model`; without ``chosen`` there is no choice entropy. vocabulary: number of tokens.

    Returns:
        {name: [P] float64 array, >= 0}:

        - the paper's: -log of the mean token entropy of the two sentences over log V, behind the neutral prompt;
        - the same behind the prompt that says what people were asked about: a positive sentence;
        - margin per token: difference of the mean token log-probabilities;
        - contrast margin: difference of log p(sentence | positive prompt) - log p(sentence | negative prompt);
        - choice entropy: the paper's form for two outcomes, with the mean log-odds of both orders of the question;
        - asked margin: difference of the log-odds of positive and negative, mean over paraphrases;
        - paraphrase variance: log(1 + 1 / variance over paraphrases of that difference);
        - paraphrase variance of p: the same of the probabilities that the first is the more positive.
    """
    found = {name: column.double() for name, column in found.items()}
    contrast = found["positive_logps"] - found["negative_logps"]
    asked = found["asked"][:, 0] - found["asked"][:, 1]
    indices = {
        name: F.neg_log_dispersion(*found[f"{prompt}_entropy"].T.contiguous(), vocabulary)
        for name, prompt in ((PAPER, "neutral"), ("entropy index, positive prompt", "positive"))
    }
    indices["margin per token"] = (found["neutral_logps"] / found["neutral_tokens"]).diff(dim=1).squeeze(1).abs()
    indices["contrast margin"] = contrast.diff(dim=1).squeeze(1).abs()
    if "chosen" in found:
        choice = torch.sigmoid((found["chosen"][:, 0] - found["chosen"][:, 1]) / 2)
        entropy = torch.special.entr(choice) + torch.special.entr(1 - choice)
        indices["choice entropy"] = F.neg_log_dispersion(entropy, entropy, 2)
    indices[ASKED] = asked.mean(dim=1).abs()
    for name, opinion in (("paraphrase variance", asked), ("paraphrase variance of p", torch.sigmoid(asked))):
        variance = opinion.var(dim=1, correction=0).clamp(min=SMALLEST_VARIANCE)
        indices[name] = torch.log1p(1 / variance)
    return {name: values.numpy() for name, values in indices.items()}
