"""A finished run evaluated otherwise than it was trained: another corpus, another context, YaRN; and under what name."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import close

import eval as program
from mla import commands
from mla import config as configs
from mla import model as models
from mla import workdir as workdirs
from mla.config import Config
from mla.data.tokenizers import FileTokenizer
from mla.errors import UserError
from mla.evaluation.evaluate import _data, evaluate, label, sample_text
from mla.evaluation.sample import Sampling
from mla.training.checkpoint import load_model
from mla.training.loop import train

TEXT = "every head reads the cache again, and the cache keeps a vector of its own per token; naïve readers read twice. " * 9


@pytest.fixture(scope="module")
def run(trained: Any) -> tuple[Config, Path]:
    """A run of a BPE trained on its corpus, evaluated as it is."""
    eval = {"batch_size": 8, "decode_tokens": 0, "tokens": 64}
    config, workdir = trained("mla", steps=4, data={"tokenizer": "bpe:300"}, eval=eval)
    evaluate(workdir, config)
    return config, workdir


def other(config: Config, *overrides: str) -> Config:
    return commands.override(config, [f"--config.{o}" for o in overrides], commands.EVALUATION)


def loss_of(model: models.Model, ids: list[int], context: int) -> float:
    """Mean nats of every id but the first, from the logits of each window alone, in float64."""
    losses, forward = [], jax.jit(model.__call__)
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        padded = jnp.asarray(window[:-1] + [0] * (context + 1 - len(window)))[None]
        logits = np.asarray(forward(padded)[0], np.float64)[: len(window) - 1]
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses += list(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(shifted)), window[1:]])
    return float(np.mean(losses))


def test_another_corpus_in_the_ids_of_the_run(
    run: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By eval.py itself: the loss that numpy gives, a file and a row of its own name, and eval.json as it was."""
    _, workdir = run
    before, notes = (workdir / "eval.json").read_bytes(), tmp_path / "notes.txt"
    notes.write_text(TEXT)
    arguments = [
        f"--workdir={workdir}",
        f"--config.data.corpus={notes}",
        "--config.eval.split=all",
        "--config.eval.tokens=0",
    ]
    assert commands.invoke(program.main, ["eval.py", *arguments], program.CONFIG) == 0
    (path,) = workdir.glob("eval-*.json")
    row = json.loads(path.read_text())
    assert "corpus=notes.txt-" in path.name and "split=all" in path.name
    assert row["name"] == path.stem.replace("eval-", "mla-")
    assert (row["corpus"]["name"], row["corpus"]["tokenizer"], row["corpus"]["split"]) == (str(notes), "bpe:300", "all")
    assert (workdir / "eval.json").read_bytes() == before

    library = tokenizers.Tokenizer.from_file(str(workdir / "tokenizer.json"))
    ids = [*library.encode(TEXT).ids, library.token_to_id("<|endoftext|>")]
    assert row["eval_tokens"] == len(ids) - 1 and row["eval_bytes"] == len(TEXT.encode()) - len(library.decode(ids[:1]))
    close(row["loss"], loss_of(load_model(workdir).model, ids, 16), 1e-6, "loss on another corpus")
    close(row["loss_cached"], row["loss"], 1e-6, "through the cache")
    path.unlink()


def test_runs_of_earlier_versions_have_their_tokenizer_from_their_corpus(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, workdir = run
    kept = workdirs.read_tokenizer(workdir, config.data)
    assert kept is not None and (kept.name, kept.vocab_size) == ("bpe:300", load_model(workdir).vocab_size)
    older = Path(shutil.copytree(workdir, tmp_path / "older"))
    (older / "tokenizer.json").unlink()
    assert workdirs.read_tokenizer(older, config.data) is None
    raw = dataclasses.replace(config.data, tokenizer="bytes")
    assert workdirs.read_tokenizer(older, raw).name == "bytes"  # type: ignore[union-attr]
    assert _data(older, config).directory == _data(workdir, config).directory
    (tmp_path / "a.txt").write_text(TEXT)
    elsewhere = other(config, f"data.corpus={tmp_path / 'a.txt'}", "eval.split=all")
    one, two = (_data(folder, elsewhere) for folder in (workdir, older))
    assert one.tokenizer.fingerprint == two.tokenizer.fingerprint == kept.fingerprint
    np.testing.assert_array_equal(one.split("all").tokens, two.split("all").tokens)
    assert len(one.split("validation")) == 0
    held_out = _data(workdir, other(config, f"data.corpus={tmp_path / 'a.txt'}", "data.validation_fraction=0.3"))
    assert len(held_out.split("validation")) > 0.2 * len(one.split("all"))


def permuted(text: str) -> str:
    """A tokenizer.json of the same tokens in which the ids of the bytes are turned by one."""
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (i + 1) % 256 if i < 256 else i for token, i in vocabulary.items()}
    return json.dumps(content)


