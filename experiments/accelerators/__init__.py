"""What a training step would cost on accelerators that are not at hand: compiled for them, and estimated.

targets    the machines, a text file each
program    a compiled program's text as instructions
work       what an instruction computes, reads, writes and sends
sources    which part of the model an instruction belongs to
roofline   seconds of each kernel, and their sum by source
step       a pretraining run's step, compiled for a target; its memory
advice     changes that make a step fit
report     all of it in words, as JSON, Markdown and a picture
"""
