"""Corpora, tokenizers and batches, on small files of every accepted form."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import tokenizers as library
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mla import config as configs
from mla import workdir as workdirs
from mla.config import DataConfig
from mla.data import corpora, pieces, tokenizers
from mla.data import prepared as data
from mla.errors import UserError
from mla.evaluation.sample import prompt_ids

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
    """A folder of text files, one for each of DOCUMENTS, in their order, and a hidden one."""
    folder = tmp_path / "texts"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "notes.txt").write_text("hidden")
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_bytes(document.encode())
    return folder


def write_table(path, documents, field="text"):
    """Writes a table with a column of documents and another one, by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"id": list(range(len(documents))), field: documents})
    {".parquet": rows.to_parquet, ".csv": rows.to_csv, ".jsonl": rows.to_json}[path.suffix](str(path))
    return path


def documents_of(prepared, name):
    """Texts of a split, cut at the end-of-document tokens."""
    tokens = prepared.split(name).tokens
    pieces = np.split(tokens, np.flatnonzero(tokens == prepared.tokenizer.eos_id) + 1)
    return [prepared.tokenizer.decode(piece) for piece in pieces if len(piece)]


def fails(config, *parts):
    """`prepare(config)` raises a one-line UserError that contains `parts`."""
    with pytest.raises(UserError) as caught:
        data.prepare(config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("form", [".", "*.txt", "**/*.txt", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_forms_hold_the_same_documents(form, folder, tmp_path, config):
    corpus = write_table(tmp_path / form, DOCUMENTS) if form.startswith("rows") else folder / form
    prepared = data.prepare(config(corpus))
    contents = b"".join(hashlib.sha256(document.encode()).digest() for document in DOCUMENTS)
    assert prepared.sha256 == hashlib.sha256(contents).hexdigest()
    assert sorted(documents_of(prepared, "all")) == sorted(DOCUMENTS)
    train, validation, everything = (prepared.split(name) for name in ("train", "validation", "all"))
    assert everything.num_bytes == everything.byte_counts.sum() == TOTAL_BYTES == train.num_bytes + validation.num_bytes
    assert everything.documents == len(DOCUMENTS) == train.documents + validation.documents > train.documents
    assert np.array_equal(everything.tokens, np.concatenate([train.tokens, validation.tokens]))
    assert everything.tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        everything.tokens[0] = 1


def test_text_field_and_rows_without_text(tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "first"}\n{"body": null}\n{"body": ""}\n{"body": "second"}\n')
    assert sorted(documents_of(data.prepare(config(path, text_field="body")), "all")) == ["first", "second"]


def read(path, text_field="text"):
    """Documents of a file, in order."""
    return [document.decode() for document in corpora.find(str(path), text_field).splits["train"]()]


COMPRESSIONS = {
    ".gz": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),  # as `cat a.gz b.gz` makes them
    ".xz": lambda content: lzma.compress(content[:9]) + lzma.compress(content[9:]),
    ".bz2": lambda content: bz2.compress(content[:9]) + bz2.compress(content[9:]),
    ".zst": lambda content: b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:9], content[9:])),
}
AS_LINES = "\n".join(json.dumps({"id": i, "text": document}) for i, document in enumerate(DOCUMENTS))
AS_TABS = "id\ttext\n" + "".join(
    f'{i}\t"{document.replace(chr(34), 2 * chr(34))}"\n' for i, document in enumerate(DOCUMENTS)
)
AS_FILES = {
    **dict.fromkeys(("rows.jsonl", "rows.ndjson", "rows.JSONL", "rows.json"), AS_LINES),
    "bom.jsonl": "\ufeff" + AS_LINES.replace("\n", "\r\n\r\n"),
    "list.json": json.dumps([{"text": document} for document in DOCUMENTS], indent=1),
    "columns.json": json.dumps({"text": DOCUMENTS}, indent=1),
    "line.json": "\n" + json.dumps({"id": [1], "text": DOCUMENTS}) + "\n\n",
    "rows.tsv": AS_TABS,
    "bom.tsv": "\ufeff" + AS_TABS,
}


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_every_form_compressed_or_not(compression, tmp_path):
    for name, content in AS_FILES.items():
        path = tmp_path / (name + compression)
        path.write_bytes(COMPRESSIONS.get(compression, bytes)(content.encode()))
        assert read(path) == DOCUMENTS, name
    for form in ("csv", "parquet"):
        path = write_table(tmp_path / f"rows.{form}", DOCUMENTS)
        if compression:
            whole, path = path.read_bytes(), Path(f"{path}{compression}")
            path.write_bytes(COMPRESSIONS[compression](whole))
        assert read(path) == DOCUMENTS
    path = tmp_path / f"text.txt{compression}"
    path.write_bytes(COMPRESSIONS.get(compression, bytes)("".join(DOCUMENTS).encode()))
    assert read(path) == ["".join(DOCUMENTS)]
    if compression:
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UserError, match=r"text.txt.* cannot be read"):
            read(path)


