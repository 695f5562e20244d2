"""What latents mean: where they fire, and explanations scored on documents that they were not drawn from."""
