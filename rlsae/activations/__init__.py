"""Activations: the tokens of a corpus, and what each layer of a policy makes of them, in Zarr stores."""
