"""Commands that show that the library holds what it promises, and that draw its pictures."""
