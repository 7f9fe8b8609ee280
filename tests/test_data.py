"""Corpora, tokenizers and batches, on small files of every accepted form and on an imitation of the hub."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import logging
import math
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import data, tokenizers
from mla.config import DataConfig
from mla.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "plain ASCII, with a comma\nand a second line\n",
    'quoted "text"\r\nwith CRLF and\ttabs\r\n',
    "NA",
    "日本語のテキスト 🎉🎉 naïve café\n",
    "12.50",
    "x = {'<|endoftext|>': 0}\n" * 40,
]
TOTAL_BYTES = sum(len(document.encode()) for document in DOCUMENTS)


@pytest.fixture
def config(tmp_path):
    """Makes a config whose cache is a folder of this test."""

    def make(corpus, **fields):
        return DataConfig(corpus=str(corpus), **{"cache_dir": str(tmp_path / "cache"), **fields})

    return make


@pytest.fixture
def folder(tmp_path):
    """A folder of text files, one for each of DOCUMENTS, in their order."""
    return write_texts(tmp_path / "texts", DOCUMENTS)


def write_texts(folder, documents):
    folder.mkdir(parents=True)
    for i, document in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(document.encode())
    return folder


def write_table(path, documents, field="text"):
    """Writes a table with a column of documents and another one, by the suffix of `path`."""
    rows = [{"id": i, field: document} for i, document in enumerate(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", field], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def documents_of(prepared, name):
    """Texts of a split, cut at the end-of-document tokens, which must stand for no bytes."""
    split = prepared.split(name)
    ends = np.flatnonzero(split.tokens == prepared.tokenizer.eos_id)
    assert not split.byte_counts[ends].any()
    pieces = np.split(split.tokens, ends + 1)
    return [prepared.tokenizer.decode(piece) for piece in pieces if len(piece)]


def fails(config, *parts):
    """The message of the one-line UserError that `prepare(config)` raises; it must contain `parts`."""
    with pytest.raises(UserError) as caught:
        data.prepare(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# -------------------------------------------------------------------------------------------------------------- corpora


@pytest.mark.parametrize(
    "form", ["folder", "glob", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.tsv", "rows.parquet"]
)
def test_forms_hold_the_same_documents(form, folder, tmp_path, config):
    if form == "folder":
        corpus = folder
    elif form == "glob":
        corpus = folder / "*.txt"
    else:
        corpus = write_table(tmp_path / form, DOCUMENTS)
    prepared = data.prepare(config(corpus))
    assert prepared.sha256 == data.prepare(config(folder)).sha256
    assert sorted(documents_of(prepared, "all")) == sorted(DOCUMENTS)
    train, validation, everything = (prepared.split(name) for name in data.SPLITS)
    assert everything.num_bytes == TOTAL_BYTES == train.num_bytes + validation.num_bytes
    assert everything.byte_counts.sum() == TOTAL_BYTES
    assert everything.documents == len(DOCUMENTS) == train.documents + validation.documents
    assert validation.documents >= 1
    assert np.array_equal(everything.tokens, np.concatenate([train.tokens, validation.tokens]))
    assert everything.tokens.dtype == np.uint16 and everything.byte_counts.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        everything.tokens[0] = 1


def test_meta_json(folder, config):
    prepared = data.prepare(config(folder, tokenizer="bpe:300"))
    meta = json.loads((prepared.directory / "meta.json").read_text())
    assert meta == prepared.meta
    assert meta["corpus"] == str(folder) and meta["tokenizer"] == "bpe:300"
    assert meta["sha256"] == prepared.sha256 and meta["vocab_size"] == prepared.vocab_size == 300
    for name in data.SPLITS:
        split = prepared.split(name)
        assert meta["splits"][name] == {
            "documents": split.documents,
            "tokens": len(split.tokens),
            "bytes": split.num_bytes,
        }
    contents = b"".join(hashlib.sha256(document.encode()).digest() for document in DOCUMENTS)
    assert prepared.sha256 == hashlib.sha256(contents).hexdigest()


def test_text_field_and_rows_without_text(tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "first"}\n{"body": null}\n{"body": ""}\n{"body": "second"}\n')
    prepared = data.prepare(config(path, text_field="body"))
    assert sorted(documents_of(prepared, "all")) == ["first", "second"]
    assert "1 rows without text in 'body' are left out" in prepared.meta["notes"]


def test_folder_takes_text_of_known_suffixes_only(tmp_path, config):
    folder = write_texts(tmp_path / "code", ["a", "b"])
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("hidden")
    (folder / "deep").mkdir()
    (folder / "deep" / "module.py").write_text("c")
    assert sorted(documents_of(data.prepare(config(folder)), "all")) == ["a", "b", "c"]


def test_card_beside_tables_is_no_text(tmp_path, config):
    write_table(tmp_path / "set" / "rows.parquet", DOCUMENTS)
    (tmp_path / "set" / "README.md").write_text("a dataset card")
    assert sorted(documents_of(data.prepare(config(tmp_path / "set")), "all")) == sorted(DOCUMENTS)


def test_stdlib(tmp_path, config):
    prepared = data.prepare(config("stdlib"))
    assert 5e6 < prepared.split("all").num_bytes < 50e6
    assert prepared.vocab_size == 257
    share = prepared.split("validation").num_bytes / prepared.split("all").num_bytes
    assert 0.02 <= share < 0.04
    assert data.unigram_perplexity(prepared) < 40
    parts = {part for file in data._stdlib_files() for part in file.parts[-4:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages"}

    started = time.perf_counter()
    again = data.prepare(config("stdlib"))
    assert time.perf_counter() - started < 2
    assert again.directory == prepared.directory and again.sha256 == prepared.sha256

    document = np.random.default_rng(0).integers(0, 128, 12_000_000, np.uint8).tobytes()
    started = time.perf_counter()
    ids, byte_counts = prepared.tokenizer.encode_documents([document] * 1)
    assert time.perf_counter() - started < 3
    assert len(ids) == len(byte_counts) == 12_000_001


# --------------------------------------------------------------------------------------------------------------- splits


def test_split_reaches_the_fraction_and_never_shares(tmp_path, config):
    documents = [f"document {i} " + "x" * (i % 50) for i in range(400)]
    prepared = data.prepare(config(write_table(tmp_path / "rows.jsonl", documents), validation_fraction=0.1))
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert not set(train) & set(validation) and sorted(train + validation) == sorted(documents)
    assert train == [document for document in documents if document in set(train)]  # in the corpus' order
    assert 0.1 <= prepared.split("validation").num_bytes / prepared.split("all").num_bytes < 0.11
    other = data.prepare(config(tmp_path / "rows.jsonl", validation_fraction=0.2))
    assert other.directory != prepared.directory and other.sha256 == prepared.sha256
    assert set(validation) < set(documents_of(other, "validation"))


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=40), st.floats(0.001, 0.999))
def test_split_leaves_no_side_empty(sizes, fraction):
    sizes = np.asarray(sizes)
    chosen = data._choose_validation(sizes, fraction)
    assert 0 < chosen.sum() < len(sizes)
    target = fraction * sizes.sum()
    small = sizes <= target
    if small.any():
        assert not chosen[~small].any()
        enough = sizes[chosen].sum() >= target or chosen.sum() == min(small.sum(), len(sizes) - 1)
        assert enough and sizes[chosen].sum() < 2 * target + 1


def test_large_document_stays_in_training(tmp_path, config):
    documents = ["y" * 100_000] + [f"small {i} " * 10 for i in range(200)]
    prepared = data.prepare(config(write_texts(tmp_path / "texts", documents)))
    assert documents[0] in documents_of(prepared, "train")


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.jsonl", "validation.jsonl"),
        ("corpus-train.txt", "corpus-valid.txt"),
        ("train/000.parquet", "dev/000.parquet"),
        ("data/train-00000-of-00001.csv", "data/val-00000-of-00001.csv"),
    ],
)
def test_own_validation_split(train, validation, tmp_path, config):
    root = tmp_path / "corpus"
    for name, documents in ((train, ["one", "two"]), (validation, ["three"]), (train.replace("train", "test"), ["4"])):
        if name.endswith(".txt"):
            root.mkdir(exist_ok=True)
            (root / name).write_text("".join(documents))
        else:
            write_table(root / name, documents)
    prepared = data.prepare(config(root))
    assert "".join(documents_of(prepared, "train")) == "onetwo"
    assert documents_of(prepared, "validation") == ["three"]
    assert "its test files are left out" in prepared.meta["notes"]


def test_names_of_source_files_are_no_splits(tmp_path, config):
    root = tmp_path / "code"
    root.mkdir()
    for name in ("train.py", "validation.py", "test_model.py", "model.py"):
        (root / name).write_text(name)
    assert data.prepare(config(root)).split("all").documents == 4


def test_single_document_is_cut_at_a_line(tmp_path, config, caplog):
    text = "".join(f"line {i} é\n" for i in range(1000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    caplog.set_level(logging.INFO, "mla.data")
    prepared = data.prepare(config(path))
    train, validation = prepared.split("train"), prepared.split("validation")
    head, tail = prepared.tokenizer.decode(train.tokens), prepared.tokenizer.decode(validation.tokens)
    assert head + tail == text and head.endswith("\n")
    assert 0.015 < validation.num_bytes / len(text.encode()) < 0.025
    assert prepared.split("all").documents == 1
    # Nothing ends where the document was cut.
    assert (prepared.split("all").tokens == 256).sum() == 1 and validation.tokens[-1] == 256
    assert [record.message for record in caplog.records if "single document" in record.message] == [
        f"corpus {path}: {prepared.meta['notes'][0]}"
    ]


@given(st.text(min_size=2, max_size=300), st.floats(0.01, 0.99))
def test_cut_never_breaks_a_character(text, fraction):
    document = text.encode()
    cut = data._cut_near_tail(document, fraction)
    if cut is None:
        return
    assert 0 < cut < len(document)
    assert document[:cut].decode() + document[cut:].decode() == text


# ----------------------------------------------------------------------------------------------------------- tokenizers


def word_level():
    vocabulary = {"[UNK]": 0, "a": 1, "the": 2, "日本": 3}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer


def unigram():
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("▁the", -3.0), ("é", -3.0)]
    tokenizer = library.Tokenizer(library.models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFKC(), library.normalizers.Lowercase(), library.normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    return tokenizer


def trimming_bpe():
    """Byte-level, with a post-processor that would trim offsets, a template, truncation and padding."""
    tokenizer = library.Tokenizer.from_str(tokenizers.train_bpe(DOCUMENTS, 300)._text)
    tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=True)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_id=0)
    return tokenizer


TOKENIZERS = {
    "bytes": tokenizers.ByteTokenizer(),
    "bpe": tokenizers.train_bpe(DOCUMENTS, 320),
    "words": tokenizers.FileTokenizer(word_level().to_str(), "words"),
    "unigram": tokenizers.FileTokenizer(unigram().to_str(), "unigram"),
    "trimming": tokenizers.FileTokenizer(trimming_bpe().to_str(), "trimming"),
}
TEXT = st.text(st.one_of(st.sampled_from("a the\n\t é日本🎉ﬁÅ"), st.characters(exclude_categories=["Cs"])), max_size=60)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(TEXT, max_size=5), piece=st.sampled_from([3, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_byte_counts_sum_to_the_bytes_of_each_document(name, texts, piece):
    tokenizer = TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE_CHARS", piece)  # long documents are encoded in pieces
        ids, byte_counts = tokenizer.encode_documents([text.encode() for text in texts])
    assert len(ids) == len(byte_counts) and byte_counts.dtype == np.uint16
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert len(ends) == len(texts)
    assert not len(ids) or ids.max() < tokenizer.vocab_size
    for text, start, stop in zip(texts, [0, *(ends + 1)], ends, strict=False):
        assert byte_counts[start : stop + 1].sum() == len(text.encode())
        if stop > start:
            assert byte_counts[stop] == 0
        if name in ("bytes", "bpe", "trimming"):
            assert tokenizer.decode(ids[start : stop + 1]) == text


@pytest.mark.parametrize("name", ["bytes", "bpe", "trimming"])
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_decode_inverts_encode(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_bytes_is_257():
    tokenizer = tokenizers.ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    ids, byte_counts = tokenizer.encode_documents([b"ab", "é".encode()])
    assert ids.tolist() == [97, 98, 256, 195, 169, 256] and byte_counts.tolist() == [1, 1, 0, 1, 1, 0]
    assert tokenizer.decode([0xF0, 97]) == "\ufffda"


def test_quoted_end_of_document_does_not_end_it():
    tokenizer = TOKENIZERS["bpe"]
    ids, byte_counts = tokenizer.encode_documents([b"see <|endoftext|> here"])
    assert (ids == tokenizer.eos_id).tolist() == [False] * (len(ids) - 1) + [True]
    assert byte_counts[-1] == 0 and byte_counts.sum() == 22


def test_bpe_is_deterministic_and_its_file_can_be_used(folder, tmp_path, config):
    first = data.prepare(config(folder, tokenizer="bpe:330"))
    second = data.prepare(config(folder, tokenizer="bpe:330", cache_dir=str(tmp_path / "other")))
    assert first.directory != second.directory
    for name in ("tokens.bin", "byte_counts.bin", "tokenizer.json", "meta.json"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()
    assert first.tokenizer.eos_id == first.vocab_size - 1 == 329
    assert len(first.split("all").tokens) < len(data.prepare(config(folder)).split("all").tokens)
    copy = tmp_path / "copy" / "tokenizer.json"
    copy.parent.mkdir()
    copy.write_bytes((first.directory / "tokenizer.json").read_bytes())
    for path in (first.directory / "tokenizer.json", copy, first.directory):
        by_path = data.prepare(config(folder, tokenizer=str(path)))
        assert np.array_equal(by_path.split("all").tokens, first.split("all").tokens)
        assert by_path.meta["tokenizer"] == by_path.tokenizer.name == str(path)
    reopened = data.open_prepared(first.directory)
    assert reopened.tokenizer.encode("a comma") == first.tokenizer.encode("a comma")


def test_bpe_is_trained_on_the_training_split_only(tmp_path, config):
    root = tmp_path / "corpus"
    write_table(root / "train.jsonl", ["abab" * 50])
    write_table(root / "validation.jsonl", ["zqzq" * 50])
    prepared = data.prepare(config(root, tokenizer="bpe:258"))
    assert len(prepared.tokenizer.encode("abab")) == 2 and len(prepared.tokenizer.encode("zqzq")) == 4


def test_small_corpus_has_fewer_pairs_than_asked_for(tmp_path, config):
    path = write_table(tmp_path / "rows.jsonl", ["ab", "cd", "ab"])
    prepared = data.prepare(config(path, tokenizer="bpe:8192"))
    assert 256 < prepared.vocab_size < 300
    assert any("8,192" in note for note in prepared.meta["notes"])


def test_end_of_document_of_a_tokenizer_file(tmp_path):
    tokenizer = word_level()
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    loaded = tokenizers.parse(str(path))
    assert (loaded.eos_id, loaded.vocab_size) == (4, 5)  # appended
    tokenizer.add_special_tokens(["<end>", "</s>"])
    path.write_text(tokenizer.to_str())
    loaded = tokenizers.parse(str(path))
    assert (loaded.eos_id, loaded.vocab_size) == (5, 6)  # a name in common use
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert tokenizers.parse(str(tmp_path)).eos_id == 4  # what the file beside it says


def test_end_of_document_is_remembered(folder, tmp_path, config):
    tokenizer = word_level()
    tokenizer.add_special_tokens(["<end>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    prepared = data.prepare(config(folder, tokenizer=str(tmp_path)))
    assert prepared.tokenizer.eos_id == data.open_prepared(prepared.directory).tokenizer.eos_id == 4
    assert (prepared.split("all").tokens == 4).sum() == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a a", [1, 2, 0]), ("  a a", [3, 2, 0]), ("a a   ", [1, 5, 0]), ("   a a  a", [4, 2, 3, 0]), ("   ", [3])],
)
def test_bytes_between_tokens_belong_to_the_next_one(text, expected, monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 3)
    _, byte_counts = TOKENIZERS["words"].encode_documents([text.encode()])
    assert byte_counts.tolist() == expected


def test_vocabulary_above_16_bits_is_stored_in_32(folder, tmp_path, config):
    vocabulary = {f"word{i}": i for i in range(70_000)} | {"[UNK]": 70_000}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepared = data.prepare(config(folder, tokenizer=str(tmp_path / "tokenizer.json")))
    split = prepared.split("all")
    assert split.tokens.dtype == np.uint32 and split.tokens.max() == prepared.tokenizer.eos_id == 70_001
    assert split.byte_counts.sum() == TOTAL_BYTES


# ----------------------------------------------------------------------------------------------------- prepared folders


def test_second_call_reads_nothing(folder, config, monkeypatch):
    monkeypatch.setattr(data, "_RACY_SECONDS", -1e9)  # as if the files were old
    first = data.prepare(config(folder))
    monkeypatch.setattr(data, "_survey", None)
    assert data.prepare(config(folder)).directory == first.directory


@pytest.mark.parametrize("seconds", [data._RACY_SECONDS, -1e9])
def test_changed_file_is_noticed(seconds, folder, config, monkeypatch):
    monkeypatch.setattr(data, "_RACY_SECONDS", seconds)
    first = data.prepare(config(folder))
    file = folder / "000.txt"
    stat = file.stat()
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    second = data.prepare(config(folder))
    assert second.sha256 != first.sha256 and second.directory != first.directory
    assert DOCUMENTS[0].swapcase() in documents_of(second, "all")
    file.write_bytes(DOCUMENTS[0].encode())
    assert data.prepare(config(folder)).directory == first.directory


def test_change_within_one_tick_of_the_clock_is_noticed(folder, config, monkeypatch):
    stamps = data._find(str(folder)).stamps
    find = data._find
    monkeypatch.setattr(data, "_find", lambda corpus: data.dataclasses.replace(find(corpus), stamps=stamps))
    first = data.prepare(config(folder))
    (folder / "000.txt").write_bytes(DOCUMENTS[0].swapcase().encode())
    assert data.prepare(config(folder)).sha256 != first.sha256


def test_equal_contents_share_a_folder_and_keep_their_names(folder, tmp_path, config):
    first = data.prepare(config(folder))
    second = data.prepare(config(write_table(tmp_path / "rows.parquet", DOCUMENTS)))
    assert first.directory == second.directory
    assert first.meta["corpus"] == str(folder) and second.meta["corpus"].endswith("rows.parquet")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", truncate),
        ("byte_counts.bin", Path.unlink),
        ("meta.json", truncate),
        ("meta.json", lambda path: path.write_text("[]")),
        ("tokenizer.json", truncate),
        ("tokenizer.json", lambda path: path.write_text(path.read_text().replace("GPT", "gpt") + " ")),
    ],
)
def test_damaged_folder_is_made_anew(name, damage, old, folder, config, monkeypatch, caplog):
    if old:
        monkeypatch.setattr(data, "_RACY_SECONDS", -1e9)
    first = data.prepare(config(folder, tokenizer="bpe:300"))
    before = (first.directory / name).read_bytes()
    damage(first.directory / name)
    with pytest.raises(UserError):
        data.open_prepared(first.directory)
    second = data.prepare(config(folder, tokenizer="bpe:300"))
    assert second.directory == first.directory and (second.directory / name).read_bytes() == before
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings and all("preparing it anew" in message for message in warnings)


def test_failure_leaves_nothing_behind(folder, tmp_path, config, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = fails(config(folder), "config.data.cache_dir", "is full", "MLA_DATA_DIR")
        assert str(tmp_path / "cache") in message
    assert not list((tmp_path / "cache" / "tmp").iterdir())
    assert not (tmp_path / "cache" / "prepared").exists()
    assert data.prepare(config(folder)).split("all").documents == len(DOCUMENTS)


def test_leftovers_of_a_killed_process_are_removed(folder, tmp_path, config, monkeypatch):
    survey = data._survey

    def killed(*args, **kwargs):
        monkeypatch.setattr(data.shutil, "rmtree", lambda *args, **kwargs: None)
        raise KeyboardInterrupt

    with monkeypatch.context():
        monkeypatch.setattr(data, "_survey", killed)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(config(folder))
    monkeypatch.undo()
    assert data._survey is survey
    (leftover,) = (tmp_path / "cache" / "tmp").iterdir()
    (leftover / "prepared").mkdir()
    data.prepare(config(folder))
    assert not list((tmp_path / "cache" / "tmp").iterdir())


def test_nothing_but_the_cache_folder_is_written(folder, tmp_path, config, capfd):
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
        from mla import data
        from mla.config import DataConfig
        data.prepare(DataConfig(corpus={str(folder)!r}, tokenizer="bpe:300"))
        data.prepare(DataConfig(corpus={str(write_table(tmp_path / "rows.csv", DOCUMENTS))!r}))
    """
    run_python(code, HOME=str(home), MLA_DATA_DIR=None, HF_HOME=None, XDG_CACHE_HOME=None)
    assert [path.name for path in home.iterdir()] == [".cache"]
    assert [path.name for path in (home / ".cache").iterdir()] == ["mla"]
    assert not list((home / ".cache" / "mla" / "tmp").iterdir())
    out, err = capfd.readouterr()
    assert out == err == ""  # not a terminal: no progress bar, no chatter


