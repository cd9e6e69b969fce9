"""The commands of `dropflow`, one module each; what they do lies in plain functions outside this package."""
