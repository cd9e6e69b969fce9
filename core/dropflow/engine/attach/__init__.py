"""Attaching policies: the model's hooks, the state of a call, and refusals."""
