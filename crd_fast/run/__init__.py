"""What a run shows and leaves behind: log, progress, warnings, report."""
