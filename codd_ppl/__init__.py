"""Coupled discrete diffusion: language models that draw tokens jointly, as a probabilistic program."""
