"""Which part of the model a kernel belongs to, by the calls that led to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.accelerators.program import Computation, Frame, Instruction, Program

COLLECTIVES, OTHER = "collectives", "other"
RESAMPLING = "resampling"
# Parts of file names, or beginnings of functions' names, that a part of the model is known by.
SOURCES: dict[str, tuple[str, ...]] = {
    "attention": ("/nn/attention", "Attention."),
    "feed-forward": ("FeedForward.",),
    RESAMPLING: (
        "/nn/resampling.py",
        "/nn/groups.py",
        "/nn/boundaries.py",
        "/nn/learned.py",
        "to_groups",
        "Hourglass.add_upsampled",
    ),
    "norms": ("/nn/normalization.py", "LayerNorm."),
    "residuals and stacks": ("/nn/transformer.py", "Hourglass."),
    "embedding": ("HourglassLM.embed",),
    "loss": ("HourglassLM.logits", "/hourglass_jax/evaluation.py", "/optax/losses/"),
    "optimiser": ("/optax/", "/training/step.py", "/training/optimizer.py"),
}
NAMES = (*SOURCES, COLLECTIVES, OTHER)


def claims(source: str, frame: Frame) -> bool:
    return any(frame.function.startswith(mark) or mark in frame.file for mark in SOURCES[source])


def of_frames(frames: Sequence[Frame]) -> str:
    """The source of the innermost call that has one; all that resampling calls is resampling, attention too."""
    if any(claims(RESAMPLING, frame) for frame in frames):
        return RESAMPLING
    return next((source for frame in frames for source in SOURCES if claims(source, frame)), OTHER)


def source_of(program: Program, instruction: Instruction, computation: Computation) -> str:
    """Of a kernel: of the product in it, or its own, or of the largest thing in it; a copy's is what is copied."""
    inner = list(_inside(program, instruction))
    products = [each for each in inner if each.opcode in ("dot", "convolution")]
    by_size = sorted(inner, key=lambda each: -each.size)
    copied = [computation[name] for name in instruction.operands[:1] if instruction.opcode.startswith("copy")]
    for candidate in (*sorted(products, key=lambda each: -each.size), instruction, *by_size, *copied):
        frames = program.frames(candidate)
        if frames and (source := of_frames(frames)) != OTHER:
            return source
    return OTHER


def _inside(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    if instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            for each in program.computations[name].values():
                yield each
                yield from _inside(program, each)


def is_recomputed(program: Program, instruction: Instruction) -> bool:
    """Whether the backward pass computes it again, to save memory."""
    everything = (instruction, *_inside(program, instruction))
    return any("rematted_computation" in each.text("op_name") for each in everything)
