"""Offsets: what a merged checkpoint lacks to be an expert again, in a given number of bytes.

``fit`` turns the difference of an expert and the merged checkpoint into bytes; ``predict`` turns the bytes back into
offsets for a task embedding. Everything here is tensors and bytes in, tensors and bytes out.
"""
