"""Shared code of the commands: configurations as flags, run directories, samples, one-line errors."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging as python_logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from experiments.common.pipes import quiet_pipes
from hourglass_jax import (
    CausalityError,
    HourglassConfig,
    HourglassLM,
    RuntimeConfig,
    UsageError,
    check_causality,
    load,
)
from hourglass_jax.causality import NotStrictlyCausal
from hourglass_jax.config import BY_LEVEL
from hourglass_jax.data.pipeline import Batch
from hourglass_jax.interop.hub import local_path
from hourglass_jax.memory import keep_freed_memory
from hourglass_jax.pretrained import pretrained_names, pretrained_path
from hourglass_jax.recipes import RECIPES
from hourglass_jax.run_config import MAX_SEED
from hourglass_jax.tokenizers import Tokenizer
from hourglass_jax.training.identity import first_batch_fingerprint
from hourglass_jax.training.metrics import peak_memory_bytes
from hourglass_jax.training.run import Run
from hourglass_jax.training.sharding import check_batch, make_mesh
from hourglass_jax.training.signals import Interrupted, Signals

FLAGS = flags.FLAGS
Config = TypeVar("Config")
PLUGIN = flags.DEFINE_multi_string(
    "plugin", [], "A Python file or module to import first, e.g. one that registers a shortening; may be repeated."
)
_aliases: dict[str, tuple[str, Callable[[str], Any]]] = {}
_started: list[Run] = []


def define_config(name: str, defaults: Any, *, without: tuple[str, ...] = ()) -> None:
    """Define flags --name.field=value for every field of a dataclass."""
    fields = {k: v for k, v in dataclasses.asdict(defaults).items() if k not in without}
    if isinstance(defaults, HourglassConfig):  # flags for several numbers
        fields |= {name: (fields[name],) for name in BY_LEVEL}
    help_text = f"{type(defaults).__name__} fields, as --{name}.FIELD"
    try:
        config_flags.DEFINE_config_dict(name, ConfigDict(fields), help_text)
    except AttributeError as error:  # the command line sets an unknown field
        fail(
            sys.argv[0],
            f"--{name}.{str(error).strip(chr(34) + chr(39))}: no such option; known: {', '.join(fields)}",
        )


def define_alias(alias: str, target: str, parse: Callable[[str], Any]) -> None:
    """Define a flag --alias=value for --target=parse(value). target: config.field, or several separated by commas."""
    _aliases[alias] = (target, parse)
    flags.DEFINE_string(alias, None, "short for " + " and ".join(f"--{t}" for t in target.split(",")))


def define_recipe(default: str, help_text: str) -> flags.FlagHolder[str]:
    """Define a flag --recipe that sets defaults of model and optimizer."""
    return flags.DEFINE_enum("recipe", default, list(RECIPES), help_text)


def define_seed(help_text: str) -> flags.FlagHolder[int]:
    """Define a flag --seed=N with the range of JAX's seeds."""
    return flags.DEFINE_integer("seed", 0, help_text, lower_bound=0, upper_bound=MAX_SEED)


def given_fields(name: str) -> dict[str, list[str]]:
    """Return the fields of a config that the command line gives, each with its flags."""
    targets = [(f"{name}.{field}", f"{name}.{field}") for field in FLAGS[name].value]
    targets += [(alias, target) for alias, (several, _) in _aliases.items() for target in several.split(",")]
    found: dict[str, list[str]] = {}
    for flag, target in targets:
        config, _, field = target.partition(".")
        if config == name and flag in FLAGS and FLAGS[flag].value is not None:
            found.setdefault(field, []).append(flag)
    return found


def read_config(name: str, cls: type[Config], recipe: Mapping[str, Any] = MappingProxyType({}), **given: Any) -> Config:
    """Return the dataclass of the flags and aliases; `recipe` replaces defaults.

    Raises UsageError for bad or contradicting values.
    """
    values = FLAGS[name].value.to_dict()
    from_flags = given_fields(name)
    values |= {field: value for field, value in recipe.items() if field not in from_flags}
    for field, names in from_flags.items():
        found = [values[field]] * (f"{name}.{field}" in names)
        found += [parse_flag(flag, FLAGS[flag].value, _aliases[flag][1]) for flag in names if flag in _aliases]
        if any(value != found[0] for value in found[1:]):
            raise UsageError(
                f"--{' and --'.join(names)} give different values of {name}.{field}; leave out all but one"
            )
        values[field] = found[0]
    return cls(**(values | given))


