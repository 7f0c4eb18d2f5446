"""What a training step would cost on accelerators that are not at hand: compiled for them, and estimated.

targets    the machines, a text file each
step       a pretraining run's own step, compiled for a target, and its memory
program    a compiled program's text as instructions
loops      how often its loops run
work       what an instruction computes, reads, writes and sends
sources    which part of the model an instruction belongs to
roofline   seconds of each kernel, and their sums by source
advice     changes that make a step fit
report     a step in figures and words; pages: many of them, with a picture
paper      the paper's main models, as commands of experiments/compile.py
"""
