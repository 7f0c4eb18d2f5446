"""Shared code of the commands: flags, run directories, data sources, pictures, reports."""
