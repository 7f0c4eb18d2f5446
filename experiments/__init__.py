"""Launchers of the library's experiments."""
