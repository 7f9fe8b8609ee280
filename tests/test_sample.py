"""Samples: what can be drawn and how likely, whose random numbers they are, and how they become text with their prompt."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library
from flax import nnx
from helpers import close
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.data.tokenizers import ByteTokenizer, FileTokenizer
from mla.errors import UserError
from mla.evaluation.sample import Sampling, candidates, draw, sample, written_text
from mla.sharding import AXES

VOCAB = 29


def mesh(data: int = 1) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:data]).reshape(data, 1, 1), AXES)


@pytest.fixture(scope="module")
def model() -> models.Model:
    """Its weights are large enough that what it attends to matters."""
    shape = {"d_model": 16, "num_layers": 1, "num_heads": 2, "match_parameters": False}
    made = models.create(configs.create("mla", {"kv_lora_rank": 6, "qk_rope_head_dim": 4}, model=shape, context=12), VOCAB)
    louder = jax.tree.map(lambda p: p * 2 if p.ndim > 1 else p, models.parameters(made))
    found: models.Model = models.with_parameters(nnx.graphdef(made), louder)
    return found


class Letters:
    """A tokenizer that loses nothing: one letter an id."""

    name, vocab_size, eos_id = "letters", VOCAB, VOCAB - 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("A") + i) for i in ids)


def text(model: Any, prompt: str, where: Mesh | None = None, tokenizer: Any = None, **how: Any) -> str:
    """The one sample that is asked for."""
    (found,) = sample(model, tokenizer or Letters(), where or mesh(), prompt, Sampling(**how))
    return found


def test_greedy_text_is_what_the_plain_forward_says(model: models.Model) -> None:
    said = text(model, "LATENT", tokens=9, temperature=0)
    ids = Letters().encode(said)
    expected = jax.jit(model.__call__)(jnp.asarray(ids)[None])[0, 5:-1].argmax(axis=-1)
    assert said.startswith("LATENT") and ids[6:] == expected.tolist()
    assert len(ids) == 6 + 9  # the model does not end the document here
    assert text(model, "LATENT", tokens=9, temperature=1e-39) == said
    ends = Letters()
    ends.eos_id = ids[6 + 2]
    assert text(model, "LATENT", tokenizer=ends, tokens=9, temperature=0) == said[: said.index(said[8], 6)]


def test_samples_follow_their_seed_and_number_alone(model: models.Model) -> None:
    how = {"tokens": 12, "temperature": 2.0}
    first, again, other = (text(model, "", seed=s, **how) for s in (1, 1, 2**32 - 1))
    assert first == again != other
    assert text(model, "", mesh(data=2), seed=1, **how) == first
    three = sample(model, Letters(), mesh(), "", Sampling(samples=3, seed=1, **how))
    assert three[0] == first and len(set(three)) == 3
    assert sample(model, Letters(), mesh(data=2), "", Sampling(samples=2, seed=1, **how)) == three[:2]
    assert text(model, "", seed=1, top_k=1, **how) == text(model, "", temperature=0, tokens=12)


def test_samples_refuse_what_cannot_be_meant(model: models.Model) -> None:
    for flag, how in [
        ("temperature", {"temperature": -1.0}),
        *(("temperature", {"temperature": value}) for value in (math.nan, math.inf, 1e39)),
        *(("sample_tokens", {"tokens": value}) for value in (0, -1, 2**31, 10**12)),
        *(("num_samples", {"samples": value}) for value in (0, 2**63)),
        *(("seed", {"seed": value}) for value in (-1, 2**32, 99999999999, 2**63)),
        ("top_k", {"top_k": -1}),
        *(("top_p", {"top_p": value}) for value in (0.0, 1.1, math.nan, -0.5)),
    ]:
        with pytest.raises(UserError, match=rf"^--{flag}: \S+ is "):
            Sampling(**how).check()
    with pytest.raises(UserError, match="29 tokens"):
        text(model, "X", tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match=r"--temperature: nan"):
        text(model, "X", temperature=math.nan)
    with pytest.raises(UserError, match=r"not enough memory: the cache of 1 sequence.* lower --sample_tokens"):
        text(model, "X", tokens=2**31 - 3)
    with pytest.raises(UserError, match=r"positions beyond what 32 bits can count; lower --sample_tokens"):
        text(model, "XXX", tokens=2**31 - 2)


# Hand-made logits and what can be drawn of them; of equal ones the smaller id is the likelier.
DRAWN = [
    ([0.0, 1, 2, 3], {}, [0, 1, 2, 3]),
    ([0.0, 1, 2, 3], {"top_k": 2}, [2, 3]),
    ([0.0, 1, 2, 3], {"top_k": 4}, [0, 1, 2, 3]),
    ([0.0, 1, 2, 3], {"top_k": 9}, [0, 1, 2, 3]),
    ([0.0, 1, 2, 3], {"top_k": 2**40}, [0, 1, 2, 3]),
    ([2.0, 2, 2, 2], {"top_k": 3}, [0, 1, 2]),
    ([1.0, 2, 1, 2], {"top_k": 1}, [1]),
    ([1.0, 2, 1, 2], {"top_k": 3}, [0, 1, 3]),
    ([0.0, 1, 2, 3], {"top_p": 1.0}, [0, 1, 2, 3]),
    ([0.0, 1, 2, 3], {"top_p": 0.6}, [3]),  # probabilities .032 .087 .237 .644
    ([0.0, 1, 2, 3], {"top_p": 0.7}, [2, 3]),
    ([0.0, 1, 2, 3], {"top_p": 0.9}, [1, 2, 3]),
    ([0.0, 1, 2, 3], {"top_p": 1e-39}, [3]),
    ([5.0, 5, 5, 5], {"top_p": 0.6}, [0, 1, 2]),
    ([0.0, 1, 2, 3], {"top_k": 2, "top_p": 0.72}, [3]),  # .731 of what top-k leaves
    ([0.0, 1, 2, 3], {"temperature": 0.5, "top_p": 0.86}, [3]),  # .865 at this temperature
    ([0.0, 1, 2, 3], {"temperature": 0.0, "top_p": 0.9}, [3]),
    ([3.0, 1, 3, 0], {"temperature": 1e-39}, [0]),
    ([3.0, 1, 3, 0], {"temperature": 2e-38}, [0, 2]),
    ([1e30, -1e30, 3e38, -3e38], {"temperature": 1e-30}, [2]),
]


def expected_candidates(logits: list[float], how: Sampling) -> np.ndarray:
    """Probabilities of what can be drawn, float64, token by token."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if how.temperature < 2.0**-126:
        order = order[:1]
    order = order[: how.top_k] if how.top_k else order
    weights = {i: math.exp((logits[i] - max(logits)) / (how.temperature or 1.0)) for i in order}
    total, reached, found = sum(weights.values()), 0.0, np.zeros(len(logits))
    for i in order:
        if found.any() and reached >= how.top_p < 1:
            break
        found[i], reached = weights[i], reached + weights[i] / total
    return found / found.sum()


