"""What every other module may use: checks of arguments, JSON and whole files,
progress, provenance.
"""