def test_other_columns_of_jsonl_never_matter(tmp_path):
    """More rows than a reader that guesses types looks at, and then other columns and other types."""
    rows = [{"id": i, "note": None, "meta": {"a": 1}, "text": "x" * 1000} for i in range(12_000)]
    rows += [{"id": "one", "note": "n", "meta": {"b": ["c"]}, "url": "u", "text": "2024-01-01"}, {"url": 1}, {"text": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = read(path)
    assert len(documents) == 12_001 and documents[-1] == "2024-01-01"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json"])
def test_numbers_and_depths_of_other_columns_never_matter(name, tmp_path):
    deep = "[" * 50_000 + '"]\\"}",{"a":' * 9 + "1" + "}" * 9 + "]" * 50_000
    rows = [f'{{"id": {"9" * 5000}, "text": "a"}}', f'{{"x": {deep}, "text": "b", "y": {deep}}}']
    path = tmp_path / name
    path.write_text("[" + ",\n".join(rows) + "]" if name == "list.json" else "\n".join(rows))
    assert read(path) == ["a", "b"]
    path.write_text(rows[0].replace("text", "x"))
    with pytest.raises(UserError, match=r"config.data.text_field: column 'id' of .* holds int64, not text"):
        read(path, "id")
    path.write_text(f'{{"text": {deep}}}')
    with pytest.raises(UserError, match=r"column 'text' of .* holds a list, not text"):
        read(path)
    path.write_text('{"text": ["a", "b"]}\n{"text": ["c"]}\n')
    with pytest.raises(UserError, match=r"column 'text' of .*, line 1 holds a list, not text"):
        read(path)


def test_byte_order_marks_are_no_text(tmp_path, config):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt.gz"
    plain.write_text("".join(DOCUMENTS))
    marked.write_bytes(gzip.compress(("\ufeff" + "".join(DOCUMENTS)).encode()))
    one, two = (data.prepare(config(path)) for path in (plain, marked))
    assert one.sha256 == two.sha256 and two.split("all").num_bytes == TOTAL_BYTES
    np.testing.assert_array_equal(one.split("all").tokens, two.split("all").tokens)
    # Tokens that an earlier version prepared with the mark are not those of this corpus; others' are.
    digest = hashlib.sha256(b"text text" + hashlib.sha256(plain.read_bytes()).digest())
    assert corpora.find(str(plain), "text").key == digest.hexdigest()
    digest = hashlib.sha256(b"text text" + hashlib.sha256(marked.read_bytes()).digest())
    assert corpora.find(str(marked), "text").key != digest.hexdigest()


def test_names_of_tables(tmp_path):
    for name in ("a.ldjson", "a.jl", "a.LDJSON", "a.jl.gz", "a.b.jsonl"):
        content = b'\xef\xbb\xbf\n {"text": "a"}\n{"text": "b"}\n'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert read(tmp_path / name) == ["a", "b"], name
    for name, content in {"b.jl": "f(x) = {x}\n", "a.txt~": "a", "a.json5": "{}", "v1.2": "a", "notes.md": "a.csv"}.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == [content]
    refused = {".jsonl": [".bak", "~", ".gz.1"], ".csv": [".txt", " (1)"], ".tsv": ["-old"], ".parquet": [".txt"]}
    for table, name in ((table, f"a{table.upper()}{more}") for table, found in refused.items() for more in found):
        (tmp_path / name).write_text("text\n")
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert f"{name}: may be a {table} table; let its name end in {table}" in str(caught.value)
    (tmp_path / "bad.jl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"bad.jl.gz cannot be read"):
        read(tmp_path / "bad.jl.gz")


def test_columns_of_one_name(tmp_path, config):
    names = ["text", "id", "text"]
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,id,text\na,b,c\n")
    for name in ("a.parquet", "a.csv"):
        fails(config(tmp_path / name), "config.data.text_field", f"{name} has 2 columns 'text'; rename")
        assert len(read(tmp_path / name, "id")) == 1


@pytest.mark.parametrize("corpus", ["work", "work/**/*.json", "work/**"])
def test_a_corpus_that_would_hold_what_is_written(corpus, tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / "work" / f"{i}").mkdir(parents=True)
        (tmp_path / "work" / f"{i}" / "a.json").write_text('{"text": "abc"}')
    cache, run = tmp_path / "work" / "cache", tmp_path / "work" / "run"
    if corpus != "work":  # what a pattern will find is known once it is there
        for folder in (cache, run):
            folder.mkdir()
            (folder / "meta.json").write_text("{}")
    fails(config(corpus, cache_dir=str(cache)), "config.data.cache_dir: ", f"{cache} is part of config.data.corpus {corpus}")
    monkeypatch.setenv("MLA_DATA_DIR", str(cache))
    fails(DataConfig(corpus=corpus), "MLA_DATA_DIR: ", "is part of")
    with pytest.raises(UserError, match=f"--workdir: {run} is part of config.data.corpus"):
        corpora.require_apart(corpus, run, "--workdir")
    for apart in ("work/.cache", "elsewhere", "."):
        corpora.require_apart(corpus, tmp_path / apart, "--workdir")
    for other in ("work/0", "work/*/a.json", "work/[0-9]/*", "stdlib", "recall", "org/name", "x" * 300):
        corpora.require_apart(other, cache, "--workdir")
    corpora.require_apart("work/run/*.json", run, "config.data.cache_dir")  # texts that somebody keeps in the cache


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"text": null}\n{"text": "2024-01-01T00:00:00"}\n{"text": "\\ud800!"}\n')
    assert read(tmp_path / "a.jsonl") == ["2024-01-01T00:00:00", "\ufffd!"]
    (tmp_path / "a.csv").write_text('id,text\n1,2024-01-01\n2,007\n3,\n\n4,"a\nb"\n5,NULL\n')
    assert read(tmp_path / "a.csv") == ["2024-01-01", "007", "a\nb", "NULL"]
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000)
    assert len(read(tmp_path / "long.csv")[0]) == 200_000


ARROW = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@pytest.mark.parametrize("kind", [*ARROW, "dictionary"])
def test_every_type_of_parquet_that_can_hold_text(kind, tmp_path):
    documents = pyarrow.array(["é a", None, "", "b"], pyarrow.string())
    column = documents.dictionary_encode() if kind == "dictionary" else documents.cast(getattr(pyarrow, kind)())
    rows = pyarrow.table({"n": [{"deep": i} for i in range(4)], "text": column})
    parquet.write_table(rows, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["é a", "b"]


def test_long_tables_are_streamed(tmp_path):
    """Sixteen megabytes go through in less than two, where a document is a kilobyte."""
    text, rows = "x" * 1000, 16_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n' * rows)
    (tmp_path / "a.csv").write_text("text\n" + f"{text}\n" * rows)
    for name in ("a.jsonl", "a.csv"):
        documents = corpora.find(str(tmp_path / name), "text").splits["train"]
        tracemalloc.start()
        assert sum(map(len, documents())) == 1000 * rows
        assert tracemalloc.get_traced_memory()[1] < 2e6
        tracemalloc.stop()


def test_stdlib(config):
    prepared = data.prepare(config("stdlib"))
    everything = prepared.split("all")
    assert 5e6 < everything.num_bytes < 50e6 and prepared.vocab_size == 257
    assert 0.02 <= prepared.split("validation").num_bytes / everything.num_bytes < 0.04
    assert data.unigram_perplexity(prepared) < 40
    assert data.prepare(config("stdlib")).directory == prepared.directory


def test_hub(tmp_path, config, monkeypatch):
    root = tmp_path / "hub"
    for name, documents in (("train", ["abab" * 50, "ab"]), ("validation", ["zqzq" * 50]), ("test", ["unused"])):
        write_table(root / "small" / f"{name}.parquet", documents)
    write_table(root / "large" / "rows.parquet", DOCUMENTS)
    write_table(root / "odd" / "test.parquet", DOCUMENTS)
    names = [{"config_name": name, "data_dir": name} for name in ("small", "large", "odd")]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(names)}\n---\n")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, subset: load(str(root), subset, cache_dir=str(tmp_path / "hf")))
    small = data.prepare(config("org/demo:small", tokenizer="bpe:258"))
    assert documents_of(small, "train") == ["abab" * 50, "ab"] and documents_of(small, "validation") == ["zqzq" * 50]
    # The tokenizer has seen the training split only.
    assert len(small.tokenizer.encode("abab")) == 2 and len(small.tokenizer.encode("zqzq")) == 4
    assert data.prepare(config("org/demo:small", tokenizer="bpe:258")).directory == small.directory
    assert sorted(documents_of(data.prepare(config("org/demo:large")), "all")) == sorted(DOCUMENTS)
    fails(config("org/demo:odd"), "no train split, only test")
    fails(config("org/demo:large", text_field="body"), "config.data.text_field", "'id', 'text'")
    fails(config("org/demo:smal"), "org/demo:smal", "'smal' not found")


def test_split_reaches_the_fraction_and_never_shares(tmp_path, config):
    documents = [f"document {i} " + "x" * (i % 50) for i in range(400)]
    path = write_table(tmp_path / "rows.jsonl", documents)
    prepared = data.prepare(config(path, validation_fraction=0.1))
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert not set(train) & set(validation) and sorted(train + validation) == sorted(documents)
    assert train == [document for document in documents if document in set(train)]  # in the corpus' order
    assert 0.1 <= prepared.split("validation").num_bytes / prepared.split("all").num_bytes < 0.11
    other = data.prepare(config(path, validation_fraction=0.2))
    assert other.directory != prepared.directory and other.sha256 == prepared.sha256
    assert set(validation) < set(documents_of(other, "validation"))


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=40), st.floats(0.001, 0.999))
def test_split_leaves_no_side_empty(sizes, fraction):
    sizes = np.asarray(sizes)
    chosen = data._choose_validation(sizes, fraction)
    assert 0 < chosen.sum() < len(sizes)
    target = fraction * sizes.sum()
    small = sizes <= target
    if small.any():  # a document larger than the share stays in training
        assert not chosen[~small].any()
        enough = sizes[chosen].sum() >= target or chosen.sum() == min(small.sum(), len(sizes) - 1)
        assert enough and sizes[chosen].sum() < 2 * target + 1


