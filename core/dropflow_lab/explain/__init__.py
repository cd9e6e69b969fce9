"""Forecasts of a policy's cost, lists of what is installed, and one question answered without and with a policy."""
