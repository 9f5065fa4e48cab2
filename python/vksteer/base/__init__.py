"""What every other module may use: checks of arguments, files, progress, provenance, types."""
