"""Commands that train, evaluate and measure the library's models."""
