"""What the launchers share: configurations as flags, one-line errors."""

from __future__ import annotations

import dataclasses
import json
import logging as python_logging
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from hourglass_jax.errors import UsageError
from hourglass_jax.training.checkpoints import CONFIG, read_run

FLAGS = flags.FLAGS
Config = TypeVar("Config")
N_PIECES, PIECE = 64, 65_536  # of a long text's fingerprint; PIECE in tokens
_aliases: dict[str, tuple[str, Callable[[str], Any]]] = {}


def define_config(name: str, defaults: Any, *, without: tuple[str, ...] = ()) -> None:
    """Flags --name.field=value for every field of a dataclass."""
    fields = {k: v for k, v in dataclasses.asdict(defaults).items() if k not in without}
    help_text = f"{type(defaults).__name__} fields, as --{name}.FIELD"
    try:
        config_flags.DEFINE_config_dict(name, ConfigDict(fields), help_text)
    except AttributeError as error:  # an override on the command line names no field
        fail(
            sys.argv[0],
            f"--{name}.{str(error).strip(chr(34) + chr(39))}: no such option; known: {', '.join(fields)}",
        )


def define_alias(alias: str, target: str, parse: Callable[[str], Any]) -> None:
    """Flag --alias=value for --target=parse(value); `target` is config.field, several separated by commas."""
    _aliases[alias] = (target, parse)
    flags.DEFINE_string(alias, None, "short for " + " and ".join(f"--{t}" for t in target.split(",")))


def boolean(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{value!r} is neither true nor false")
    return value.lower() in ("true", "1")


def read_config(name: str, cls: type[Config], **given: Any) -> Config:
    """The dataclass from its flags and aliases; raises UsageError as its constructor does."""
    values = FLAGS[name].value.to_dict()
    for alias, (targets, parse) in _aliases.items():
        text = FLAGS[alias].value
        for target in targets.split(","):
            config, _, field = target.partition(".")
            if text is not None and config == name:
                values[field] = parse_flag(alias, text, parse)
    return cls(**(values | given))


def parse_flag(flag: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--{flag}={text}: cannot be read as a value of this flag ({error})") from error


def prepare_directory(directory: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Lets a run start or go on in `directory`, or raises UsageError; nothing is written.

    A run with the same settings goes on; another one is refused, or removed with `overwrite`.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or not (directory / CONFIG).is_file():
        raise UsageError(f"{directory}: exists and is not a run of this library; choose another output directory")
    if overwrite:
        shutil.rmtree(directory)
        return
    found = read_run(directory)[2]
    asked = json.loads(json.dumps(settings))
    if found != asked:
        different = ", ".join(difference(found, asked))
        raise UsageError(
            f"{directory}: holds a run with another configuration ({different}); choose another directory, "
            "or pass --overwrite to remove it"
        )


def fingerprint(tokens: np.ndarray) -> int:
    """Tells two texts, or one text in two vocabularies, apart in a run's settings, whatever the integer type.

    Of a long text, only its length and evenly spaced pieces with both ends count: 100 GB take no time.
    """
    tokens = tokens.reshape(-1)
    crc, starts, length = 0, [0], len(tokens)
    if len(tokens) > N_PIECES * PIECE:
        crc, length = zlib.crc32(str(len(tokens)).encode()), PIECE
        starts = [i * (len(tokens) - PIECE) // (N_PIECES - 1) for i in range(N_PIECES)]
    for start in starts:
        crc = zlib.crc32(np.ascontiguousarray(tokens[start : start + length], np.int32), crc)
    return crc


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as 'a.b: 1 -> 2'."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def run(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with bad input reported in one line on stderr and exit code 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return FLAGS(argv)
        except (flags.Error, TypeError, ValueError) as error:  # ml_collections lets Python's own through
            fail(argv[0], str(error))

    def guarded(argv: list[str]) -> None:
        python_logging.getLogger("orbax").setLevel(python_logging.ERROR)
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise UsageError(f"unexpected argument {argv[1]!r}; options are given as --name=value")
            main(argv)
        except (UsageError, OSError) as error:
            fail(argv[0], str(error))

    app.run(guarded, flags_parser=parse)


def fail(program: str, message: str) -> None:
    print(f"{Path(program).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
