"""The dispersion of each pair: from the data or from the reference model, its scale, and the cached reference pass.

a = -log phi >= 0 throughout. Three sources, all before the scale:

- ``entropy``: :func:`mallowspo.functional.neg_log_dispersion` of the reference model's token entropies;
- ``agreement``: the share s of annotators who chose the chosen response, through the inverse of the link at a rank
  difference of one (:func:`agreement_to_neg_log_dispersion`);
- ``neg_log_dispersion``: given as it is, for instance made from a judging model's preference
  (:func:`answer_log_odds`, :func:`log_odds_to_neg_log_dispersion`).
"""

import json
import operator
import tempfile
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.functional import binary_cross_entropy_with_logits

from mallowspo import functional as F
from mallowspo.collator import pad
from mallowspo.data import PAIR_COLUMNS
from mallowspo.files import write_whole
from mallowspo.modeling import attach_token_stats, evaluating, sequence_stats
from mallowspo.sharded import gathered

# An agreement of 1 would mean a = infinity; a panel cannot tell more than this anyway.
AGREEMENT_CEILING = 0.99
SOURCES = (*PAIR_COLUMNS, "entropy")


def chosen_source(args, objective, columns):
    """Which of SOURCES the dispersion of an objective comes from: args.dispersion_source, or None and the columns say.

    Args:
        args: with ``dispersion_source``. objective: a ``PreferenceObjective`` that uses a dispersion.
        columns: the names of the training set's columns.

    Raises:
        ValueError: a choice that is open, or an agreement that the link as it is smoothed does not return.
    """
    found = [name for name in PAIR_COLUMNS if name in columns]
    if args.dispersion_source is None and len(found) > 1:
        raise ValueError(f"the data has both {found[0]!r} and {found[1]!r}; choose one by dispersion_source")
    source = args.dispersion_source or (found[0] if found else "entropy")
    if source == "agreement" and objective.link == "mallows-phi" and objective.smoothing > 1:
        raise ValueError(
            f"smoothing={objective.smoothing} changes the mallows-phi link at a margin of 1, where an agreement is "
            "read off it: set smoothing to 1 or less, or give a column neg_log_dispersion"
        )
    return source


def check_column(source, columns, data, link):
    """ValueError where a data set, named as ``data``, lacks the column that the dispersion comes from."""
    if source in PAIR_COLUMNS and source not in columns:
        raise ValueError(
            f"{data} lacks the column {source!r}, the dispersion of {link!r}: add it, or set "
            "dispersion_source='entropy'"
        )


def agreement_to_neg_log_dispersion(agreement, link):
    """a such that the link gives the observed agreement to a pair one rank apart.

    theta (and the plug-ins into ipo and hinge, which have no probability of their own): s = sigmoid(2a), so
    a = logit(s) / 2. phi: s = g(1) = 1 / (1 + phi), so a = logit(s); a smoothing above 1 would change g(1).

    Args:
        agreement: [B] floats in (0.5, 1]; above AGREEMENT_CEILING they count as that.
        link: a mallows link.

    Returns:
        [B] float64 array. Raises ValueError for a value outside (0.5, 1] or a link without dispersion.
    """
    share = _shares(agreement, with_half=False)
    return log_odds_to_neg_log_dispersion(np.log(share) - np.log1p(-share), link)


def _shares(agreement, with_half):
    """Agreements as float64, none above the ceiling; ValueError for one out of range."""
    agreement = np.asarray(agreement, dtype=np.float64)
    bad = ~(((agreement >= 0.5) if with_half else (agreement > 0.5)) & (agreement <= 1))
    if bad.any():
        legal = f"{'[' if with_half else '('}0.5, 1]"
        raise ValueError(f"agreement must be in {legal}, got {agreement[bad][0]} at index {int(np.argmax(bad))}")
    return np.minimum(agreement, AGREEMENT_CEILING)


