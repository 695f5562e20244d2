"""Comparison of the dictionaries of base and tuned, latent by latent."""
