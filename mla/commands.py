"""From a command line to one call: flags, config overrides, and one clear line for whatever the user can mend.

    WORKDIR = commands.define_workdir("folder of this run")
    CONFIG = commands.define_config_file(WORKDIR)

    def main() -> int | None:
        return train(CONFIG.value, WORKDIR.value)

    if __name__ == "__main__":
        commands.run(main, CONFIG)

Overrides are written `--config.path.to.field=value`. They are checked against the dataclass tree, then parsed and applied
by ml_collections' config flags.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mla import config as configs
from mla import paths, processes
from mla.errors import DISK_ERRORS, PATH_ERRORS, UserError, nearest
from mla.workdir import CONFIG_FILE, read_config

flags.disclaim_key_flags()  # flags defined here belong, in --help, to the program that asked for them

T = TypeVar("T")

# Groups and fields that an evaluation may set. The tokenizer is the model's: other ids would mean nothing to it.
EVALUATION = ("eval", "mesh", "data.corpus", "data.text_field", "data.validation_fraction", "data.cache_dir")

CHOOSING = ("model.pattern", "model.mlp")  # whose values decide which fields a mechanism or an MLP has

_OVERRIDE = re.compile(r"--?(?:no)?config\.")
# Where libtpu is installed, to compile for a TPU, and no TPU is: it would ask the cloud for one, and be in one process only.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")


class ConfigFlag:
    """A config and the overrides it accepts. `value` is there once `run` has parsed the command line.

    Args:
      load: gives the config before overrides; called after all flags are parsed.
      only: groups and fields that may be overridden, such as ('eval', 'data.corpus'); empty: all.
    """

    def __init__(self, load: Callable[[], configs.Config], only: Sequence[str] = ()):
        self._load, self._only = load, tuple(only)
        self._value: configs.Config | None = None

    @property
    def value(self) -> configs.Config:
        if self._value is None:
            raise RuntimeError("the command line has not been parsed; start the program with commands.run(main, CONFIG)")
        return self._value

    def parse(self, overrides: Sequence[str]) -> None:
        """Loads the config, applies `--config.path=value` arguments and validates the result. Raises UserError."""
        config = override(self._load(), overrides, self._only)
        configs.validate(config)
        self._value = config


# ------------------------------------------------------------------------------------------------------ defining flags


class _Path(flags.ArgumentParser):  # type: ignore[type-arg]
    """Reads the value of the path flag called `name`."""

    def __init__(self, name: str):
        self._field = f"--{name}"

    def parse(self, argument: str) -> str:
        return paths.expand(argument, self._field)


def define_path(name: str, default: str | None, help: str, required: bool = False) -> flags.FlagHolder[str]:
    """A flag that is a path, `~` expanded. Other flags are defined with `absl.flags`."""
    serializer: Any = flags.ArgumentSerializer()
    return typing.cast(
        Any,
        flags.DEFINE(_Path(name), name, default, help, serializer=serializer, required=required, allow_override=True),
    )


def define_workdir(help: str, required: bool = True) -> flags.FlagHolder[str]:
    """The flag --workdir, a folder; `help` says whose."""
    return define_path("workdir", None, help, required)


def define_config_file(workdir: flags.FlagHolder[str]) -> ConfigFlag:
    """The flag --config=FILE[:VARIANT], by default the config of the run in --workdir, and overrides of every field."""
    fields = "\n".join(f"--config.{path}={value!r}" for path, value in configs.leaves(configs.Config()))
    help = (
        "FILE[:VARIANT], for example configs/quick.py:mla; by default the config of the run in --workdir."
        " Any field can be overridden, --config.path.to.field=value;"
        f" mla/config.py explains them. Fields and their defaults:\n{fields}\n"
        "and, as --config.model.mechanism.FIELD, those of the mechanism's own config in mla/attention/."
    )
    spec = flags.DEFINE_string("config", None, help, allow_override=True)

    def load() -> configs.Config:
        if spec.value:
            return load_config(spec.value)
        if not os.path.isfile(os.path.join(workdir.value, CONFIG_FILE)):
            raise UserError("--config is missing: FILE[:VARIANT], for example configs/quick.py:mla")
        return read_config(workdir.value)

    return ConfigFlag(load)


def define_config_from_workdir(workdir: flags.FlagHolder[str], only: Sequence[str] = EVALUATION) -> ConfigFlag:
    """The config a training run left in --workdir; overrides of the groups and fields in `only` are accepted.

    A program with several sources builds `ConfigFlag(load, only)` itself; `load` may read any flag.
    """

    def load() -> configs.Config:
        return read_config(str(workdir.value))

    return ConfigFlag(load, only)


def text_or_file(text: flags.FlagHolder[str | None], file: flags.FlagHolder[str | None]) -> str | None:
    """The value of a text flag, or the whole text of a path flag's file, `-` for stdin; None: neither is given.

    Raises:
      UserError: both, a file that cannot be read, or one that is not UTF-8.
    """
    if file.value is None:
        return text.value
    if text.value is not None:
        raise UserError(f"--{file.name} is given beside --{text.name}; leave one of them out")
    if file.value == "-" and sys.stdin is None:
        raise UserError(f"--{file.name}=-: the standard input is closed")
    try:
        found = sys.stdin.buffer.read() if file.value == "-" else Path(file.value).read_bytes()
        return found.decode()
    except OSError as error:
        raise UserError(f"--{file.name}={file.value}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--{file.name}={file.value}: is not UTF-8 text (byte {error.start})") from error


# ------------------------------------------------------------------------------------------------------- config and fields


def load_config(spec: str) -> configs.Config:
    """The `Config` that FILE's get_config(VARIANT) returns, for FILE[:VARIANT].

    Raises:
      UserError: no such file, a file that fails (with its line), no get_config in it, or one that returns something else.
    """
    path, _, variant = spec.partition(":")
    module = load_module(path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={path}: defines no get_config()")
    with _blaming(path):
        config = get_config(*([variant] if variant else []))
    if not isinstance(config, configs.Config):
        raise UserError(f"--config={path}: get_config() returned {type(config).__name__}, not mla.config.Config")
    configs.settle_paths(config)
    return config


def load_module(path: str) -> Any:
    """Runs a Python file and returns its module. Raises UserError as `load_config` does."""
    path = _locate(paths.expand(path, "--config"))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _blaming(path):
        spec.loader.exec_module(module)
    return module


def _locate(path: str) -> str:
    """A config file as it was given or, where that is not there, the one that comes with this package under that name.

    Raises:
      UserError: neither is there; names the nearest of both places.
    """
    shipped = paths.SHIPPED.parent / path  # shipped ones are called configs/...
    if os.path.isfile(path):
        return path
    if shipped.is_relative_to(paths.SHIPPED) and os.path.isfile(shipped):
        return str(shipped)
    known = {str(p): None for p in sorted(Path("configs").rglob("*.py"))}
    known |= {str(p.relative_to(paths.SHIPPED.parent)): None for p in sorted(paths.SHIPPED.rglob("*.py"))}
    places = " and in ".join(dict.fromkeys([os.getcwd(), str(paths.SHIPPED.parent)]))
    raise UserError(f"--config={path}: no such file; {nearest(path, known)} (looked in {places})")


@contextlib.contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Turns what a user's Python file raises into one line with the place in that file."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config={path}:{error.lineno}: SyntaxError: {error.msg}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(path)]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"--config={where}: {type(error).__name__}: {error}") from error


def check_field(config: Any, path: str, only: Sequence[str] = ()) -> None:
    """Refuses a path that is no overridable field of a dataclass tree.

    Raises:
      UserError: unknown field with the nearest match, a group of fields, a field of a field, or one outside `only`.
    """
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(["config", *parts[:depth]])
        if not configs.is_group(node):
            raise UserError(f"config.{path}: no such field; {here} is a {type(node).__name__} and has no fields")
        known = configs.members(node)
        if part not in known:
            raise UserError(f"config.{path}: no such field; {_suggestion(config, path, part, here, list(known))}")
        node = known[part]
    if configs.is_group(node):
        raise UserError(f"config.{path}: is a group of fields; set one of {', '.join(configs.members(node))}")
    if only and not any(path == free or path.startswith(f"{free}.") for free in only):
        listed = [f"config.{free}" if "." in free else f"config.{free}.*" for free in only]
        listed = [", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed
        raise UserError(f"config.{path}: is fixed by the trained model; {' and '.join(listed)} can be set here")


def _suggestion(config: Any, path: str, part: str, here: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(part, known, 1)
    if near:
        return f"did you mean {here}.{near[0]}?"
    everywhere = [known_path for known_path, _ in configs.leaves(config)]
    last = path.rpartition(".")[2]
    elsewhere = [p for p in everywhere if p.rpartition(".")[2] == last] or difflib.get_close_matches(path, everywhere, 1)
    if elsewhere:
        return f"did you mean config.{elsewhere[0]}?"
    return f"{here} has {', '.join(known)}"


def override(config: T, arguments: Sequence[str], only: Sequence[str] = ()) -> T:
    """A copy of a dataclass tree with `--config.path=value` arguments applied, the last one winning.

    Those that choose which fields there are (`CHOOSING`) are applied before all others, wherever they stand.

    Raises:
      UserError: what `check_field` refuses, or a value of the wrong type.
    """
    for argument in sorted(arguments, key=lambda argument: _path(argument) not in CHOOSING):
        name, given, text = argument.partition("=")
        path = _path(argument)
        check_field(config, path, only)
        if not given or not re.match(r"--?config\.", name):
            raise UserError(f"{name}: write --config.{path}=VALUE")
        config = _apply(config, path, text)
        if path == "init_from" or path.startswith("data."):
            configs.settle_paths(typing.cast(configs.Config, config))
    return config


def _path(argument: str) -> str:
    """The field that an override names, such as model.d_model."""
    return _OVERRIDE.sub("", argument.partition("=")[0], count=1)


def _apply(config: T, path: str, text: str) -> T:
    changed = copy.deepcopy(config)
    if path == "model.pattern":  # written as in a config file's variant: local=sliding_window*5,mha
        if not re.fullmatch(r"[\w=@*/+, -]+", text):
            raise UserError(f"config.{path}: {text!r} is no comma-separated list")
        model = typing.cast(configs.Config, changed).model
        model.pattern = configs.parse_pattern(text, "config.model.pattern")
        try:
            model.mechanism = configs.fitting_mechanisms(model)
        except UserError as error:  # which may not know where the name comes from
            raise UserError(f"config.model.pattern: {str(error).removeprefix('config.model.pattern: ')}") from error
        return changed
    group, name = configs.group_of(changed, path), path.rpartition(".")[2]
    hints = configs.type_hints(type(group))
    for field in dataclasses.fields(group):
        field.type = hints[field.name]  # config flags read it, and postponed annotations leave it as text
    values, argv = flags.FlagValues(), ["", f"--config.{name}={text}"]
    holder = config_flags.DEFINE_config_dataclass("config", group, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(f"config.{path}: {text!r} is no {_type_name(hints[name])}") from error
    setattr(group, name, getattr(holder.value, name))
    if path == "model.mlp":
        group.mlp_fields = configs.fitting_mlp(group)
    return changed


def _type_name(hint: Any) -> str:
    names = {int: "whole number", float: "number", bool: "truth value (true or false)", str: "text"}
    return names.get(hint, str(hint))


# ----------------------------------------------------------------------------------------------------------------- running


def run(
    main: Callable[[], int | None],
    config: ConfigFlag | None = None,
    argv: Sequence[str] | None = None,
    arguments: list[str] | None = None,
) -> NoReturn:
    """Parses a command line, by default that of this process, calls main and exits with the status it returns (None: 0).

    Args:
      main: the program; its module's docstring is its help.
      config: receives `--config.path=value` overrides.
      argv: the program's name and its arguments.
      arguments: receives the arguments that are no flags; None: the program takes none.
    """
    sys.unraisablehook = lambda _: None  # what threads and coroutines of a failed write say once nobody waits for them
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    with processes.ending():
        sys.exit(invoke(main, sys.argv if argv is None else argv, config, arguments))


def invoke(
    main: Callable[[], int | None],
    argv: Sequence[str],
    config: ConfigFlag | None = None,
    arguments: list[str] | None = None,
) -> int:
    """Parses a command line, calls main and returns the exit status: 1 after a UserError (one line), 130 after Ctrl-C."""
    quieten()
    _occupy_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal has no letter for is spelt out
    try:
        if any(argument in HELP for argument in argv[1:]):
            print(_help(main))
            return 0
        _parse(argv, config, arguments)
        return main() or 0
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read our output has gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK_ERRORS + PATH_ERRORS:
            raise
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:  # XLA's errors are RuntimeErrors of a class of jax
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0] or "Python could not allocate"
        return _refuse(f"not enough memory: {said} Lower the batch, the context or the size of the model.")


def _occupy_streams() -> None:
    """Has closed output streams lead nowhere, and no file take the number of a closed stream."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            if number:
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _refuse(message: str) -> int:
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 1