def test_cache_dir_follows_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_DATA_DIR", str(tmp_path / "elsewhere"))
    prepared = data.prepare(DataConfig(corpus=str(folder)))
    assert (tmp_path / "elsewhere") in prepared.directory.parents


def test_progress_can_be_forced(folder, config, capfd):
    data.prepare(config(folder), progress=True)
    assert "tokenising" in capfd.readouterr().err


def run_python(code, check=True, **environment):
    """Runs code in a Python of its own; a variable set to None is taken out of its environment."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        text=True,
        check=check,
        timeout=120,
    )
    return done.stdout


def test_processes_that_prepare_the_same_corpus_at_once(folder, tmp_path):
    code = f"""
        import sys, time
        from mla import data
        from mla.config import DataConfig
        import datasets, tokenizers
        print("ready", flush=True)
        sys.stdin.readline()
        config = DataConfig(corpus={str(folder)!r}, tokenizer="bpe:300", cache_dir={str(tmp_path / "c")!r})
        prepared = data.prepare(config)
        print(prepared.directory, int(prepared.split("all").tokens.sum()))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert len(list((tmp_path / "c" / "prepared").iterdir())) == 1
    assert not list((tmp_path / "c" / "tmp").iterdir())


def test_first_one_wins_where_there_are_no_locks(folder, config, monkeypatch):
    class NoLock:
        is_locked = False

        def __init__(self, path):
            pass

        def acquire(self, timeout=None):
            raise NotImplementedError

        def release(self):
            pass

    monkeypatch.setattr("filelock.FileLock", NoLock)
    together = threading.Barrier(3)
    publish = data._publish

    def meet_and_publish(*args):
        together.wait(30)
        publish(*args)

    monkeypatch.setattr(data, "_publish", meet_and_publish)
    results = []
    threads = [threading.Thread(target=lambda: results.append(data.prepare(config(folder)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({prepared.directory for prepared in results}) == 1 and len(results) == 3
    assert sorted(documents_of(results[0], "all")) == sorted(DOCUMENTS)


# -------------------------------------------------------------------------------------------------------------- the hub


def parquet_bytes(documents):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, "n": list(range(len(documents)))}), buffer)
    return buffer.getvalue()


HUB_FILES = {
    "README.md": b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.parquet}
  - {split: validation, path: small/validation-*.parquet}
  - {split: test, path: small/test-*.parquet}
- config_name: large
  data_files: large/*.parquet
---
""",
    "small/train-00000.parquet": parquet_bytes(["one", "two"]),
    "small/validation-00000.parquet": parquet_bytes(["three"]),
    "small/test-00000.parquet": parquet_bytes(["four"]),
    "large/data.parquet": parquet_bytes(DOCUMENTS),
}
HUB_COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one dataset, org/demo, needs."""

    protocol_version = "HTTP/1.1"

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        api, files = "/api/datasets/org/demo", f"/datasets/org/demo/resolve/{HUB_COMMIT}/"
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        as_json = {"Content_Type": "application/json"}
        if path in (api, f"{api}/revision/{HUB_COMMIT}"):
            siblings = [{"rfilename": name} for name in HUB_FILES]
            body = {"id": "org/demo", "sha": HUB_COMMIT, "private": False, "tags": [], "siblings": siblings}
            self.reply(200, json.dumps(body).encode(), **as_json)
        elif path.startswith(f"{api}/tree/{HUB_COMMIT}"):
            inside = path.removeprefix(f"{api}/tree/{HUB_COMMIT}").strip("/")
            prefix = f"{inside}/" if inside else ""
            found = {}
            for name, content in HUB_FILES.items():
                head, _, rest = name.removeprefix(prefix).partition("/")
                if name.startswith(prefix):
                    kind = "directory" if rest else "file"
                    size = 0 if rest else len(content)
                    found[head] = {"type": kind, "oid": "0" * 40, "size": size, "path": prefix + head}
            self.reply(200 if found else 404, json.dumps(list(found.values())).encode(), **as_json)
        elif path.startswith(files) and path.removeprefix(files) in HUB_FILES:
            content = HUB_FILES[path.removeprefix(files)]
            self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=HUB_COMMIT)
        elif path.startswith(files):
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=HUB_COMMIT)
        else:
            self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


PREPARE_HUB = """
    import json, sys
    from mla import data
    from mla.config import DataConfig
    for corpus, tokenizer in json.loads(sys.argv[1]) if sys.argv[1:] else CASES:
        try:
            prepared = data.prepare(DataConfig(corpus=corpus, tokenizer=tokenizer, cache_dir=CACHE))
            print(json.dumps(prepared.meta))
        except data.UserError as error:
            print(json.dumps(str(error)))
"""


def prepare_hub(cache, cases, **environment):
    code = f"CASES = {cases!r}\nCACHE = {str(cache)!r}\n" + textwrap.dedent(PREPARE_HUB)
    return [json.loads(line) for line in run_python(code, **environment).splitlines()]


def test_hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    cache = tmp_path / "cache"
    cases = ["org/demo:small", "org/demo:large", "org/demo", "org/demo:smal", "org/nothing", "org/not--valid"]
    small, large, no_subset, wrong_subset, missing, invalid = prepare_hub(
        cache, [(case, "bytes") for case in cases], HF_HUB_OFFLINE=None, **environment
    )
    server.shutdown()
    server.server_close()
    assert small["revision"] == HUB_COMMIT and small["corpus"] == "org/demo:small"
    assert small["splits"]["train"] == {"documents": 2, "tokens": 8, "bytes": 6}
    assert small["splits"]["validation"] == {"documents": 1, "tokens": 6, "bytes": 5}
    assert "its splits left out: test" in small["notes"]
    assert large["splits"]["all"]["bytes"] == TOTAL_BYTES
    assert "['small', 'large']" in no_subset and "org/demo:subset" in no_subset
    assert "'smal' not found" in wrong_subset
    assert "org/nothing" in missing and "local file" in missing
    assert "org/not--valid" in invalid and "local file" in invalid

    # From here on without a network: what was prepared opens, what was downloaded can be tokenised anew.
    cases = [("org/demo:small", "bytes"), ("org/demo:small", "bpe:258"), ("org/nothing", "bytes")]
    again, other, unreachable = prepare_hub(cache, cases, **environment)
    assert again == small
    assert other["splits"]["all"]["bytes"] == 11 and other["tokenizer"] == "bpe:258"
    assert "HF_HUB_OFFLINE" in unreachable and "local file" in unreachable and "org/nothing" in unreachable


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("corpus", "parts"),
    [
        ("nowhere.txt", ["'nowhere.txt'", ".parquet", "hub (org/name", "stdlib"]),
        ("some/nowhere.jsonl", ["'some/nowhere.jsonl'", ".parquet"]),
        ("no*where.txt", ["no*where.txt"]),
        ("", ["''", "stdlib"]),
        ("stdlb", ["did you mean stdlib"]),
    ],
)
def test_missing_corpus(corpus, parts, config):
    fails(config(corpus), "config.data.corpus", *parts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n"),
        ("a.json", b"[]"),
        ("a.csv", b"text,b\n"),
        ("a.jsonl", b'{"text": ""}\n'),
        ("a.parquet", None),
    ],
)
def test_empty_corpus(name, content, tmp_path, config):
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    fails(config(tmp_path / name), "config.data.corpus", name, "empty")


def test_empty_folder_and_empty_validation_split(tmp_path, config):
    (tmp_path / "folder").mkdir()
    fails(config(tmp_path / "folder"), "folder", "holds no text")
    (tmp_path / "folder" / "train.txt").write_text("text")
    (tmp_path / "folder" / "validation.txt").write_text("")
    fails(config(tmp_path / "folder"), "the validation split of", "empty")


def test_one_character_cannot_be_split(tmp_path, config):
    (tmp_path / "a.txt").write_text("é")
    fails(config(tmp_path / "a.txt"), "too short", "2 bytes")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.txt", b"fine\xff\xfe"),
        ("bad.txt.gz", gzip.compress(b"fine\xff\xfe")),
        ("bad.jsonl", b'{"text": "caf\xe9"}\n'),
        ("bad.csv", b"id,text\n1,caf\xe9\n"),
    ],
)
def test_file_that_is_not_utf8_is_named(name, content, tmp_path, config):
    kind = name.partition(".")[2]
    good = {"jsonl": b'{"text": "fine"}\n', "csv": b"id,text\n0,fine\n"}.get(kind, b"fine")
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(good) if kind.endswith("gz") else good)
    (tmp_path / name).write_bytes(content)
    fails(config(tmp_path / f"*.{kind}"), "config.data.corpus", name, "not valid UTF-8")


def test_parquet_with_bytes_that_are_not_utf8(tmp_path, config):
    path = tmp_path / "bad.parquet"
    buffers = [pyarrow.py_buffer(np.array([0, 2], np.int32)), pyarrow.py_buffer(b"\xff\xfe")]
    column = pyarrow.StringArray.from_buffers(1, *buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    fails(config(path), "bad.parquet", "not valid UTF-8")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_missing_column_lists_those_there_are(suffix, tmp_path, config):
    path = write_table(tmp_path / f"rows.{suffix}", DOCUMENTS, field="body")
    fails(config(path), "config.data.text_field", path.name, "'text'", "'id', 'body'")
    fails(config(path, text_field="bodi"), "config.data.text_field", "'bodi'")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_column_that_is_not_text(suffix, tmp_path, config):
    path = write_table(tmp_path / f"rows.{suffix}", DOCUMENTS)
    fails(config(path, text_field="id"), "config.data.text_field", "'id'", "int64")


@pytest.mark.parametrize(
    ("name", "content"),
    [("b.jsonl", b'{"text": \n'), ("b.csv", b'text,n\n"unterminated,1\n'), ("b.parquet", b"PAR1 and no more")],
)
def test_malformed_file_is_named(name, content, tmp_path, config):
    write_table(tmp_path / f"a{Path(name).suffix}", DOCUMENTS)
    (tmp_path / name).write_bytes(content)
    fails(config(tmp_path / f"*{Path(name).suffix}"), "config.data.corpus", f"{os.sep}{name}", "cannot be read as")


def test_mixed_folder(folder, config):
    write_table(folder / "rows.jsonl", DOCUMENTS)
    fails(config(folder), "json and text", f"**{os.sep}*.jsonl")


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        ("byte", ["'byte'", "did you mean bytes?", "bpe:8192"]),
        ("bp:8192", ["did you mean bpe:8192?"]),
        ("sentencepiece", ["'sentencepiece'", "tokenizer.json"]),
        ("bpe", ["'bpe'", "258", "bpe:8192"]),
        ("bpe:257", ["'bpe:257'", "258"]),
        ("bpe:many", ["'bpe:many'"]),
        ("bpe:-5", ["'bpe:-5'"]),
        ("bpe:99999999999", ["'bpe:99999999999'"]),
        ("missing/tokenizer.json", ["missing/tokenizer.json", "no file"]),
    ],
)
def test_bad_tokenizer(tokenizer, parts, folder, config):
    fails(config(folder, tokenizer=tokenizer), "config.data.tokenizer", *parts)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_unreadable_tokenizer_file(content, folder, tmp_path, config):
    (tmp_path / "tokenizer.json").write_bytes(content)
    fails(config(folder, tokenizer=str(tmp_path / "tokenizer.json")), "config.data.tokenizer", "tokenizer.json")


def test_tokenizer_that_swallows_long_words(tmp_path, config):
    path = tmp_path / "tokenizer.json"
    word_level().save(str(path))
    (tmp_path / "long.txt").write_text("x" * 200_000)
    fails(config(tmp_path / "long.txt", tokenizer=str(path)), "config.data.tokenizer", "byte-level")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_validation_fraction_out_of_range(fraction, folder, config):
    fails(config(folder, validation_fraction=fraction), "config.data.validation_fraction", "between 0 and 1")


def test_cache_dir_that_is_a_file(folder, config):
    file = folder / "000.txt"
    fails(config(folder, cache_dir=str(file)), "config.data.cache_dir", str(file))


def test_unknown_split(folder, config):
    prepared = data.prepare(config(folder))
    with pytest.raises(UserError, match=r"config\.eval\.split: 'valid' .*validation, all; did you mean validation"):
        prepared.split("valid")


def test_corpus_too_short(folder, config):
    split = data.prepare(config(folder)).split("train")
    data.require_length(split, context=16, batch_size=2)
    with pytest.raises(UserError, match=r"train split has [\d,]+ tokens, 0 windows of context 4,096"):
        data.require_length(split, context=4096)
    with pytest.raises(UserError, match="a batch takes 10,000"):
        data.require_length(split, context=16, batch_size=10_000)
    with pytest.raises(UserError, match=r"too short.*batch takes 4"):
        data.train_loader(np.arange(30), context=10, batch_size=4, seed=0)
    with pytest.raises(UserError, match="2 are needed"):
        data.evaluation_windows(np.arange(1), context=10, batch_size=4)
    with pytest.raises(UserError, match=r"config\.eval\.tokens: -1"):
        data.evaluation_windows(np.arange(9), context=10, batch_size=4, limit_tokens=-1)
    for arguments in ({"context": 0, "batch_size": 1}, {"context": 1, "batch_size": 0}):
        with pytest.raises(UserError, match="0 is not a positive number"):
            data.train_loader(np.arange(30), **arguments, seed=0)
        with pytest.raises(UserError, match="0 is not a positive number"):
            data.evaluation_windows(np.arange(30), **arguments)


# -------------------------------------------------------------------------------------------------------------- batches


def take(loader, count):
    return [next(loader)["tokens"] for _ in range(count)]


@given(
    st.integers(2, 400),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 500).map(lambda limit: max(limit - 100, 0)),
)
@settings(deadline=None)
def test_every_token_but_the_first_is_predicted_once(num_tokens, context, batch_size, limit):
    tokens = np.random.default_rng(num_tokens).integers(0, 65_536, num_tokens, np.uint16)
    byte_counts = np.random.default_rng(context).integers(0, 9, num_tokens, np.uint16)
    predicted = min(num_tokens - 1, limit or num_tokens)
    assert data.predicted_tokens(num_tokens, limit) == predicted
    seen, num_bytes = [], 0
    for windows, weights, span in data.evaluation_windows(tokens, context, batch_size, limit):
        assert windows.shape == (batch_size, context + 1) and windows.dtype == np.int32
        assert weights.shape == (batch_size, context) and weights.dtype == np.float32
        assert set(np.unique(weights)) <= {0.0, 1.0}
        here = windows[:, 1:][weights == 1]
        assert np.array_equal(here, tokens[span])
        # What a token is predicted from is what stands before it in the stream.
        assert np.array_equal(windows[:, :-1][weights == 1], tokens[span.start - 1 : span.stop - 1])
        assert not windows[:, 1:][weights == 0].any()
        seen.append(here)
        num_bytes += int(byte_counts[span].sum())
    assert np.array_equal(np.concatenate(seen), tokens[1 : predicted + 1])
    assert num_bytes == byte_counts[1 : predicted + 1].sum()


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 11), st.integers(1, 5), st.integers(-5, 2**40))
@settings(deadline=None, max_examples=30)
def test_an_epoch_holds_every_window_once(windows, context, tail, batch_size, seed):
    batch_size = min(batch_size, windows)
    tokens = np.arange(windows * context + 1 + min(tail, context - 1), dtype=np.uint16)
    expected = [tuple(tokens[i * context : (i + 1) * context + 1]) for i in range(windows)]
    batches = take(data.train_loader(tokens, context, batch_size, seed), math.ceil(2 * windows / batch_size))
    assert all(batch.shape == (batch_size, context + 1) and batch.dtype == np.int32 for batch in batches)
    rows = [tuple(row) for batch in batches for row in batch]
    assert sorted(rows[:windows]) == sorted(rows[windows : 2 * windows]) == expected


def test_order_depends_on_epoch_and_seed():
    tokens = np.arange(1001, dtype=np.uint16)

    def order(seed):
        return [int(row[0]) for batch in take(data.train_loader(tokens, 10, 10, seed), 20) for row in batch]

    orders = [order(seed) for seed in (0, 1, 2)]
    assert orders[0][:100] != sorted(orders[0][:100])
    epochs = {tuple(order[start : start + 100]) for order in orders for start in (0, 100)}
    assert len(epochs) == 6  # no epoch of one seed is an epoch of another
    assert order(0) == orders[0]


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_resume_is_bit_equal(stop, elsewhere, seed):
    tokens = np.random.default_rng(seed).integers(0, 257, 700, np.uint16)
    loader = data.train_loader(tokens, 16, 4, seed)
    take(loader, stop)
    state = json.loads(json.dumps(loader.get_state()))
    assert len(json.dumps(state)) < 200
    expected = take(loader, 15)
    resumed = data.train_loader(tokens, 16, 4, seed)
    take(resumed, elsewhere)  # wherever it was before
    resumed.set_state(state)
    assert all(np.array_equal(a, b) for a, b in zip(expected, take(resumed, 15), strict=True))
    assert resumed.get_state() == loader.get_state()


def test_loader_reads_a_memory_map_without_threads(folder, config):
    prepared = data.prepare(config(folder))
    before = threading.active_count()
    loader = data.train_loader(
        prepared.split("train").tokens, context=8, batch_size=3, seed=random.Random(0).getrandbits(64)
    )
    (batch,) = take(loader, 1)
    assert type(batch) is np.ndarray and batch.flags.writeable
    assert threading.active_count() == before


def test_unigram_perplexity(folder, config):
    prepared = data.prepare(config(folder, tokenizer="bpe:300"))
    train, validation = (prepared.split(name).tokens.astype(int) for name in ("train", "validation"))
    probabilities = [((train == i).sum() + 1) / (len(train) + 300) for i in range(300)]
    assert sum(probabilities) == pytest.approx(1)
    loss = -np.mean([math.log(probabilities[i]) for i in validation[1:]])
    assert data.unigram_perplexity(prepared) == pytest.approx(math.exp(loss), rel=1e-9)
