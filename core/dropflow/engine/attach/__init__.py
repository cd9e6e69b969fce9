"""Attaching: the model's hooks, the call, and what is refused."""