def _parse(argv: Sequence[str], config: ConfigFlag | None, arguments: list[str] | None) -> None:
    for argument in argv[1:]:
        _require_text(argument)
    overrides = [argument for argument in argv[1:] if _OVERRIDE.match(argument)]
    if overrides and config is None:
        raise UserError(f"{overrides[0]}: this command takes no config overrides")
    flags.FLAGS.unparse_flags()
    try:
        rest = flags.FLAGS([argv[0], *(argument for argument in argv[1:] if not _OVERRIDE.match(argument))])
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error)) from error
    except flags.Error as error:
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
        if missing:
            name = missing[1]
            help = str(flags.FLAGS[name].help).partition("\n")[0].partition(". ")[0]
            raise UserError(f"--{name} is missing: {help}") from error
        raise UserError(str(error)) from error
    quieten()  # again: parsing sets absl's verbosity
    if arguments is not None:
        arguments[:] = rest[1:]
    elif len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: everything is given as --flag=value")
    if config is not None:
        config.parse(overrides)


def _require_text(argument: str) -> None:
    """Refuses bytes that are no text: Python keeps them as lone surrogates, which no file of a run can hold."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        name, encoding = argument.partition("=")[0].encode(errors="replace").decode(), sys.getfilesystemencoding()
        why = "is not UTF-8 text" if encoding == "utf-8" else f"is not {encoding} text; set PYTHONUTF8=1"
        raise UserError(f"{name}: {why}") from error


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    name = error.flagname
    path = next((path for path, _ in configs.leaves(configs.Config()) if name in (path, path.rpartition(".")[2])), "")
    if path and "config" in flags.FLAGS:
        return f"--{name}: no such flag; did you mean --config.{path}?"
    own = [flag.name for flags_of in _own_flags().values() for flag in flags_of]
    near = difflib.get_close_matches(name, own, 1)
    hint = f"did you mean --{near[0]}?" if near else "known: " + ", ".join(f"--{flag}" for flag in own)
    return f"--{name}: no such flag; {hint}"


def _own_flags() -> dict[str, list[Any]]:
    """Flags of this program, without those of the libraries it uses."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return {module: found for module, found in by_module.items() if not re.match(r"(absl|grain|pytest|_pytest)\b", module)}


def _help(main: Callable[[], Any]) -> str:
    """The program's docstring and its flags."""
    parts = [(sys.modules[main.__module__].__doc__ or "").strip(), ""]
    for found in _own_flags().values():
        for flag in found:
            text = str(flag.help).replace("\n", "\n      ")
            parts.append(f"  --{flag.name}: {text}")
    return "\n".join(parts)


def quieten() -> None:
    """Leaves the terminal to the program's own lines: failures of libraries arrive as exceptions."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "asyncio", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
