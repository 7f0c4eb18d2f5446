"""What one instruction of a compiled program computes, moves in memory, and sends to other chips."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cached_property, lru_cache

from experiments.accelerators.program import Array, Computation, Instruction, Program

RATES = {"f32": "float32", "f64": "float64"}  # of products by their operands' type; all others have bfloat16's
QUOTE = r'(?:\\?"|\\22)'  # also as it is escaped inside a string
STATED = re.compile(f"{QUOTE}flops{QUOTE}: *{QUOTE}?(\\d+)")  # by a Pallas kernel
FUSED_ATTENTION = "attention"  # products inside a flash kernel, which reach less of the machine's rate
SLICES = {"slice", "dynamic-slice", "gather"}
WHOLE = {"broadcast", "dot", "convolution", "scatter", "sort", "fusion", "custom-call", "reduce-window"}
MOVED = {"copy-start": 0, "slice-start": 1}  # which of the arrays in their results is the copy
RENAMES = {"bitcast", "convert", "copy", "reshape"}
# What a chip sends of its operand in a group of n, by rings.
SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
NO_WORK = {  # custom calls that only say something to the compiler
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}


def collective(instruction: Instruction) -> str | None:
    """The kind of collective it is or starts."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in SENT else None


class Work:
    """Counts of a program's instructions. `n_devices` are those that run it together."""

    def __init__(self, program: Program, n_devices: int = 1):
        self.program, self.n_devices = program, n_devices
        self._flops: dict[str, Counter[str]] = {}
        self._uses: dict[str, Uses] = {}

    def flops(self, instruction: Instruction, computation: Computation) -> Counter[str]:
        """Floating-point operations of matrix products, by the type that sets their rate."""
        if instruction.opcode == "dot":
            left = computation[instruction.operands[0]].arrays[0]
            contracted = math.prod(left.shape[axis] for axis in instruction.numbers("lhs_contracting_dims"))
            return Counter({rate_of(left): 2 * instruction.size * contracted})
        if instruction.opcode == "convolution":
            left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
            return Counter({rate_of(left): 2 * convolution_pairs(instruction, left.shape, right.shape)})
        if instruction.opcode == "custom-call":
            return kernel_flops(instruction, computation)
        total: Counter[str] = Counter()
        for name in instruction.called("calls", "to_apply") if instruction.opcode in ("fusion", "call", "map") else ():
            total += self.computation_flops(name)
        return total

    def computation_flops(self, name: str) -> Counter[str]:
        if name not in self._flops:
            computation = self.program.computations[name]
            parts = (self.flops(instruction, computation) for instruction in computation.values())
            self._flops[name] = sum(parts, Counter())
        return self._flops[name]

    def memory_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """Read from and written to the device's memory, each array once.

        Of what a fusion only slices or gathers from, the slices count; of what it updates in place, the update.
        """
        operands = [computation[name] for name in instruction.operands if name in computation]
        if instruction.opcode in MOVED:  # read at one end and written at the other
            moved, source = instruction.arrays[MOVED[instruction.opcode]], operands[0].arrays[0]
            return moved.nbytes * [moved.on_chip, source.on_chip].count(False)
        if instruction.opcode == "fusion":
            [name] = instruction.called("calls")
            if name not in self._uses:
                self._uses[name] = Uses(self.program.computations[name])
            uses = self._uses[name]
            read = sum(in_memory(operand) * uses.read(i) for i, operand in enumerate(operands))
            return read + in_memory(instruction) * uses.written
        if instruction.opcode in SLICES:
            return in_memory(instruction) * (2 if in_memory(operands[0]) else 1)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * in_memory(operands[1])
        return in_memory(instruction) + sum(map(in_memory, operands))

    def link_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """What a chip sends to others, in this instruction or inside its fusion."""
        if kind := collective(instruction):
            operands = (computation[name].nbytes for name in instruction.operands if name in computation)
            return sum(operands) * SENT[kind](group_size(instruction, self.n_devices))
        if instruction.opcode != "fusion":
            return 0.0
        inner = (self.program.computations[name] for name in instruction.called("calls"))
        return sum(self.link_bytes(each, body) for body in inner for each in body.values())


def rate_of(array: Array) -> str:
    return RATES.get(array.dtype, "bfloat16")


def in_memory(instruction: Instruction) -> float:
    """Bytes of its arrays that lie in the device's memory."""
    return sum(array.nbytes for array in instruction.arrays if not array.on_chip)


