"""Corpora, tokenizers and batches, on small files of every accepted form."""

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import corpora, data, tokenizers
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
def test_damaged_folder_is_made_anew(name, folder, config, caplog):
    first = data.prepare(config(folder, tokenizer="bpe:300"))
    path = first.directory / name
    before = path.read_bytes()
    for damage in (lambda: path.write_bytes(before[:-3]), path.unlink):
        damage()
        with pytest.raises(UserError, match="damaged"):
            data.open_prepared(first.directory)
        caplog.clear()
        data.prepare(config(folder, tokenizer="bpe:300"))
        assert path.read_bytes() == before
        (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
        assert "preparing it anew" in record.message


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
        from mla import data
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


@pytest.mark.parametrize(
    ("tokenizer", "part"),
    [("byte", "did you mean 'bytes'?"), ("sentencepiece", "tokenizer.json"), ("no/tokenizer.json", "unknown tokenizer")]
    + [(f"bpe:{size}", "258") for size in ("", "257", "many", "-5", "99999999999")],
)
def test_bad_tokenizer(tokenizer, part, folder, config):
    fails(config(folder, tokenizer=tokenizer), "config.data.tokenizer", repr(tokenizer), part)


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


def take(loader, count):
    return [next(loader)["tokens"] for _ in range(count)]


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
    assert data.unigram_perplexity(prepared) == pytest.approx(math.exp(loss), rel=1e-9)
