"""Comparison of policies under the same rules: answers, tokens kept, cost and savings."""