class Uses:
    """How much of its operands and of its result a fusion touches, as shares of their sizes."""

    def __init__(self, computation: Computation):
        self.computation = computation
        self.users: dict[str, list[Instruction]] = {name: [] for name in computation}
        for instruction in computation.values():
            for name in instruction.operands:
                if name in computation:
                    self.users[name].append(instruction)
        self.parameters = {int(i.arguments): i for i in computation.values() if i.opcode == "parameter"}
        [root] = (i for i in computation.values() if i.is_root)
        self.results = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
        self.in_place = {update.name: update for update in map(self.updated, self.results) if update is not None}
        self.needed = lru_cache(None)(self._needed)

    def renamed(self, instruction: Instruction) -> Instruction:
        """What it only gives another name, type or shape to."""
        while instruction.opcode in RENAMES and instruction.operands:
            instruction = self.computation[instruction.operands[0]]
        return instruction

    def updated(self, result: Instruction) -> Instruction | None:
        """The update that `result` is, where it is made in the buffer of an operand."""
        update = self.renamed(result)
        if update.opcode != "dynamic-update-slice":
            return None
        target = self.renamed(self.computation[update.operands[0]])
        return update if target.opcode == "parameter" else None

    @cached_property
    def written(self) -> float:
        total = sum(result.size for result in self.results)
        updates = [(result, self.updated(result)) for result in self.results]
        sizes = [self.computation[u.operands[1]].size if u is not None else r.size for r, u in updates]
        return sum(sizes) / max(total, 1)

    def read(self, index: int) -> float:
        """The share of operand `index`."""
        parameter = self.parameters[index]
        return self.needed(parameter.name) / max(parameter.size, 1)

    def _needed(self, name: str) -> float:
        """How many of its numbers are used."""
        instruction = self.computation[name]
        if any(instruction is result for result in self.results) and instruction.opcode != "parameter":
            return instruction.size
        return min(instruction.size, sum(self.taken(user, instruction) for user in self.users[name]))

    def taken(self, user: Instruction, operand: Instruction) -> float:
        """How many of the operand's numbers `user` takes."""
        first = user.operands[0] == operand.name
        if user.opcode == "tuple":
            return 0  # of results, which were counted
        if user.opcode in SLICES and first:
            return self.needed(user.name)
        if user.opcode == "dynamic-update-slice" and first and user.name in self.in_place:
            return 0
        share = self.needed(user.name) / max(user.size, 1)
        return operand.size * (float(share > 0) if user.opcode in WHOLE or user.opcode in SLICES else share)


def convolution_pairs(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Multiplications of a convolution, as which a TPU's compiler writes products; those with padding left out."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    assert labels is not None, instruction.name
    of_left, of_right, of_result = labels.groups()
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}

    def values(key: str, default: str, n: int) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * n

    result = instruction.arrays[0].shape
    n = sum(label.isdigit() for label in of_result)
    pairs = result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")]
    steps = [values(key, "1", n) for key in ("stride", "lhs_dilate", "rhs_dilate")]
    for axis, stride, left_step, right_step, pad in zip(range(n), *steps, values("pad", "0_0", n), strict=True):
        label = str(axis)
        sizes = (left[of_left.index(label)], right[of_right.index(label)], result[of_result.index(label)])
        pairs *= window_pairs(*sizes, int(stride), int(left_step), int(right_step), int(pad.split("_")[0]))
    return pairs


@lru_cache(None)
def window_pairs(
    inputs: int, kernel: int, outputs: int, stride: int, input_step: int, kernel_step: int, padding: int
) -> int:
    """Pairs of an output and a kernel position, along one axis, that meet an input."""
    if kernel == 1 and padding == 0:
        return sum(1 for o in range(outputs) if o * stride % input_step == 0 and o * stride < inputs * input_step)
    places = (o * stride + k * kernel_step - padding for o in range(outputs) for k in range(kernel))
    return sum(1 for place in places if 0 <= place <= (inputs - 1) * input_step and place % input_step == 0)


def kernel_flops(instruction: Instruction, computation: Computation) -> Counter[str]:
    """Of a library's product, of cuDNN's attention, or of a Pallas kernel that states them."""
    target = instruction.text("custom_call_target")
    operands = [computation[name].arrays for name in instruction.operands if name in computation]
    if "fmha" in target:
        return Counter({FUSED_ATTENTION: fused_attention_flops(instruction, operands)})
    if "gemm" in target or "matmul" in target:
        left = operands[0][0]
        axes = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.attributes)
        contracted = left.shape[int(axes.group(1)) if axes else -1]
        return Counter({rate_of(left): 2 * instruction.arrays[0].size * contracted})
    stated = STATED.search(instruction.attributes)
    return Counter({FUSED_ATTENTION: int(stated.group(1))} if stated else {})


def fused_attention_flops(instruction: Instruction, operands: list[list[Array]]) -> float:
    """Two products forward and five backward, over the pairs that the causal mask and the window leave."""
    sizes = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    assert sizes is not None, instruction.name
    batch, heads, queries, keys = (int(n) for n in re.findall(r"\d+", sizes.group(1)))
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', instruction.attributes)
    width = (int(window.group(1)) if window else 0) or keys
    pairs = float(queries * keys)
    if "CAUSAL" in instruction.attributes:
        pairs = sum(min(i, width) for i in range(1, queries + 1))
    of_keys, of_values = operands[1][0].shape[-1], operands[2][0].shape[-1]
    backward = "Backward" in instruction.text("custom_call_target")
    return 2 * batch * heads * pairs * (3 * of_keys + 2 * of_values if backward else of_keys + of_values)


def group_size(instruction: Instruction, n_devices: int) -> int:
    """How many chips take part in a collective together, however the text writes them."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found.group(1).split(","))
    return n_devices
