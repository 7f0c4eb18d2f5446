"""How often a loop of a compiled program runs."""

from __future__ import annotations

import re

from experiments.accelerators.program import Computation, Instruction, Program

STATED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
RENAMES = {"bitcast", "copy"}


def trips(program: Program, loop: Instruction, computation: Computation) -> int | None:
    """Of a loop in `computation`: as XLA states it, or by its counter, which is all that a TPU's program has.

    None where it can be told from neither.
    """
    if stated := STATED.search(loop.attributes):
        return int(stated.group(1))
    [condition], [body] = (map(program.computations.__getitem__, loop.called(key)) for key in ("condition", "body"))
    test, before, after = root(condition), origin(computation, loop.operands[0]), root(body)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, end = test.operands
    place = re.search(r"\bindex=(\d+)", origin(condition, counter).attributes)
    if place is None or before.opcode != "tuple" or after.opcode != "tuple":
        return None
    index = int(place.group(1))
    start, limit = number(computation, before.operands[index]), number(condition, end)
    step = origin(body, after.operands[index])
    by_one = step.opcode == "add" and number(body, step.operands[1]) == 1
    return limit - start if by_one and start is not None and limit is not None else None


def root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.is_root)


def origin(computation: Computation, name: str) -> Instruction:
    """What an instruction is a copy of."""
    instruction = computation[name]
    while instruction.opcode in RENAMES:
        instruction = computation[instruction.operands[0]]
    return instruction


def number(computation: Computation, name: str) -> int | None:
    """A constant's value."""
    instruction = origin(computation, name)
    is_number = instruction.opcode == "constant" and instruction.arguments.isdecimal()
    return int(instruction.arguments) if is_number else None
