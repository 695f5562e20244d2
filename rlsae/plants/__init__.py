"""Activations whose every change is known, and how well the comparison finds what was planted."""
