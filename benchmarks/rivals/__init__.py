"""Expert compressors of others, written from their papers, each a pair of functions: to bytes, and from bytes alone.

They share nothing with retex's own offsets, so that a change there changes no rival's bytes. ``table.forms`` lists all.
"""