def test_lone_document_is_cut_at_a_line(tmp_path, config):
    text = "".join(f"line {i} é\n" for i in range(1000))
    path = tmp_path / "book.txt"
    path.write_text(text)
    prepared = data.prepare(config(path))
    (head,), (tail,) = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert head + tail == text and head.endswith("\n")
    assert 0.015 < prepared.split("validation").num_bytes / len(text.encode()) < 0.025


def word_level(vocabulary):
    tokenizer = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, **vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer


def unigram():
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("▁the", -3.0), ("é", -3.0)]
    tokenizer = library.Tokenizer(library.models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    normalizers = library.normalizers
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    return tokenizer


def trimming_bpe():
    """Byte-level, with a post-processor that would trim offsets, a template, truncation and padding."""
    tokenizer = library.Tokenizer.from_str(tokenizers.train_bpe(DOCUMENTS, 300).text)
    tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=True)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_id=0)
    return tokenizer


TOKENIZERS = {
    "bytes": tokenizers.ByteTokenizer(),
    "bpe": tokenizers.train_bpe(DOCUMENTS, 320),
    "words": tokenizers.FileTokenizer(word_level({"a": 1, "the": 2}).to_str(), "words"),
    "unigram": tokenizers.FileTokenizer(unigram().to_str(), "unigram"),
    "trimming": tokenizers.FileTokenizer(trimming_bpe().to_str(), "trimming"),
}
CHARACTERS = st.one_of(st.sampled_from("a the\n\t é日本🎉ﬁÅ"), st.characters(exclude_categories=["Cs"]))
TEXT = st.one_of(st.text(CHARACTERS, max_size=60), st.just("see <|endoftext|> here"))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(TEXT, min_size=1, max_size=5), piece=st.sampled_from([3, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_byte_counts_sum_to_the_bytes_of_each_document(name, texts, piece):
    tokenizer = TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE_CHARS", piece)  # long documents are encoded in pieces, some at once
        patch.setattr(tokenizers, "_PIECES_AT_ONCE", 2)
        ids, byte_counts = tokenizer.encode_documents([text.encode() for text in texts])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert len(ends) == len(texts) and len(ids) == len(byte_counts) and ids.max() < tokenizer.vocab_size
    for text, start, stop in zip(texts, [0, *(ends + 1)], ends, strict=False):
        assert byte_counts[start : stop + 1].sum() == len(text.encode())
        if name in ("bytes", "bpe", "trimming"):
            assert tokenizer.decode(ids[start : stop + 1]) == text == tokenizer.decode(tokenizer.encode(text))
            assert byte_counts[stop] == 0


def test_byte_counts_by_hand():
    ids, byte_counts = TOKENIZERS["bytes"].encode_documents([b"ab", "é".encode()])
    assert ids.tolist() == [97, 98, 256, 195, 169, 256] and byte_counts.tolist() == [1, 1, 0, 1, 1, 0]
    # What a tokenizer drops counts for the next token.
    _, byte_counts = TOKENIZERS["words"].encode_documents([b"  a a   ", b"   ", b"the"])
    assert byte_counts.tolist() == [3, 2, 3, 3, 3, 0]


def test_bpe_is_deterministic_and_its_file_can_be_used(folder, tmp_path, config):
    first = data.prepare(config(folder, tokenizer="bpe:330"))
    second = data.prepare(config(folder, tokenizer="bpe:330", cache_dir=str(tmp_path / "other")))
    for name in ("tokens.bin", "byte_counts.bin", "tokenizer.json", "meta.json"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()
    assert first.tokenizer.eos_id == first.vocab_size - 1 == 329
    by_path = data.prepare(config(folder, tokenizer=str(first.directory / "tokenizer.json")))
    assert np.array_equal(by_path.split("all").tokens, first.split("all").tokens)


def test_end_of_document_of_a_tokenizer_file(tmp_path):
    tokenizer = word_level({"a": 1, "the": 2, "of": 3})
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert tokenizers.parse(str(path)).eos_id == 4 == tokenizers.parse(str(path)).vocab_size - 1  # appended
    tokenizer.add_special_tokens(["<other>", "</s>"])
    tokenizer.save(str(path))
    assert tokenizers.parse(str(path)).eos_id == 5  # a name in common use


@pytest.mark.parametrize(
    "end", ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot_id|>", "<|return|>", "<|end|>", "<EOS>", "</s>"]
)
def test_end_tokens_in_common_use(end):
    tokenizer = word_level({"a": 1, "the": 2})
    tokenizer.add_special_tokens(["<other>", end])
    assert tokenizers.FileTokenizer(tokenizer.to_str(), "words").eos_id == 4


def test_declared_end_tokens(folder, tmp_path, config):
    tokenizer = word_level({"a": 1, "the": 2})
    tokenizer.add_special_tokens(["</s>", "<|im_end|>", "<odd>", "<strange>"])  # 3, 4, 5, 6
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert tokenizers.parse(str(path)).eos_id == 3 == tokenizers.parse(str(tmp_path)).eos_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [99, 4, 3]}')
    assert tokenizers.parse(str(path)).eos_id == 4
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<odd>"}}')
    prepared = data.prepare(config(folder, tokenizer=str(path)))
    assert prepared.tokenizer.eos_id == 5 == prepared.split("all").tokens[-1]
    assert data.open_prepared(prepared.directory).tokenizer.eos_id == 5
    run, named = tmp_path / "run", config(folder, tokenizer=str(path))
    run.mkdir()
    (run / "tokenizer.json").write_text("of a start that another config came after")
    workdirs.write_tokenizer(run, prepared.directory)
    assert workdirs.kept_tokenizer(run, named) is None  # nothing was trained yet: another start may replace it
    (run / "checkpoints" / "2").mkdir(parents=True)
    copied = workdirs.read_tokenizer(run, named)
    assert copied.eos_id == 5 and copied.fingerprint == prepared.tokenizer.fingerprint
    workdirs.write_tokenizer(run, data.prepare(config(folder)).directory)  # bytes; the run keeps its own from here on
    assert workdirs.read_tokenizer(run, named).fingerprint == copied.fingerprint
    assert workdirs.read_tokenizer(run, config(folder)).eos_id == 256
    assert workdirs.read_tokenizer(tmp_path / "nothing", config(folder)).eos_id == 256
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    assert tokenizers.parse(str(path)).eos_id == 4
    chosen = data.prepare(config(folder, tokenizer=str(path), end_token="<strange>"))
    assert chosen.tokenizer.eos_id == 6 and chosen.directory != prepared.directory
    fails(config(folder, tokenizer=str(path), end_token="<strangr>"), "config.data.end_token", "'<strange>'?")
    fails(config(folder, tokenizer=str(path), end_token="a"), "config.data.end_token", "stands for text")
    fails(config(folder, end_token="</s>"), "config.data.end_token", "bytes", "leave it out")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    said = ("config.data.end_token: 'a'", f"{tmp_path}{os.sep}tokenizer_config.json declares", "stands for text")
    fails(config(folder, tokenizer=str(path)), *said)
    (tmp_path / "tokenizer_config.json").write_text("{")
    fails(config(folder, tokenizer=str(path)), "config.data.tokenizer", "tokenizer_config.json")


def without_unknown(name):
    """A tokenizer that knows `the` and letters of it, and has no token for anything else."""
    if name == "unigram":
        pieces = [("\u2581the", -1.0), ("</s>", -0.5), *((letter, -9.0) for letter in "\u2581the")]
        tokenizer = library.Tokenizer(library.models.Unigram(pieces, None, False))
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
        return tokenizer
    model = {"words": library.models.WordLevel, "wordpiece": library.models.WordPiece}[name]
    tokenizer = library.Tokenizer(model({"the": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("name", ["words", "wordpiece", "unigram"])
def test_text_without_ids_is_refused(name, tmp_path, config):
    path = tmp_path / "tokenizer.json"
    without_unknown(name).save(str(path))
    tokenizer = tokenizers.parse(str(path))
    assert tokenizer.encode("the the") == [0, 0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents([b"the", text.encode()])):
        with pytest.raises(UserError) as caught:
            encode("the the dog the")
        assert f"config.data.tokenizer: {path} has no id for 'dog', and no token for what is" in str(caught.value)
    (tmp_path / "a.jsonl").write_text('{"text": "the the"}\n' * 9 + '{"text": "the d\u00f6g"}\n')
    fails(config(tmp_path / "a.jsonl", tokenizer=str(path)), f"config.data.tokenizer: {path}", "'d\u00f6g'")
    with pytest.raises(UserError, match=r"--prompt: config.data.tokenizer: .* has no id for 'cat'"):
        prompt_ids(tokenizer, "the cat")


def quoting(name):
    """A tokenizer that would take a quoted end token for an end if it could."""
    if name == "unigram":
        vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abces</>")]
        tokenizer = library.Tokenizer(library.models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    elif name == "words":
        tokenizer = word_level({"</s>": 1, "a": 2})
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    elif name == "wordpiece":
        tokenizer = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    else:  # a BPE whose merges make it, or that looks whole words up
        vocabulary = {token: number for number, token in enumerate(["<", "/", "s", ">", "a", "</", "</s", "</s>", "Ġ"])}
        merges = [("<", "/"), ("</", "s"), ("</s", ">")]
        model = library.models.BPE(vocabulary, merges, ignore_merges=name == "whole words")
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    if name == "not special":
        tokenizer.add_tokens([library.AddedToken("</s>", special=False, lstrip=True)])
    return tokenizer


@pytest.mark.parametrize("name", ["unigram", "words", "wordpiece", "merges", "whole words", "not special"])
def test_documents_that_quote_the_end_token_do_not_end_there(name, tmp_path, config):
    quoting(name).save(str(tmp_path / "tokenizer.json"))
    path = write_table(tmp_path / "rows.jsonl", ["a a </s> a", "a </s>", "</s>", "a"] * 10)
    prepared = data.prepare(config(path, tokenizer=str(tmp_path / "tokenizer.json")))
    tokens = prepared.split("all").tokens
    assert prepared.tokenizer.eos_id == quoting(name).token_to_id("</s>")
    assert (tokens == prepared.tokenizer.eos_id).sum() == 40 == prepared.split("all").documents


def test_ends_that_stand_for_text_are_refused(tmp_path, config):
    tokenizer = library.Tokenizer(library.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_table(tmp_path / "rows.jsonl", ["a a", "a b"] * 5)
    said = ("config.data.end_token", "unknown characters", "(id 0)")
    fails(config(path, tokenizer=str(tmp_path / "tokenizer.json")), *said)
    assert not list((tmp_path / "cache").glob("*[0-9a-f]"))


def test_dropout_of_a_tokenizer_file_is_off():
    tokenizer = library.Tokenizer.from_str(tokenizers.train_bpe(DOCUMENTS, 320).text)
    tokenizer.model.dropout = 0.9
    ids = [tokenizers.FileTokenizer(tokenizer.to_str(), "dropping").encode(DOCUMENTS[-1]) for _ in range(2)]
    assert ids[0] == ids[1] == tokenizers.train_bpe(DOCUMENTS, 320).encode(DOCUMENTS[-1])


WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "it's", "1234", "café", "日本", "日本語。"),
    *("foo", "bar", "(qux)", "A.B", "o'clock", "I'LL", "ﬁx", "12345678", "</s>"),
]
SEPARATORS = (" ", " ", " ", "\n", "  ", "", " \n", "\r\n", "\n\n    ", "\t")
PROSE = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SEPARATORS)), max_size=40).map(
    lambda parts: "".join(map("".join, parts))
)


def bpe(pre_tokenizer, normalizer=None, trained_on=None):
    """A BPE of 300 merges or so; with `trained_on`, the pre-tokenizer its merges are learned under."""
    tokenizer = library.Tokenizer(library.models.BPE(unk_token="<unk>", fuse_unk=True))
    learned = trained_on or pre_tokenizer
    alphabet = library.pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(learned) else []
    if learned is not None:
        tokenizer.pre_tokenizer = learned
    trainer = library.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([word + separator for word in WORDS * 3 for separator in SEPARATORS], trainer)
    return described(tokenizer, pre_tokenizer, normalizer)


def described(tokenizer, pre_tokenizer, normalizer=None):
    """The content of a tokenizer.json with these components."""
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    content = json.loads(tokenizer.to_str())
    return json.dumps(content if pre_tokenizer is not None else content | {"pre_tokenizer": None})


def published():
    """name -> (tokenizer.json, whether its texts can be cut), in the manner of published ones and of some that are odd."""
    pre, norm, split = library.pre_tokenizers, library.normalizers, library.pre_tokenizers.Split
    metaspace = pre.Metaspace()
    llama = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    found = {
        "gpt2": (bpe(pre.ByteLevel(add_prefix_space=False)), True),
        "roberta": (bpe(pre.ByteLevel(add_prefix_space=True)), True),
        "smollm": (bpe(pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])), True),
        "metaspace": (bpe(metaspace), True),
        "first": (bpe(pre.Metaspace(prepend_scheme="first")), True),
        "never": (bpe(pre.Metaspace(prepend_scheme="never")), True),
        "llama2": (bpe(None, llama, metaspace), True),
        "mistral3": (bpe(pre.Metaspace(prepend_scheme="first", split=False), None, metaspace), True),
        "gemma": (bpe(split(" ", "merged_with_previous"), norm.Replace(" ", "▁"), metaspace), True),
        "joined": (bpe(None, llama), False),  # some tokens join two words
        "unknown": (bpe(split(library.Regex(r"\S+\s*"), "isolated")), False),
        "length": (bpe(pre.FixedLength(5)), False),
        "strip": (bpe(metaspace, norm.Strip()), False),
        "unigram": (described(unigram(), metaspace, norm.NFKC()), True),
        "t5": (described(unigram(), pre.Sequence([pre.WhitespaceSplit(), metaspace]), norm.NFKC()), True),
        "no words": (described(unigram(), None, norm.NFKC()), False),
        "bert": (described(word_level({"the": 1, "cat": 2}), pre.BertPreTokenizer(), norm.BertNormalizer()), True),
        "words": (described(word_level({"the": 1, "cat": 2}), pre.Whitespace()), True),
    }
    for number, pattern in enumerate(sorted(pieces._WORD_PATTERNS)):
        byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        found[f"pattern{number}"] = bpe(pre.Sequence([split(library.Regex(pattern), "isolated"), byte_level])), True
    spaced = library.Tokenizer.from_str(found["gpt2"][0])
    spaced.add_tokens([library.AddedToken("the cat")])
    return found | {"added": (spaced.to_str(), False)}