@pytest.mark.parametrize("change", ["trained otherwise", "permuted", "another end", "gone"])
def test_a_run_keeps_to_its_own_tokenizer(
    change: str, run: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, resuming and longer training of a run whose config names what is another tokenizer by now."""
    config, workdir = run
    prepared = _data(workdir, config)
    text = (workdir / "tokenizer.json").read_text()
    here = Path(shutil.copytree(workdir, tmp_path / "run"))
    if change == "trained otherwise":  # as by another version of the library, and nothing prepared before
        monkeypatch.setattr("mla.data.tokenizers.train_bpe", lambda _, size: FileTokenizer(permuted(text), f"bpe:{size}"))
        config = other(config, f"data.cache_dir={tmp_path / 'cache'}")
    else:
        folder = tmp_path / "named"
        folder.mkdir()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder)))
        workdirs.write_json(here / "config.json", configs.to_dict(config))
        if change != "gone":
            (folder / "tokenizer.json").write_text(permuted(text) if change == "permuted" else text)
            (folder / "tokenizer_config.json").write_text('{"eos_token": "Ġlatent"}' if change == "another end" else "{}")
    expected = prepared.split("train").tokens
    np.testing.assert_array_equal(_data(here, config).split("train").tokens, expected)

    def loader(tokens: np.ndarray, *_: Any) -> Any:
        np.testing.assert_array_equal(tokens, expected)
        raise UserError("these tokens")

    monkeypatch.setattr("mla.data.prepared.train_loader", loader)
    for steps in (config.steps, config.steps + 2):
        with pytest.raises(UserError, match="these tokens"):
            train(dataclasses.replace(config, steps=steps), here)


def test_parameters_of_other_ids_are_no_start(run: tuple[Config, Path], tiny: Any, tmp_path: Path) -> None:
    _, workdir = run
    text = (workdir / "tokenizer.json").read_text()
    workdirs.require_same_ids(str(workdir), FileTokenizer(text, "a"))
    workdirs.require_same_ids(str(workdir), FileTokenizer(json.dumps(json.loads(text), indent=1), "a", end_token="Ġlatent"))
    path = tmp_path / "tokenizer.json"
    path.write_text(permuted(text))
    for name in (str(path), "bytes"):
        wanted = tiny("mla", init_from=str(workdir), data={"tokenizer": name})
        with pytest.raises(UserError, match=r"config.init_from: .* has another tokenizer.* set .* to .*/tokenizer.json"):
            train(wanted, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    older = Path(shutil.copytree(workdir, tmp_path / "older"))
    (older / "tokenizer.json").unlink()
    workdirs.require_same_ids(str(older), FileTokenizer(text, "a"))  # what it had is not known any more


def test_an_environment_of_any_shape_says_nothing(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, workdir = run
    shutil.copyfile(workdir / "config.json", tmp_path / "config.json")
    for content in ("[]", "3", "null", '"a"', '{"corpus_sha256": 5}', '{"corpus_sha256": []}', "{}", "{", ""):
        (tmp_path / "environment.json").write_text(content)
        assert workdirs.known_corpus(config, tmp_path) == ""
        workdirs.check_corpus(tmp_path, "0" * 64)


def test_a_run_within_its_corpus_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    config = tiny("mla", data={"corpus": str(tmp_path)})
    with pytest.raises(UserError, match=r"--workdir: .*/run is part of config.data.corpus"):
        train(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_another_context_with_yarn(run: tuple[Config, Path]) -> None:
    config, workdir = run
    changed = other(config, "eval.context=32", "eval.yarn.factor=4", "eval.tokens=128")
    row = evaluate(workdir, changed)
    assert row["name"] == "mla-tokens=128-context=32-yarn.factor=4.0"
    assert json.loads((workdir / f"{row['name'].replace('mla', 'eval', 1)}.json").read_text())["loss"] == row["loss"]
    assert (row["context"], row["eval_tokens"], row["config"]["context"]) == (32, 128, 16)
    assert row["cache"]["bytes_at"]["32"] == 32 * row["cache"]["bytes_per_token"]

    # The same parameters in a model that was configured so by hand.
    by_hand = dataclasses.replace(config, context=32, eval=configs.EvalConfig())
    mechanism: Any = copy.deepcopy(config.model.mechanism)
    mechanism["mla"].yarn = dataclasses.replace(mechanism["mla"].yarn, factor=4.0, original_context=16)
    by_hand.model = dataclasses.replace(config.model, mechanism=mechanism)
    stretched, plain = load_model(workdir, built_from=by_hand), load_model(workdir)
    from mla.data.prepared import prepare

    ids = prepare(config.data).split("validation").tokens[:129].tolist()
    close(row["loss"], loss_of(stretched.model, ids, 32), 1e-6, "loss with YaRN")
    assert abs(loss_of(plain.model, ids, 32) - row["loss"]) > 1e-5, "YaRN changed nothing"


def test_shorter_windows_keep_the_yarn_a_model_was_trained_with() -> None:
    settings = {"yarn": {"factor": 2.0, "original_context": 64}}
    config = configs.create("mla", settings, context=128, eval={"context": 32})
    assert config.evaluated_context == 32 and configs.for_evaluation(config).context == 128
    longer: Any = configs.for_evaluation(dataclasses.replace(config, context=48, eval=configs.EvalConfig(context=96)))
    assert longer.context == 96 and longer.model.mechanism["mla"].yarn.active(longer.context)


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        (
            "gqa",
            ["context=64", "yarn.factor=2"],
            "eval.yarn.factor: layer 0 is gqa, which has no YaRN and looks back further",
        ),
        ("mla,gqa", ["context=64", "yarn.factor=2"], "eval.yarn.factor: layer 1 is gqa, which has no YaRN"),
        ("mla", ["yarn.factor=2"], "has no effect in windows of 32 tokens, which the original 32 hold; set eval.context"),
        ("mla", ["context=64", "yarn.factor=0.5"], "eval.yarn.factor: 0.5 is not a number from 1 up"),
        ("mla", ["context=64", "yarn.factor=nan"], "eval.yarn.factor: nan is not a number from 1 up"),
        ("mla", ["context=64", "yarn.factor=2", "yarn.beta_slow=0"], "eval.yarn.beta_slow: 0.0 is not a positive number"),
        ("mla", ["yarn.original_context=8"], "eval.yarn.original_context: 8 has no effect while eval.yarn.factor is 1"),
        ("mla", ["context=-1"], "eval.context: -1 is not a number of tokens; 0 means the context of training"),
    ],
)
def test_yarn_and_contexts_that_mean_nothing_are_refused(variant: str, overrides: list[str], message: str) -> None:
    config = configs.create(variant, context=32, model={"num_layers": 2})
    with pytest.raises(UserError) as error:
        configs.validate(other(config, *(f"eval.{o}" for o in overrides)))
    assert message in str(error.value)


def test_local_and_recurrent_layers_beside_yarn_are_fine() -> None:
    config: Any = configs.create(
        "sliding_window,linear,mla", {"sliding_window": {"window": 8}}, context=32, model={"num_layers": 3}
    )
    changed = other(config, "eval.context=64", "eval.yarn.factor=2")
    configs.validate(changed)
    built = configs.for_evaluation(changed)
    assert [getattr(layer.config, "yarn", None) and layer.config.yarn.factor for layer in configs.layers(built.model)] == [
        *(None, None, 2.0)
    ]
    assert config.model.mechanism["mla"].yarn.factor == 1.0, "the run's config is left as it is"


def test_a_context_beyond_the_text_is_refused(run: tuple[Config, Path], snapshot: Any) -> None:
    config, workdir = run
    before = snapshot(workdir)
    with pytest.raises(UserError, match=r"eval\.context: 100000 is more than the \d+ tokens predicted of split validation"):
        evaluate(workdir, other(config, "eval.context=100000", "eval.tokens=0"))
    assert snapshot(workdir) == before


# -------------------------------------------------------------------------------------------------------------------- names


def test_what_differs_has_a_name_of_its_own_and_what_does_not_has_none() -> None:
    config = configs.create("mla")
    named = {
        "eval.split=train": "split=train",
        "eval.tokens=256": "tokens=256",
        "eval.cache.codec=int4": "cache.codec=int4",
        "mesh.tensor=2": "tensor=2",
        "data.text_field=body": "text_field=body",
    }
    for change, expected in named.items():
        assert label(config, other(config, change)) == expected
    for change in ("eval.batch_size=3", "eval.tolerance=0.5", "data.cache_dir=/tmp/x", "eval.split=validation"):
        assert label(config, other(config, change)) == ""
    assert label(config, config, "slim") == "slim"
    everything = [
        other(config, *changes)
        for changes in (
            ["data.corpus=a/notes.txt"],
            ["data.corpus=b/notes.txt"],
            ["data.corpus=notes.txt"],
            ["eval.cache.codec=int4:32"],
            ["eval.cache.codec=int4_32"],
            ["eval.cache.codec=key=int4,value=int8"],
            ["data.corpus=é"],
            ["data.corpus=/"],
            ["eval.cache.codec=" + "x" * 300],
            ["eval.cache.codec=" + "x" * 301],
            ["mesh.data=1"],
            ["mesh.data=-2"],
        )
    ]
    labels = [label(config, changed) for changed in everything]
    assert len(set(labels)) == len(labels)
    assert all(len(told) < 120 and told.isascii() and "/" not in told for told in labels)
    assert all(told.startswith("corpus=notes.txt-") for told in labels[:3])  # of three folders


def test_every_field_of_an_evaluation_is_told_or_changes_nothing() -> None:
    """Whatever is added to the config: an evaluation that sets it does not land in eval.json."""
    config = configs.create("mla")
    told = set()
    for path, value in configs.leaves(config):
        if not any(path == free or path.startswith(f"{free}.") for free in commands.EVALUATION):
            continue
        new = {bool: not value, int: 7, float: 7.5, str: "seven"}[type(value)]
        changed = commands.override(config, [f"--config.{path}={new}"], commands.EVALUATION)
        if label(config, changed):
            told.add(label(config, changed))
        else:
            ways = ("mesh.distributed", "mesh.join_seconds", "mesh.silence_seconds")  # how processes find one another
            assert path in ("eval.batch_size", "eval.tolerance", "data.cache_dir", *ways)
    assert len(told) > 20


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.data.tokenizer=bytes"], "config.data.tokenizer: is fixed by the trained model"),
        (["--config.context=32"], "config.context: is fixed by the trained model"),
        (["--out=/proc/eval.json"], "/proc/eval.json: cannot be written"),
        (["--out=/dev/null"], "--out=/dev/null: is no file"),
        (["--out={workdir}"], "is a folder"),
        (["--out={workdir}/config.json"], "is there and holds no evaluation; choose another name"),
        (["--out={workdir}/nowhere/x.json"], "no folder"),
    ],
)
def test_refused_before_anything_is_computed(
    overrides: list[str],
    message: str,
    run: tuple[Config, Path],
    snapshot: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, workdir = run
    before = snapshot(workdir)
    monkeypatch.setattr("mla.evaluation.evaluate._open", lambda *_: pytest.fail("it was computed"))
    arguments = [f"--workdir={workdir}", *(o.format(workdir=workdir) for o in overrides)]
    assert commands.invoke(program.main, ["eval.py", *arguments], program.CONFIG) == 1
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert snapshot(workdir) == before


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only disk, which says EROFS; permissions would not stop root."""
    config, workdir = run

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("mla.evaluation.evaluate._open", lambda *_: pytest.fail("it was computed"))
    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    with pytest.raises(
        UserError, match=r"eval\.json: cannot be written \(Read-only file system\); name another file by --out"
    ):
        evaluate(workdir, config)


def test_no_device_is_touched_before_the_mesh_says_how_many_there_are(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mesh.host_devices has no effect on devices that exist already."""
    config, workdir = run

    def opened(*_: Any) -> Any:
        raise UserError("opened")

    def touched(*_: Any) -> Any:
        pytest.fail("devices were made before the mesh was prepared")

    monkeypatch.setattr("mla.evaluation.evaluate._open", opened)
    for name in ("process_index", "devices", "device_count", "local_devices"):
        monkeypatch.setattr(jax, name, touched)
    with pytest.raises(UserError, match="opened"):
        evaluate(workdir, config)


def test_samples_need_no_corpus(run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run keeps its tokenizer, so its folder can be taken elsewhere."""
    config, workdir = run
    monkeypatch.setattr("mla.evaluation.evaluate.prepare", lambda *_, **__: pytest.fail("the corpus was read"))
    monkeypatch.setattr("mla.evaluation.evaluate.sample", lambda model, tokenizer, *_: [tokenizer.name])
    assert sample_text(workdir, config, "the cache", Sampling(tokens=1)) == ["bpe:300"]
