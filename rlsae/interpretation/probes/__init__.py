"""Probes: is the reward of a word, or which response was preferred, a linear function of the latents?"""
