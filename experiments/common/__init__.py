"""What the launchers share: flags, run directories, sources of data, pictures, reports."""