def parse_flag(flag: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--{flag}={text}: cannot be read as a value of this flag ({error})") from error


def check_taken(taken_by: Mapping[str, Collection[str]], mode: str) -> None:
    """Raise UsageError for a flag that does not apply to `mode`.

    taken_by: the modes of each flag that only some modes support, as written, e.g. '--suite=decoding'.
    """
    for option, modes in sorted(taken_by.items()):
        if option in FLAGS and FLAGS[option].present and mode not in modes:
            raise UsageError(f"--{option} is for {' and '.join(modes)}, not for {mode}; leave it out")


def import_plugin(plugin: str) -> None:
    """Import a file by its path or a module by its name. Raises UsageError if it does not exist."""
    path = Path(plugin)
    if path.suffix != ".py":
        missing = f"--plugin={plugin}: no such module; give a module's name or the path of a .py file"
        if not all(part.isidentifier() for part in plugin.split(".")):
            raise UsageError(missing)
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            if not f"{plugin}.".startswith(f"{error.name}."):  # a module that the plugin imports
                raise
            raise UsageError(missing) from error
        return
    if not path.is_file():
        raise UsageError(f"--plugin={plugin}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def next_command(script: str, *options: str) -> str:
    """Return the line that suggests the next command, with the same plugins."""
    plugins = [f"--plugin={plugin}" for plugin in PLUGIN.value]
    return f"next: {shlex.join(['python', f'experiments/{script}.py', *options, *plugins])}"


class PathParser(flags.ArgumentParser):
    """A path; expands `~`."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, default: str | None, help_text: str) -> flags.FlagHolder:
    """Define a flag for a path; expands `~/x`, which a shell does not do after `=`."""
    return flags.DEFINE(PathParser(), name, default, help_text, serializer=flags.ArgumentSerializer())


_local_path = cache(local_path)  # one download a process


class ModelFlags:
    """The flags --load_model_path (a directory, or hf:user/name on the Hub) and --pretrained (a shipped model)."""

    def __init__(self, default: str, help_text: str):
        self._path = define_path("load_model_path", default, help_text)
        self._name = flags.DEFINE_string("pretrained", None, "Name of a shipped model, instead of a directory.")

    @property
    def value(self) -> str:
        """The model's directory. Raises UsageError for both flags or an unknown name."""
        if self._name.value is None:
            return str(_local_path(self._path.value))
        if self._path.present:
            raise UsageError("--load_model_path and --pretrained are both given; leave out one of them")
        return str(pretrained_path(self._name.value))

    @property
    def given(self) -> str:
        """The directory or the name, for records."""
        return self._name.value or self._path.value

    def load(self) -> tuple[HourglassLM, Any, HourglassConfig]:
        """Return (model, tokenizer, config)."""
        return load_run(self.value)


def load_run(directory: str) -> tuple[HourglassLM, Any, HourglassConfig]:
    """Return (model, tokenizer, config) of a run. Raises UsageError if it has no tokenizer."""
    model, tokenizer, config = load(directory)
    if tokenizer is None:
        raise UsageError(f"{directory}: the run has no tokenizer; load it in Python with hg.load")
    return model, tokenizer, config


def load_origin(origin: str) -> tuple[HourglassLM, Any, dict[str, Any]]:
    """Return (model, tokenizer, settings) of a directory, also on the Hub, or of a shipped model if there is none."""
    shipped = origin in pretrained_names() and not Path(origin).exists()
    directory = str(pretrained_path(origin) if shipped else local_path(origin))
    model, tokenizer, _ = load_run(directory)
    return model, tokenizer, Run(directory).read().settings


def causality(model: HourglassLM) -> str:
    """Return whether the model is causal, in words. Raises CausalityError if it leaks."""
    if not model.config.causal:
        return "no, bidirectional"
    try:
        check_causality(model)
    except NotStrictlyCausal as error:
        logging.warning("%s", error)
        return "not strictly"
    return "yes"


def peak_memory() -> str:
    return f"peak memory {peak_memory_bytes() / 1e9:.1f} GB"


def checkpoints_to_keep(value: str) -> int:
    return 0 if value == "all" else int(value)


def define_runtime() -> None:
    """Define the flags of devices, checkpoints and resuming."""
    define_config("runtime", RuntimeConfig())
    for name in ("fsdp", "accumulate", "checkpoint_interval", "sample_interval"):
        define_alias(name, f"runtime.{name}", int)
    define_alias("keep_checkpoints", "runtime.keep_checkpoints", checkpoints_to_keep)
    for name in ("profile_steps", "log"):
        define_alias(name, f"runtime.{name}", str)
    flags.DEFINE_enum(
        "resume", "auto", ["auto", "never"], "auto: resume a run of the same settings; never: raise an error."
    )
    flags.DEFINE_boolean("overwrite", False, "Remove another run found in the output directory.")
    flags.DEFINE_string(
        "coordinator", None, "host:port of the first process; for several processes, with the next two flags."
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer(
        "process_id", None, "Index of this process, from 0; process 0 prints and writes.", lower_bound=0
    )


def define_allow_unknown() -> None:
    """Define the flag --allow_unknown."""
    flags.DEFINE_boolean("allow_unknown", False, "Accept a text with more than 10 % unknown characters.")


def read_runtime() -> RuntimeConfig:
    """Return the runtime's flags, and join the other processes, if any; must be called before any computation."""
    runtime = read_config("runtime", RuntimeConfig)
    processes = [FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")]
    if processes != [None] * 3:
        if None in processes or processes[2] >= processes[1]:
            raise UsageError(
                "several processes require --coordinator=host:port, --num_processes=N and --process_id below N"
            )
        jax.distributed.initialize(*processes)
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return runtime


def start_run(
    run: Run,
    config: HourglassConfig,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    runtime: RuntimeConfig,
    batch: Batch,
) -> None:
    """Start or resume `run`, whose first batch is `batch`.

    Raises UsageError if it cannot be started or resumed, and then leaves it unchanged.
    """
    tokens, _ = batch
    check_batch(make_mesh(runtime), len(tokens), runtime.accumulate)
    if jax.process_index() == 0:
        settings = {**settings, **first_batch_fingerprint(tokens)}
        run.start(config, tokenizer, settings, overwrite=FLAGS.overwrite, resume=FLAGS.resume == "auto")
        _started.append(run)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the run directory is ready")


def banned_tokens(tokenizer: Tokenizer, *, ends: bool = True) -> list[int]:
    """Return the tokens that a sample never contains: <UNK>, <BOS> and, unless it `ends` there, <EOS>."""
    special = (tokenizer.unk_id, tokenizer.bos_id, None if ends else tokenizer.eos_id)
    return [token for token in special if token is not None]


def run(main: Callable[[list[str]], None], *, positional: bool = False) -> None:
    """Run `main` as absl's app.run does.

    Bad input prints one line on stderr and exits with 2. A signal exits with 0 if the run is saved, else with 128 plus
    its number. A closed pipe exits with 141, without an error. positional: main accepts arguments besides flags.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return FLAGS(argv)
        except (flags.Error, TypeError, ValueError) as error:  # ml_collections raises the last two
            fail(argv[0], str(error))

    def guarded(argv: list[str]) -> None:
        for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot show must not end a run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        python_logging.getLogger("orbax").setLevel(python_logging.ERROR)
        logging.set_verbosity(logging.WARNING)
        keep_freed_memory()
        try:
            if len(argv) > 1 and not positional:
                raise UsageError(f"unexpected argument {argv[1]!r}; options are given as --name=value")
            for plugin in PLUGIN.value:
                import_plugin(plugin)
            main(argv)
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()  # waits for all processes: those that still compute need the first one
        except Interrupted as interruption:
            print(f"\n{interruption}; the same command resumes")
        except KeyboardInterrupt:
            with suppress(OSError):
                complain(argv[0], "interrupted")
                print(end="", flush=True)
            os._exit(130)  # a shell's code; at once, since a regular exit crashes while XLA computes
        except BrokenPipeError:  # for quiet_pipes
            raise
        except (UsageError, CausalityError, OSError) as error:
            fail(argv[0], str(error))

    for flag in FLAGS.get_key_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --help lists the flags defined here
    with quiet_pipes(_started):
        app.run(guarded, flags_parser=parse)


@contextmanager
def stopping() -> Iterator[Signals]:
    """Yield Signals for a command that cannot resume: a signal prints one line and exits with 128 plus its number."""
    with Signals() as signals:
        try:
            yield signals
        except Interrupted as interruption:
            assert signals.received is not None
            fail(sys.argv[0], str(interruption), code=128 + signals.received)


def complain(program: str, message: str) -> None:
    print(f"{Path(program).name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def fail(program: str, message: str, code: int = 2) -> None:
    complain(program, message)
    sys.exit(code)
