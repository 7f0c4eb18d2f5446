"""The parts of the model: attention, transformer stacks, boundaries, shortening and upsampling."""
