"""Weights: what reads, writes and fetches them, one format a file.

Nothing is imported here, so that looking a name up in the catalogue loads no torch.
"""
