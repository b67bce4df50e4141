"""The cached pass of the reference: its key and its file."""

import errno
import io
import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer

from mallowspo.adapters import add_adapter
from mallowspo.data import tokenize_pairs
from mallowspo.dispersion import check_cache_folder, fingerprint, load_cache, save_cache
from mallowspo.files import write_whole

# Key

TOKENS = {"prompt_ids": [[1, 5], [1]], "chosen_ids": [[7, 2], [8, 9, 2]], "rejected_ids": [[6, 2], [2]]}
DATA = Dataset.from_dict(TOKENS)
SETTINGS = {"version": "1", "mixed_precision": "no"}


def key(model=None, data=DATA, settings=SETTINGS):
    return fingerprint(tiny_model() if model is None else model, data, settings)


def test_the_same_model_and_data_have_the_same_key(tmp_path):
    model = tiny_model()
    wider = DATA.add_column("row", [0, 1])  # columns that the pass does not read
    assert key(model) == key() == key(model, wider) == key(model, settings=dict(reversed(SETTINGS.items())))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.config.use_cache = not loaded.config.use_cache
    assert key(loaded) == key()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_one_changed_weight_changes_the_key(name):
    model = tiny_model()
    with torch.no_grad():
        flat = model.get_parameter(name).view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    assert key(model) != key()


def test_a_changed_buffer_dtype_or_config_changes_the_key():
    """Neither is in the weights: stale numbers of another rotary base, norm or precision must not be taken."""
    buffer = tiny_model()
    buffer.model.rotary_emb.inv_freq[1] *= 2
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    keys = [key(), key(buffer), key(tiny_model().double()), key(eager)]
    keys += [key(tiny_model(rms_norm_eps=1e-3)), key(tiny_model(hidden_act="gelu")), key(tiny_model("mistral"))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("column", TOKENS)
def test_changed_tokens_change_the_key(column):
    for row, position in ((0, 0), (1, -1)):
        tokens = {name: [list(ids) for ids in rows] for name, rows in TOKENS.items()}
        tokens[column][row][position] += 1
        assert key(data=Dataset.from_dict(tokens)) != key()


def test_moved_boundaries_and_rows_change_the_key():
    moved = TOKENS | {"chosen_ids": [[7, 2, 8], [9, 2]]}
    swapped = {name: rows[::-1] for name, rows in TOKENS.items()}
    between = {"prompt_ids": [[1], [1]], "chosen_ids": [[5, 7, 2], [8, 9, 2]], "rejected_ids": [[5, 6, 2], [2]]}
    keys = [key(), *(key(data=Dataset.from_dict(tokens)) for tokens in (moved, swapped, between))]
    keys.append(key(data=DATA.select([0])))
    assert len(set(keys)) == len(keys)


def test_settings_change_the_key():
    assert key(settings=SETTINGS | {"mixed_precision": "bf16"}) != key() != key(settings=SETTINGS | {"new": 1})


@pytest.mark.parametrize(
    "lora", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}]
)
def test_adapters_do_not_change_the_key(lora):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    )
    assert key(model) == key()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert key(model) == key()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] += 1
    assert key(model) != key()


@pytest.mark.parametrize("change", ["weight", "alpha", "off"])
def test_an_adapter_that_is_part_of_the_reference_changes_the_key(change):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora(init_lora_weights=False))
    before = fingerprint(model, DATA, SETTINGS, with_adapter=True)
    assert before == fingerprint(model, DATA, SETTINGS, with_adapter=True) != key(model)
    if change == "weight":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] += 1
    elif change == "alpha":
        model.peft_config["default"].lora_alpha *= 2
    else:
        model.add_adapter("other", lora(init_lora_weights=False))
        model.set_adapter("other")
    assert fingerprint(model, DATA, SETTINGS, with_adapter=True) != before


# File

COLUMNS = {
    "ref_chosen_logps": torch.tensor([-1.5, -0.0, float("-inf"), 1e-45, float("nan")]),
    "ref_chosen_entropy": torch.tensor([0.1, 0.2, 0.3, 1 / 3, 3e38]),
}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some" / "folder" / "abc.safetensors"
    save_cache(path, COLUMNS, "abc")
    return path


