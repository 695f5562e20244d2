"""Tunings: turn a base model into a tuned one, with its training history and an evaluation on held-out prompts."""