@torch.no_grad()
def answer_log_odds(model, questions, answers, batch_size=16, done=None):
    """What a model answers to a question with two answers: log p(first) - log p(second) of the next token.

    Ask it of each response what the annotators were asked: the difference between the two responses of a pair is the
    log-odds of :func:`log_odds_to_neg_log_dispersion`.

    Args:
        model: a causal LM; its head learns to score single tokens (``modeling.attach_token_stats``).
        questions: n lists of token ids of any lengths, without padding, none empty.
        answers: the two answers' first token ids, different ones.
        batch_size: questions at a time, the longest first. done: called with the number of questions after each batch.

    Returns:
        [n] float32 tensor on the CPU, in the order of the questions; no gradient, and the model's mode stays.

    Raises:
        ValueError: not two answers or equal ones, an empty question, a token outside the vocabulary, batch_size < 1.
        TypeError: texts or anything else in place of token ids; a model that ``attach_token_stats`` cannot teach.
    """
    attach_token_stats(model)
    vocabulary = model.get_output_embeddings().out_features
    answers = _token_ids("answers", answers, vocabulary)
    if len(answers) != 2:
        raise ValueError(f"answers must be two token ids, the first of each answer, got {answers}")
    first, second = answers
    if first == second:
        raise ValueError(
            f"the answers begin with the same token, {first}, so they cannot be told apart; choose others"
        )
    questions = [_token_ids(f"question {i}", ids, vocabulary) for i, ids in enumerate(questions)]
    if not all(questions):
        raise ValueError(f"question {questions.index([])} has no tokens; leave it out")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i]))
    odds = torch.empty(len(questions))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad([questions[i] for i in rows], [([first],)] * len(rows), pad_token_id=0)
            # Both answers are scored where the first one is predicted.
            batch["target_index"] = batch["target_index"].repeat(2)
            batch["target_ids"] = torch.tensor(answers).repeat_interleave(len(rows))
            batch["num_tokens"] = torch.ones(2 * len(rows), dtype=torch.int64)
            logps = sequence_stats(model, {name: values.to(model.device) for name, values in batch.items()}).logps
            odds[rows] = (logps[: len(rows)] - logps[len(rows) :]).float().cpu()
            if done is not None:
                done(len(rows))
    return odds


def _token_ids(name, ids, vocabulary):
    """A list of ints from a list, array or tensor of token ids, which must be of the vocabulary."""
    try:
        found = [operator.index(token) for token in ids]
    except TypeError as error:
        raise TypeError(
            f"{name} must be a list of token ids, got {ids!r:.80}; tokenize texts, one int a token"
        ) from error
    # Checked here because an id out of range leaves a GPU unusable for the rest of the process.
    bad = [token for token in found if not 0 <= token < vocabulary]
    if bad:
        raise ValueError(
            f"token {bad[0]} of {name} is outside the vocabulary of {vocabulary}; use the model's tokenizer"
        )
    return found


def log_odds_to_neg_log_dispersion(log_odds, link, *, offset=0.0, slope=1.0):
    """a from a model's opinion in place of people's: the log-odds with which it prefers one of two responses.

    offset + slope |log-odds|, not below 0, stands for the logit of the agreement s in
    :func:`agreement_to_neg_log_dispersion`. A model's opinions are seldom calibrated: :func:`fit_log_odds` finds
    offset and slope from pairs whose agreement is known.

    Args:
        log_odds: [B] finite floats; their sign does not matter.
        link: a mallows link.
        offset, slope: numbers.

    Returns:
        [B] float64 array. Raises ValueError for a value that is not finite or a link without dispersion.
    """
    if link not in F.MALLOWS_LINKS:
        raise ValueError(f"link {link!r} has no dispersion; choose one of {', '.join(sorted(F.MALLOWS_LINKS))}")
    logit = np.maximum(offset + slope * _finite_size(log_odds), 0)
    return logit if link == "mallows-phi" else logit / 2


