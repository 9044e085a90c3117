"""Layers by hand, forward and backward: what transformers' and PyTorch's own cost too much for.

`speed_up.py` puts them on a model that they cover; all else of the engine runs with or without them.
"""
