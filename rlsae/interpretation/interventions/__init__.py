"""Change what latents write while a model generates, and see what becomes of the behaviour."""
