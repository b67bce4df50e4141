"""What the tests of the dialogue recipe's win rates share: its modules, a reward model and an endpoint that judges."""

import contextlib
import http.server
import json
import threading

import torch
from dialogue_recipe import FOLDER
from load_recipe import import_recipe
from tiny import GPT2_SHAPE, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

win_rates, judges, sampling, win_rate_report, *_ = import_recipe(
    "dialogue", "win_rates", "judges", "sampling", "win_rate_report", "report", "sources"
)
PAPER = str(FOLDER / "win_rates_paper.yaml")


def reward_folder(path, model_type="bert", labels=1, seed=0):
    """A random classifier; BERT reads its first token, GPT-2 the last one that is no padding."""
    tokenizer = tiny_tokenizer()
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = bert if model_type == "bert" else GPT2_SHAPE
    config = {"vocab_size": len(tokenizer), "num_labels": labels, "initializer_range": 1.0, "pad_token_id": 0} | shape
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **config))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def endpoint(answer):
    """A chat model on this machine; ``answer(message)`` -> text, bytes (the body), an HTTP status, None to hang up."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            said = answer(body["messages"][0]["content"])
            if said is None:
                return
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            if isinstance(said, str):
                said = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            with contextlib.suppress(BrokenPipeError):  # the other side did not wait
                self.wfile.write(said if isinstance(said, bytes) else b"overloaded")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def replies_in(message):
    first = message.split("Reply A:\n")[1].split("\n\nReply B:")[0]
    return first, message.split("Reply B:\n")[1].split("\n\nAnswer")[0]


def more_e(message):
    """A judge that likes the letter e."""
    first, second = (reply.count("e") for reply in replies_in(message))
    return "Reply B." if second > first else "A"
