"""The text of a compiled program, as XLA prints it, read into instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) .*\{$")
MEMORY_SPACE = re.compile(r"S\((\d+)\)")
NAMES = re.compile(r"%([\w.-]+)")
LINES_INSIDE = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)  # all else of an instruction stands in one line
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Array(NamedTuple):
    """One array of an instruction's result. `on_chip`: in a TPU's vector memory, not in that of the device."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes a number: its bits stand in its type's name, as in bf16."""
        bits = re.search(r"\d+", self.dtype)
        return int(bits.group()) / 8 if bits else float(self.dtype == "pred")

    @property
    def nbytes(self) -> float:
        return self.size * self.itemsize


@dataclass
class Instruction:
    """name = type opcode(operands), attributes; `arguments` as they are written, where they name no instructions."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool
    operands: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = NAMES.findall(self.arguments)

    @cached_property
    def arrays(self) -> list[Array]:
        """Of its result, one or those of a tuple."""
        return [
            Array(dtype, tuple(int(n) for n in sizes.split(",") if n), _on_chip(layout))
            for dtype, sizes, layout in ARRAY.findall(self.type)
        ]

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def nbytes(self) -> float:
        return sum(array.nbytes for array in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """The computations it names as one of `keys`, e.g. calls or body."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:%([\w.-]+)|\{{([^}}]*)\}})", self.attributes)
        return [name for one, several in found for name in ([one] if one else NAMES.findall(several))]

    def numbers(self, key: str) -> list[int]:
        """The whole numbers of key={...}."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found.group(1).split(",") if n] if found else []

    def text(self, key: str) -> str:
        """What stands in quotes after key=, empty where nothing does."""
        found = re.search(rf'\b{key}="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


def _on_chip(layout: str) -> bool:
    space = MEMORY_SPACE.search(layout)
    return space is not None and int(space.group(1)) in (1, 2, 3, 4, 6)  # 5 is the host's


Computation = dict[str, Instruction]


class Frame(NamedTuple):
    """Where in the source an instruction was traced."""

    file: str
    function: str


class Program:
    """Computations by name, the first to run as `entry`, and the source lines that instructions come from."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = {name: {} for name in TABLES}
        self._read(LINES_INSIDE.sub("", text).splitlines())

    def _read(self, lines: Sequence[str]) -> None:
        table: dict[int, str] | None = None
        computation: Computation | None = None
        for line in lines:
            if computation is not None and line.startswith("}"):
                computation = None
            elif computation is not None:
                if found := INSTRUCTION.match(line):
                    root, name, kind, opcode, arguments, attributes = found.groups()
                    computation[name] = Instruction(name, kind, opcode, arguments, attributes, bool(root))
            elif found := COMPUTATION.match(line):
                computation = self.computations[found.group(2)] = {}
                if found.group(1):
                    self.entry = found.group(2)
            elif line in self._tables:
                table = self._tables[line]
            elif table is not None and (found := re.match(r"(\d+) (.*)", line)):
                table[int(found.group(1))] = found.group(2)

    def frames(self, instruction: Instruction) -> list[Frame]:
        """The calls that led to an instruction, innermost first; none where XLA made it."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        number, frames = int(found.group(1)) if found else 0, []
        while number:
            frame = self._entry("StackFrames", number)
            location = self._entry("FileLocations", frame.get("file_location_id", 0))
            names = (("FileNames", "file_name_id"), ("FunctionNames", "function_name_id"))
            frames.append(Frame(*(self._tables[t].get(location.get(key, 0), "").strip('"') for t, key in names)))
            parent = frame.get("parent_frame_id", 1) - 1  # they count from 1, so that 1 is no frame
            number = parent if parent < number else 0
        return frames

    def _entry(self, table: str, number: int) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", self._tables[table].get(number, ""))}