def fit_log_odds(log_odds, agreement):
    """Maximum-likelihood offset and slope >= 0 of sigmoid(offset + slope |log-odds|), given the known agreements.

    Args:
        log_odds: [n] finite floats, or any other index of agreement that is not negative.
        agreement: [n] floats in [0.5, 1]; above AGREEMENT_CEILING they count as that.

    Returns:
        (offset, slope) floats, for :func:`log_odds_to_neg_log_dispersion`. Raises ValueError for a value out of range,
        no pairs or columns of different lengths.
    """
    size, share = _finite_size(log_odds), _shares(agreement, with_half=True)
    if size.shape != share.shape or not size.size:
        raise ValueError(f"one agreement for each log-odds is needed, got shapes {share.shape} and {size.shape}")
    level, spread = share.mean(), size.std()
    if spread > 0:
        centred, target = torch.as_tensor((size - size.mean()) / spread), torch.as_tensor(share)
        line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        stop = {"max_iter": 200, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
        optimiser = torch.optim.LBFGS([line], line_search_fn="strong_wolfe", **stop)

        def closure():
            optimiser.zero_grad()
            loss = binary_cross_entropy_with_logits(line[0] + line[1] * centred, target)
            loss.backward()
            return loss

        optimiser.step(closure)
        height, slope = line.tolist()
        if slope > 0:
            return height - slope * float(size.mean() / spread), slope / float(spread)
    return float(np.log(level) - np.log1p(-level)), 0.0  # the likelihood is concave: the best slope >= 0 is 0


def _finite_size(log_odds):
    log_odds = np.asarray(log_odds, dtype=np.float64)
    if not np.isfinite(log_odds).all():
        raise ValueError(f"log_odds must be finite, got {log_odds[~np.isfinite(log_odds)][0]}")
    return np.abs(log_odds)


def calibrated_scale(neg_log_dispersion):
    """The scale at which the factor 2a has mean 1 over the training set.

    beta then means what it does in DPO for mallows-theta, and for a plug-in what it does in its host. Not so for
    mallows-phi: with smoothing 1 its loss has the slope -0.29 at a margin of 0 and a = 1/2, where DPO's has -0.5.

    Args:
        neg_log_dispersion: [B] unscaled values, an array or a tensor. Raises ValueError where all are zero, or one is
            not finite.
    """
    mean = float(np.mean(np.asarray(neg_log_dispersion, dtype=np.float64)))
    if not 0 < mean < np.inf:
        raise ValueError(
            f"cannot calibrate the dispersion scale: the mean neg-log dispersion is {mean}; give a number"
        )
    return 1 / (2 * mean)


# ---- the cached pass of the reference model ------------------------------------------------------------------------

# What a config says about a model's origin and use, not about what it computes (its dtype is the weights').
_CONFIG_NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def fingerprint(model, dataset, settings, *, with_adapter=False):
    """A hash of everything the reference pass depends on.

    That is the model's class, attention kernel, config and weights, the token ids (hence tokenizer and data), and the
    settings.

    Args:
        model: the reference. Where ZeRO-3 has partitioned it, all ranks call this together.
        dataset: of ``tokenize_pairs``.
        settings: JSON-serialisable dict.
        with_adapter: whether a PEFT model is the reference as it is, or with its adapter off.
    """
    digest = xxhash.xxh3_128()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {name: value for name, value in base.config.to_dict().items() if name not in _CONFIG_NO_MATTER}
    facts = [type(base).__name__, base.config._attn_implementation, config, settings]
    adapter = None
    if base is not model:
        if with_adapter:
            facts += [model.active_adapters, {name: lora.to_dict() for name, lora in model.peft_config.items()}]
        else:
            adapter = model.base_model.prefix
    digest.update(json.dumps(facts, sort_keys=True, default=_plain).encode())
    tensors = {}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if not (adapter and (adapter in name or ".modules_to_save." in name)):
            tensors[name := name.replace(".base_layer", "").replace(".original_module", "")] = tensor
            if hasattr(tensor, "quant_state"):  # bitsandbytes keeps the scales of a 4-bit weight beside it
                tensors |= {f"{name}.{part}": t for part, t in tensor.quant_state.as_dict(packed=True).items()}
    for name, tensor in sorted(tensors.items()):
        with gathered(tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in dataset[column]:
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64))
    return digest.hexdigest()


def _plain(value):
    """What JSON does not know, always in the same order."""
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def check_cache_folder(folder):
    """Makes a folder for :func:`save_cache`; its OSError, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _not_written(error, folder) from error


def save_cache(path, columns, key):
    """Writes float32 columns, {name: [values]}, whole or not at all.

    Raises:
        OSError: it could not be written (disk full, no permission); nothing is left behind.
    """
    data = save(columns, metadata={"fingerprint": key, "checksum": _checksum(columns)})
    try:
        write_whole(path, data)
    except OSError as error:
        raise _not_written(error, path) from error


def _not_written(error, path):
    advice = f"the reference cache could not be written ({error.strerror}); free space or set reference_cache_dir"
    return OSError(error.errno, advice, str(path))


def load_cache(path, key, rows, lengths=None):
    """The columns that :func:`save_cache` wrote under the same key, of as many values as rows or as lengths[name].

    Raises:
        ValueError: the file is corrupt, of another model, data set or setting, or of another length.
    """
    raw = Path(path).read_bytes()
    advice = f"delete {path} to compute it again"
    try:
        columns = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the reference cache is corrupt ({error}); {advice}") from error
    metadata = header.get("__metadata__", {})
    if metadata.get("fingerprint") != key:
        raise ValueError(f"the reference cache belongs to another model, data set or setting; {advice}")
    whole = all(len(column) == (lengths or {}).get(name, rows) for name, column in columns.items())
    if metadata.get("checksum") != _checksum(columns) or not whole:
        raise ValueError(f"the reference cache is corrupt (checksum or length); {advice}")
    return columns


def _checksum(columns):
    digest = xxhash.xxh3_128()
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(columns[name].numpy())
    return digest.hexdigest()