PUBLISHED = published()


@pytest.mark.parametrize("name", PUBLISHED)
@given(text=PROSE)
@settings(max_examples=25, deadline=None)
def test_ids_do_not_depend_on_where_a_text_is_cut(name, text):
    content, cut = PUBLISHED[name]
    tokenizer = tokenizers.FileTokenizer(content, name)
    with pytest.MonkeyPatch.context() as patch:
        for size in (3, 40):
            patch.setattr(tokenizers, "_PIECE_CHARS", size)
            ids, byte_counts = tokenizer.encode_documents([text.encode()])
            assert ids[:-1].tolist() == tokenizer._tokenizer.encode(text).ids == tokenizer.encode(text)
            assert byte_counts.sum() == len(text.encode())
    assert (len(list(tokenizer._cuts.pieces("the cat sat\non" * 20, 40))) > 1) == cut


def test_a_trained_bpe_reads_long_texts_whole():
    text = "".join(f"def f{i}():\n    return {i}\n" for i in range(12_000))
    tokenizer = TOKENIZERS["bpe"]
    ids, _ = tokenizer.encode_documents([text.encode()])
    whole = tokenizer._tokenizer.encode(text).ids
    assert len(text) > tokenizers._PIECE_CHARS and ids[:-1].tolist() == tokenizer.encode(text) == whole


