"""The parts of the model: attention, transformer stacks, shortening and upsampling."""
