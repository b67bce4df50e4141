"""What a language model says about a pair of sentences, and the indices of agreement made from it.

Plain text without a chat template: small instruction-tuned models answer a completion better than a question. Every
sentence is read once per prompt, whatever the number of pairs it is in; each pass is cached by domain.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mallowspo import functional as F
from mallowspo.collator import pad
from mallowspo.dispersion import fingerprint, load_cache, log_odds_to_neg_log_dispersion, save_cache
from mallowspo.modeling import attach_token_stats, evaluating

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

PAPER = "entropy index (paper)"
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
    for indices, batch in _batches(model, prompts, [[text] for text in texts], batch_size, done):
        hidden = _hidden_states(model, batch)
        stats = model.get_output_embeddings()(hidden[batch["target_index"]], target_ids=batch["target_ids"])
        lengths = batch["num_tokens"]
        sums = [torch.segment_reduce(values, "sum", lengths=lengths, axis=0) for values in stats]
        features = torch.segment_reduce(hidden[batch["target_index"] + 1], "mean", lengths=lengths, axis=0)
        columns = (sums[0], sums[1] / lengths, lengths, features)
        rows |= dict(zip(indices, zip(*(column.float().cpu() for column in columns), strict=True), strict=True))
    columns = zip(*(rows[i] for i in range(len(rows))), strict=True)
    return {
        name: torch.stack(column)
        for name, column in zip(("logps", "entropy", "tokens", "features"), columns, strict=True)
    }


def answer_log_odds(model, questions, answers, batch_size, done=None):
    """[n] float32: log p(first answer) - log p(second answer) as the next token after each question.

    Args:
        model, batch_size, done: as of :func:`sentence_stats`. questions: n lists of token ids.
        answers: the two token ids.
    """
    odds = torch.empty(len(questions))
    for indices, batch in _batches(model, questions, [[answers[:1]]] * len(questions), batch_size, done):
        last = _hidden_states(model, batch)[batch["target_index"]]
        logps = [
            model.get_output_embeddings()(last, target_ids=torch.full_like(batch["target_ids"], answer)).logps
            for answer in answers
        ]
        odds[indices] = (logps[0] - logps[1]).float().cpu()
    return odds


def _batches(model, prompts, responses, size, done):
    """(indices, batch) from the longest sequences to the shortest, so that little is padding."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(responses[i][0]))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = pad([prompts[i] for i in indices], [responses[i] for i in indices], pad_token_id=0)
        yield indices, {name: tensor.to(model.device) for name, tensor in batch.items()}
        if done is not None:
            done(len(indices))


def _hidden_states(model, batch):
    """[R * T, D]: last hidden states of every position of a padded batch."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


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
        ``chosen`` [P, 2]: the log-odds that the one shown first is the more positive.

    Raises:
        ValueError: a corrupt cache file (the message says to delete it), answers that begin with the same token.
    """
    attach_token_stats(model)
    texts, domains = {}, [first.domain for first, _ in pairs]
    for first, second in pairs:
        texts.setdefault(first.domain, []).extend([first.text, second.text])

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(answers):
        first, second = (ids(answer)[0] for answer in answers)
        if first == second:
            raise ValueError(f"the answers {answers} begin with the same token, so they cannot be told apart")
        return [first, second]

    parts = {domain: {} for domain in texts}
    passes = len(WRITE) + len(ASK) + 1  # the last reads as many sequences: each pair in both orders
    bar = tqdm(total=passes * 2 * len(pairs), desc="Reading sentences", unit="sequence")
    with bar, torch.no_grad(), evaluating(model):
        for domain, lines in texts.items():
            part, count, slug = parts[domain], len(lines), domain.replace(" ", "-")

            def stage(name, prompts, responses, answers, compute, slug=slug, count=count):
                columns = {"prompt_ids": prompts, "chosen_ids": responses, "rejected_ids": [answers]}
                key = fingerprint(model, columns, {})
                path = Path(cache_dir) / f"{slug}-{name}-{key[:12]}.safetensors"
                if path.exists():
                    bar.update(count)
                    return load_cache(path, key, count)
                found = compute()
                save_cache(path, found, key)
                return found

            def ask(name, questions, answers, stage=stage):
                questions, answers = [ids(question) for question in questions], answer_ids(answers)
                compute = lambda: {"odds": answer_log_odds(model, questions, answers, batch_size, bar.update)}  # noqa: E731
                return stage(name, questions, [], answers, compute)["odds"]

            responses = [ids(text) for text in lines]
            for name, template in WRITE.items():
                prompts = [ids(template.format(domain=domain))] * count
                compute = lambda p=prompts, r=responses: sentence_stats(model, p, r, batch_size, bar.update)  # noqa: E731
                found = stage(name, prompts, responses, [], compute)
                part |= {f"{name}_{column}": found[column] for column in ("logps", "entropy", "tokens")}
                if name == "neutral":
                    part["features"] = found["features"]
            asked = [ask(f"ask{i}", [t.format(text=text) for text in lines], a) for i, (t, *a) in enumerate(ASK)]
            part["asked"] = torch.stack(asked, dim=1)
            orders = [pair[::step] for pair in zip(lines[::2], lines[1::2], strict=True) for step in (1, -1)]
            template, *answers = CHOOSE
            part["chosen"] = ask("choose", [template.format(first=a, second=b) for a, b in orders], answers)
    assert list(parts) == list(dict.fromkeys(domains))  # pairs come domain by domain
    columns = {name: torch.cat([part[name] for part in parts.values()]) for name in next(iter(parts.values()))}
    return {name: column.unflatten(0, (-1, 2)) for name, column in columns.items()}


# ---- indices -------------------------------------------------------------------------------------------------------


def agreement_indices(found, vocabulary):
    """The indices of each pair: neg-log dispersions up to a scale, larger where people should agree more.

    Args:
        found: of :func:`read_with_model`; without ``chosen`` there is no choice entropy. vocabulary: number of tokens.

    Returns:
        {name: [P] float64 array, >= 0}:

        - the paper's: -log of the mean token entropy of the two sentences over log V;
        - margin per token: difference of the mean token log-probabilities;
        - contrast margin: difference of log p(sentence | positive prompt) - log p(sentence | negative prompt);
        - choice entropy: the paper's form for two outcomes, with the mean log-odds of both orders of the question;
        - asked margin: difference of the log-odds of positive and negative, mean over paraphrases;
        - paraphrase variance: log(1 + 1 / variance over paraphrases of that difference).
    """
    found = {name: column.double() for name, column in found.items()}
    logps = found["neutral_logps"] / found["neutral_tokens"]
    contrast = found["positive_logps"] - found["negative_logps"]
    asked = found["asked"][:, 0] - found["asked"][:, 1]
    variance = asked.var(dim=1, correction=0).clamp(min=SMALLEST_VARIANCE)
    margins = {"margin per token": logps, "contrast margin": contrast, "asked margin": found["asked"].mean(dim=2)}
    indices = {PAPER: F.neg_log_dispersion(*found["neutral_entropy"].T.contiguous(), vocabulary)}
    for name, column in margins.items():
        indices[name] = log_odds_to_neg_log_dispersion(column[:, 0] - column[:, 1], "mallows-theta")
    if "chosen" in found:
        choice = torch.sigmoid((found["chosen"][:, 0] - found["chosen"][:, 1]) / 2)
        entropy = torch.special.entr(choice) + torch.special.entr(1 - choice)
        indices["choice entropy"] = F.neg_log_dispersion(entropy, entropy, 2)
    indices["paraphrase variance"] = torch.log1p(1 / variance)
    return {name: np.asarray(values) for name, values in indices.items()}