def test_vocabulary_above_16_bits_is_stored_in_32(folder, tmp_path, config):
    word_level({f"word{i}": i for i in range(1, 70_001)}).save(str(tmp_path / "tokenizer.json"))
    prepared = data.prepare(config(folder, tokenizer=str(tmp_path / "tokenizer.json")))
    split = prepared.split("all")
    assert split.tokens.dtype == np.uint32 and split.tokens.max() == prepared.tokenizer.eos_id == 70_001
    assert split.byte_counts.sum() == TOTAL_BYTES


def test_second_call_reads_no_document_and_a_change_is_noticed(folder, config, monkeypatch):
    first = data.prepare(config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_texts", None)
        assert data.prepare(config(folder)).directory == first.directory
    (folder / "0.txt").write_text(DOCUMENTS[0].swapcase())
    second = data.prepare(config(folder))
    assert second.sha256 != first.sha256 and second.directory != first.directory
    assert DOCUMENTS[0].swapcase() in documents_of(second, "all")


@pytest.mark.parametrize("name", ["tokens.bin", "byte_counts.bin", "meta.json", "tokenizer.json"])
def test_damaged_folder_is_made_anew(name, folder, config, capfd):
    first = data.prepare(config(folder, tokenizer="bpe:300"))
    path = first.directory / name
    before = path.read_bytes()
    for damage in (lambda: path.write_bytes(before[:-3]), path.unlink):
        damage()
        with pytest.raises(UserError, match="damaged"):
            data.open_prepared(first.directory)
        data.prepare(config(folder, tokenizer="bpe:300"))
        assert path.read_bytes() == before
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(str(first.directory)) and line.endswith("preparing it anew")


def test_failure_leaves_nothing_behind(folder, tmp_path, config):
    (folder / "bad.txt").write_bytes(b"\xff")
    fails(config(folder), "bad.txt")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    (folder / "bad.txt").unlink()
    work = tmp_path / "cache" / f"{data.prepare(config(folder)).directory.name}.partial"
    os.rename(work.with_suffix(""), work)  # as a killed process leaves it
    assert data.prepare(config(folder)).split("all").documents == len(DOCUMENTS) and not work.exists()


def test_processes_that_prepare_at_once_and_a_hub_out_of_reach(folder, tmp_path):
    code = f"""if True:
        from mla.data import prepared as data
        print(data.prepare(data.DataConfig({str(folder)!r}, tokenizer="bpe:300")).directory)
        try:
            data.prepare(data.DataConfig("org/nothing"))
        except data.UserError as error:
            print(error)
    """
    environment = {**os.environ, "MLA_DATA_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    ((out, err),) = {process.communicate(timeout=60) for process in running}
    directory, message = out.splitlines()
    assert data.open_prepared(directory).split("all").num_bytes == TOTAL_BYTES
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the folder and its lock
    assert all(part in message for part in ("'org/nothing'", "HF_HUB_OFFLINE", "local file"))
    assert err == ""  # not a terminal: no progress bar


def test_progress_can_be_forced(folder, config, capfd):
    data.prepare(config(folder, tokenizer="bpe:300"), progress=True)
    assert "tokenising" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("corpus", "part"),
    [("nowhere.txt", "org/name"), ("some/nowhere.jsonl", "stdlib"), ("no*where", "holds no files"), ("", "''")],
)
def test_missing_corpus(corpus, part, config):
    fails(config(corpus), "config.data.corpus", corpus, part)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["is empty"]),
        ("a.jsonl", b"", ["is empty"]),
        ("a.jsonl", b'{"text": ""}\n', ["is empty"]),
        ("a.csv", b"text,b\n", ["is empty"]),
        ("a.txt", "é".encode(), ["too short", "2 bytes"]),
        ("bad.txt", b"fine\xff\xfe", ["not UTF-8", "0xff"]),
        ("bad.jsonl", b'{"text": "caf\xe9"}\n', ["cannot be read", "0xe9"]),
        ("bad.csv", b"id,text\n1,caf\xe9\n", ["cannot be read", "0xe9"]),
        ("bad.jsonl", b'{"text": \n', ["cannot be read"]),
        ("bad.parquet", b"PAR1 and no more", ["cannot be read"]),
        ("bad.ndjson", b'{"text": "a"}\n\n{"text": "b",}\n', ["line 3", "cannot be read"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', ["line 2", "Extra data"]),
        ("bad.jsonl", b'{"text": "a"}\n["b"]\n', ["line 2", "no object"]),
        ("bad.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ["line 2", "recursion"]),
        ("bad.json", b'[{"text": "a"}, 3]', ["row 2", "no object"]),
        ("bad.csv", b'id,text\n1,a\n2,"b\n3,c\n', ["line 4", "unexpected end"]),
        ("bad.csv", b"id,text\n1,a, b\n", ["line 2", "3 fields under 2 column names"]),
        ("bad.csv", b"id,text\n1,a\n2\n", ["line 3", "1 fields under 2 column names", "'text' is missing"]),
        ("bad.tsv", b"id\ttext\n1\tcaf\xe9\n", ["line 2", "0xe9"]),
        ("bad.txt.gz", b"no gzip", ["cannot be read"]),
        ("bad.jsonl.zst", b"no zstd", ["cannot be read"]),
        ("book.xlsx", b"PK", [".xlsx tables are not read", ".parquet"]),
        ("rows.feather", b"ARROW1", [".feather tables are not read"]),
        ("texts.tar.gz", b"", [".tar files are not read", "unpack"]),
        ("texts.zip", b"PK", [".zip files are not read", "unpack"]),
    ],
)
def test_bad_file_is_named(name, content, parts, tmp_path, config, capfd):
    (tmp_path / name).write_bytes(content)
    fails(config(tmp_path / name), "config.data.corpus", f"{os.sep}{name}", *parts)
    assert capfd.readouterr().err == ""  # the library says nothing besides


def test_mixed_folder(folder, config):
    write_table(folder / "rows.jsonl", DOCUMENTS)
    fails(config(folder), "config.data.corpus", "json and text", "glob")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_missing_column_lists_those_there_are(suffix, tmp_path, config):
    path = write_table(tmp_path / f"rows.{suffix}", DOCUMENTS, field="body")
    fails(config(path), "config.data.text_field", path.name, "'text'", "'id', 'body'")
    if suffix != "csv":  # whose columns have no types
        fails(config(path, text_field="id"), "config.data.text_field", "'id'", "int64")
    if suffix == "jsonl":
        path.write_text('{"text": "a"}\n{"text": {"a": 1}}\n')
        fails(config(path), "config.data.text_field", "line 2", "an object")


@pytest.mark.parametrize(
    ("tokenizer", "part"),
    [("byte", "did you mean 'bytes'?"), ("sentencepiece", "tokenizer.json"), ("no/tokenizer.json", "unknown tokenizer")]
    + [(f"bpe:{size}", "258") for size in ("", "257", "many", "-5", "99999999999")],
)
def test_bad_tokenizer(tokenizer, part, folder, config):
    fails(config(folder, tokenizer=tokenizer), "config.data.tokenizer", repr(tokenizer), part)


@pytest.mark.parametrize("number", [2**31 - 1, 2**32 - 1])
def test_ids_that_no_batch_could_hold(number, folder, tmp_path, config):
    path = tmp_path / "tokenizer.json"
    path.write_text(word_level({"a": 1, "b": 2}).to_str().replace('"b":2', f'"b":{number}'))
    fails(config(folder, tokenizer=str(path)), "config.data.tokenizer", f"has an id {number}")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_unreadable_tokenizer_file(content, folder, tmp_path, config):
    (tmp_path / "tokenizer.json").write_bytes(content)
    fails(config(folder, tokenizer=str(tmp_path / "tokenizer.json")), "config.data.tokenizer", "tokenizer.json")


def test_corpus_too_short(folder, config):
    split = data.prepare(config(folder)).split("train")
    data.require_length(split, context=16, batch_size=2)
    with pytest.raises(UserError, match=r"too short: 30 training tokens are 2 windows of context 10.* batch takes 4"):
        data.train_loader(np.arange(30), context=10, batch_size=4, seed=0)
    with pytest.raises(UserError, match="2 are needed"):
        next(data.evaluation_windows(np.arange(1), context=10, batch_size=4))


def test_paths_of_a_config_hold_in_every_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    word_level({"a": 1}).save("tokenizer.json")

    def settled(**fields):
        config = configs.create("mha", data=fields)  # as a config file gives it, or a run's config.json
        return config.data

    for name in ("texts", "./texts", "~/texts", "texts/../texts"):
        assert settled(corpus=name).corpus == str(folder)
    assert settled(corpus="texts/*.txt").corpus == f"{folder}/*.txt"
    assert settled(corpus="nowhere.jsonl.gz").corpus == f"{tmp_path}/nowhere.jsonl.gz"
    for name in ("stdlib", "recall:6", "org/name:subset", "wikitext", str(folder)):
        assert settled(corpus=name).corpus == name
    found = settled(tokenizer="~/tokenizer.json", cache_dir="cache")
    assert (found.tokenizer, found.cache_dir) == (f"{tmp_path}/tokenizer.json", f"{tmp_path}/cache")
    for name in ("bytes", "bpe:300", "byte"):
        assert settled(tokenizer=name).tokenizer == name
    odd = tmp_path / "a[b]"
    (odd / "texts").mkdir(parents=True)
    (odd / "texts" / "a.txt").write_text("a")
    monkeypatch.chdir(odd)
    assert [path.name for path in corpora._files(settled(corpus="texts/*").corpus)] == ["a.txt"]


def test_what_was_looked_for_is_said(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    fails(config("texts/mine"), f"no file or folder at {tmp_path}/texts/mine", "from the root", "hub")
    fails(config("texts/mine.jsonl"), f"looked for {tmp_path}/texts/mine.jsonl")
    fails(config("texts/*.txt"), f"looked in {tmp_path}/texts/*.txt")
    fails(config("x" * 300), "no file or folder at", "hub")
    fails(config("bytes", tokenizer="mine/tokenizer.json"), f"no file at {tmp_path}/mine/tokenizer.json")


def test_tokens_outlive_their_corpus_and_tokenizer(folder, tmp_path, config, capfd):
    word_level({"a": 1, "the": 2}).save(str(tmp_path / "tokenizer.json"))
    wanted = config(folder, tokenizer=str(tmp_path / "tokenizer.json"))
    made = data.prepare(wanted)
    data.prepare(config(folder))  # another tokenizer
    folder.rename(tmp_path / "away")
    for _ in range(2):
        kept = data.prepare(wanted, sha256=made.sha256)
        assert (kept.directory, kept.vocab_size) == (made.directory, made.vocab_size)
        (line,) = capfd.readouterr().err.splitlines()  # as the program says other lines
        assert line.startswith("config.data.") and "; using its tokens, prepared before in " in line
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    fails(wanted, "unknown tokenizer")
    for other in ({"validation_fraction": 0.5}, {"tokenizer": "bpe:300"}, {"cache_dir": str(tmp_path / "empty")}):
        with pytest.raises(UserError, match="none were found in"):
            data.prepare(dataclasses.replace(wanted, **other), sha256=made.sha256)
    with pytest.raises(UserError, match="none were found in"):
        data.prepare(wanted, sha256="0" * 64)


def test_unreadable_files_are_refused_in_one_line(folder, config, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder / "0.txt"))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", forbidden)
        with pytest.raises(UserError, match=r"config.data.corpus: .*0.txt cannot be read \(Permission denied\)"):
            corpora.find(str(folder), "text")
    monkeypatch.setattr(os, "scandir", forbidden)  # a folder that cannot be listed is not an empty one
    with pytest.raises(UserError, match="cannot be read"):
        corpora.find(str(folder), "text")


def test_a_cache_that_cannot_be_written_is_read(folder, config, monkeypatch):
    made = data.prepare(config(folder))

    def locked(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(data.filelock, "FileLock", locked)
    assert data.prepare(config(folder)).directory == made.directory
    fails(config(folder, validation_fraction=0.5), "config.data.cache_dir", "Read-only file system", "folder that can")


def test_without_a_home(folder, monkeypatch):
    monkeypatch.delenv("MLA_DATA_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # as for a user that the machine does not know
    fails(DataConfig(corpus=str(folder)), "config.data.cache_dir", "HOME is not set")
    fails(DataConfig(corpus="~/texts", cache_dir="/tmp"), "config.data.corpus", "HOME is not set")


def take(loader, count):
    """Windows: each batch's tokens with the last target behind them, which the other targets must be part of."""
    batches = [next(loader) for _ in range(count)]
    windows = [np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1) for batch in batches]
    assert all(np.array_equal(a[:, 1:], b.targets) and b.weights is None for a, b in zip(windows, batches, strict=True))
    return windows


@given(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 1, 50, 399, 1000]))
@settings(deadline=None)
def test_every_token_but_the_first_is_predicted_once(num_tokens, context, batch_size, limit):
    tokens = np.random.default_rng(num_tokens).integers(0, 65_536, num_tokens, np.uint16)
    predicted = data.predicted_tokens(num_tokens, limit)
    assert predicted == min(num_tokens - 1, limit or num_tokens)
    seen = []
    for windows, weights, span in data.evaluation_windows(tokens, context, batch_size, limit):
        assert windows.shape == (batch_size, context + 1) and weights.shape == (batch_size, context)
        assert windows.dtype == np.int32 and weights.dtype == np.float32
        here = windows[:, 1:][weights == 1]
        assert np.array_equal(here, tokens[span])
        # What a token is predicted from is what stands before it in the stream.
        assert np.array_equal(windows[:, :-1][weights == 1], tokens[span.start - 1 : span.stop - 1])
        assert not windows[:, 1:][weights == 0].any()
        seen.append(here)
    assert np.array_equal(np.concatenate(seen), tokens[1 : predicted + 1])


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 11), st.integers(1, 5), st.integers(-5, 2**40))
@settings(deadline=None, max_examples=15)
def test_an_epoch_holds_every_window_once(windows, context, tail, batch_size, seed):
    batch_size = min(batch_size, windows)
    tokens = np.arange(windows * context + 1 + min(tail, context - 1), dtype=np.uint16)
    expected = [tuple(tokens[i * context : (i + 1) * context + 1]) for i in range(windows)]
    batches = take(data.train_loader(tokens, context, batch_size, seed), math.ceil(2 * windows / batch_size))
    assert all(batch.shape == (batch_size, context + 1) and batch.dtype == np.int32 for batch in batches)
    rows = [tuple(row) for batch in batches for row in batch]
    assert sorted(rows[:windows]) == sorted(rows[windows : 2 * windows]) == expected


