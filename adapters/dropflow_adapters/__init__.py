"""Backbone adapters: one model family per file, found through entry points named after the config's `model_type`."""
