"""Measurements behind the claims of speed and memory: `python -m lab.bench [SUBJECT ...]`."""