def test_order_depends_on_epoch_and_seed():
    epochs = set()
    for seed in (0, 1, 2):
        starts = np.concatenate(take(data.train_loader(np.arange(1001), 10, 10, seed), 20))[:, 0]
        epochs |= {tuple(starts[:100]), tuple(starts[100:])}
    assert len(epochs) == 6  # no epoch of one seed is an epoch of another


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 5))
@settings(deadline=None, max_examples=10)
def test_resume_is_bit_equal(stop, elsewhere, seed):
    tokens = np.random.default_rng(seed).integers(0, 257, 700, np.uint16)
    loader = data.train_loader(tokens, 16, 4, seed)
    take(loader, stop)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 15)
    resumed = data.train_loader(tokens, 16, 4, seed)
    take(resumed, elsewhere)  # wherever it was before
    resumed.set_state(state)
    assert all(np.array_equal(a, b) for a, b in zip(expected, take(resumed, 15), strict=True))
    assert resumed.get_state() == loader.get_state()


def test_unigram_perplexity(folder, config):
    prepared = data.prepare(config(folder, tokenizer="bpe:300"))
    train, validation = (prepared.split(name).tokens.astype(int) for name in ("train", "validation"))
    probabilities = [((train == i).sum() + 1) / (len(train) + 300) for i in range(300)]
    loss = -np.mean([math.log(probabilities[i]) for i in validation[1:]])
    close(data.unigram_perplexity(prepared), math.exp(loss), relative=1e-9)
    # Where positions have weights, they count as they do in training and in a model's loss.
    ids, weights = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 0, 2, 0.5], np.float32)
    weighted = SimpleNamespace(vocab_size=3, split=lambda name: data.Split(name, ids, ids, 1, 5, weights))
    probabilities = np.array([1, 2, 3.5]) / 6.5
    expected = -(math.log(probabilities[1]) + 2.5 * math.log(probabilities[2])) / 3.5
    close(data.unigram_perplexity(weighted), math.exp(expected), relative=1e-9)
