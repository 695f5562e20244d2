"""Sparse autoencoders: one file per architecture, one trainer, one exported format."""