def test_round_trip_is_exact(path):
    assert same_bits(load_cache(path, "abc", 5), COLUMNS)
    assert os.listdir(path.parent) == ["abc.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_cache_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"corrupt.*delete {path}"):
        load_cache(path, "abc", 5)


def test_any_flipped_byte_is_refused(path):
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    described = json.loads(whole[8 : 8 + header])
    assert described["__metadata__"].keys() == {"fingerprint", "checksum"}
    for position in range(len(whole)):
        raw = bytearray(whole)
        raw[position] ^= 0x15
        path.write_bytes(raw)
        try:
            found = load_cache(path, "abc", 5)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a blank of the header's padding, say: nothing that says anything
            assert same_bits(found, COLUMNS), position
    assert 8 + header < len(whole)


def test_a_cache_of_another_model_is_refused(path, tmp_path):
    other = tmp_path / "def.safetensors"
    shutil.copy(path, other)  # under the other's name
    with pytest.raises(ValueError, match=f"belongs to another model, data set or setting; delete {other}"):
        load_cache(other, "def", 5)


def test_a_file_of_somebody_else_is_refused(path):
    from safetensors.torch import save_file

    save_file(COLUMNS, path)
    with pytest.raises(ValueError, match=f"another model.*{path}"):
        load_cache(path, "abc", 5)
    path.write_text("not even that")
    with pytest.raises(ValueError, match=f"corrupt.*{path}"):
        load_cache(path, "abc", 5)


@pytest.mark.parametrize("rows", [4, 6, 0])
def test_a_cache_of_another_length_is_refused(path, rows):
    with pytest.raises(ValueError, match=f"length.*{path}"):
        load_cache(path, "abc", rows)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """Takes half of what is written."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        full_disk()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    if call == "write":
        monkeypatch.setattr("mallowspo.files.open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, call, full_disk)
    path = tmp_path / "cache" / "abc.safetensors"
    with pytest.raises(OSError, match="could not be written.*free space or set reference_cache_dir") as caught:
        save_cache(path, COLUMNS, "abc")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert os.listdir(path.parent) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"0123456789")
    assert os.listdir(tmp_path) == []


def test_all_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    path, sizes = tmp_path / "new" / "folder" / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write_whole(path, b"0123456789")
    assert sizes == [10] and path.read_bytes() == b"0123456789"


def test_a_failed_write_keeps_the_cache_that_was_there(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="could not be written"):
        save_cache(path, {name: column + 1 for name, column in COLUMNS.items()}, "abc")
    assert os.listdir(path.parent) == ["abc.safetensors"] and same_bits(load_cache(path, "abc", 5), COLUMNS)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for attempt in (
        lambda: save_cache(tmp_path / "file" / "abc.safetensors", COLUMNS, "abc"),
        lambda: check_cache_folder(tmp_path / "file"),
    ):
        with pytest.raises(OSError, match="could not be written.*set reference_cache_dir"):
            attempt()


def test_processes_with_the_same_number_do_not_meet(path, monkeypatch):
    """In containers each is process 1: while one of them writes, another one does the same."""
    sync = os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        save_cache(path, COLUMNS, "abc")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    save_cache(path, COLUMNS, "abc")
    assert os.listdir(path.parent) == [path.name] and same_bits(load_cache(path, "abc", 5), COLUMNS)


def test_the_active_adapter_is_in_the_key():
    dataset, model = tokenize_pairs(tiny_pairs(2), tiny_tokenizer()), add_adapter(tiny_model(), lora())
    model.add_adapter("other", lora(init_lora_weights=False))
    keys = []
    for name in ("default", "other"):
        model.set_adapter(name)
        keys += [fingerprint(model, dataset, {}, with_adapter=True), fingerprint(model, dataset, {})]
    assert keys[0] != keys[2] and keys[1] == keys[3]
