"""The float64 oracle: random models of every family, and an independent forward pass to
compare the engine with.
"""
