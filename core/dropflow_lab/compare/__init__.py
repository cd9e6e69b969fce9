"""Policies under the same rules: what they answer, what they keep, what they cost, and what they save."""