@pytest.mark.parametrize(("logits", "fields", "drawn"), DRAWN)
def test_what_can_be_drawn_and_how_likely(logits: list[float], fields: dict[str, Any], drawn: list[int]) -> None:
    how = Sampling(**({"temperature": 1.0} | fields))
    how.check()
    expected = expected_candidates(logits, how)
    assert np.flatnonzero(expected).tolist() == drawn
    rows = jnp.asarray([logits, logits[::-1]], jnp.float32)
    found = np.asarray(jax.nn.softmax(candidates(rows, how), axis=-1), np.float64)
    assert np.flatnonzero(found[0]).tolist() == drawn
    close(found[0], expected, 1e-6, "probabilities of the tokens that can be drawn")
    close(found[1], expected_candidates(logits[::-1], how), 1e-6, "the other row's probabilities")


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    how = Sampling(temperature=1.0, top_k=3, seed=3)
    logits = jnp.asarray([[0.0, 1.0, 2.0, 3.0]], jnp.float32)
    drawn = np.asarray(jax.jit(jax.vmap(lambda number: draw(logits, number, how)[0]))(jnp.arange(200_000)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    close(shares, expected_candidates([0.0, 1, 2, 3], how), 0.02, "shares of 200,000 draws")  # one sigma: 0.0011


# ------------------------------------------------------------------------------------------------------- prompt and text


def tokenizer_file(model: dict[str, Any], **parts: Any) -> FileTokenizer:
    """A tokenizer.json of these parts."""
    plain = {"version": "1.0", "added_tokens": [], "model": model, **parts}
    return FileTokenizer(json.dumps(plain), "made")


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
WORDS = ["▁the", "▁cat", "▁sat", "▁", "?", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def metaspace() -> FileTokenizer:
    vocab = {word: i for i, word in enumerate(WORDS)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}
    return tokenizer_file(model, pre_tokenizer=METASPACE, decoder=METASPACE)


def llama() -> FileTokenizer:
    """Every character a byte token, but for a, b and the space that begins a text."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", "a", "b", *BYTES])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    before = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    after = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return tokenizer_file(
        model,
        normalizer={"type": "Sequence", "normalizers": before},
        decoder={"type": "Sequence", "decoders": after},
    )


def lower_case() -> FileTokenizer:
    vocab = {word: i for i, word in enumerate(["[UNK]", "[SEP]", "the", "cat", "sat", "s"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return tokenizer_file(model, normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "Whitespace"}, decoder=decoder)


def byte_level() -> FileTokenizer:
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], library.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    return FileTokenizer(made.to_str(), "made")


def byte_ids(data: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in data]


# (tokenizer, prompt, tokens written or their bytes, the text that is printed)
WRITTEN: list[tuple[Any, str, Any, str]] = [
    (metaspace, "the cat", ["▁sat"], "the cat sat"),
    (metaspace, "the cat", ["▁"], "the cat "),
    (metaspace, "", ["▁the", "▁cat"], "the cat"),
    (metaspace, "", [], ""),
    (metaspace, "the cat", [], "the cat"),
    (metaspace, "the dog", ["▁sat"], "the? sat"),  # the tokenizer does not know dogs: its own form of the prompt
    (llama, "ab", ["▁", "a"], "ab a"),
    (llama, "aé", byte_ids("é".encode()), "aéé"),
    (llama, "aé", byte_ids("é".encode()[:1]), "aé"),  # a run of bytes that is broken off would be replaced as a whole
    (llama, "aé", byte_ids("é".encode() + "日".encode()[:2]), "aéé"),
    (llama, "aé", [*byte_ids(b"\xff"), "b"], "aé�b"),
    (llama, "a", byte_ids("日本".encode()[:5]), "a日"),
    (llama, "a", byte_ids(b"\xff\xff\xff\xff"), "a����"),  # no character that was broken off
    (llama, "aé", byte_ids("é".encode() + b"\xff\xff\xff\xff"), "aé" + 6 * "�"),
    (lower_case, "The Cat", ["sat"], "the cat sat"),
    (lower_case, "the cat", ["sat"], "the cat sat"),
    (byte_level, "a <|endoftext|> b", b" c", "a <|endoftext|> b c"),
    (byte_level, " x", "é日".encode()[:4], " xé"),
    (ByteTokenizer, "é", "日".encode(), "é日"),
    (ByteTokenizer, "é", "日".encode()[:2], "é"),
    (ByteTokenizer, "a�", "日".encode()[:1], "a��"),
    (ByteTokenizer, "a\r\n\0", b"b", "a\r\n\0b"),
]


@pytest.mark.parametrize(("make", "prompt", "written", "printed"), WRITTEN)
def test_a_text_is_its_prompt_and_what_was_written_decoded_together(
    make: Any, prompt: str, written: Any, printed: str
) -> None:
    tokenizer = make()
    if isinstance(written, bytes):
        ids = list(written) if make is ByteTokenizer else [library_id(tokenizer, byte) for byte in written]
    else:
        vocab = json.loads(tokenizer.text)["model"]["vocab"]
        ids = [vocab[token] for token in written]
    assert written_text(tokenizer, prompt, tokenizer.encode(prompt), ids) == printed


def library_id(tokenizer: FileTokenizer, byte: int) -> int:
    """The id of one byte in a byte-level vocabulary."""
    alphabet = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for code in (*range(0x20, 0x7F), 0xE9, 0x65E5):
        for raw, letter in zip(chr(code).encode(), alphabet.pre_tokenize_str(chr(code))[0][0], strict=True):
            table[raw] = letter
    return int(json.loads(tokenizer.text)["model"]["vocab"][table[byte]])
