"""Published ways to find the task of an input, written from their papers; ``table.identifiers`` lists all.

They share nothing with retex's own signatures. Features come as float32 [n, layers, width], pooled over positions.
"""
