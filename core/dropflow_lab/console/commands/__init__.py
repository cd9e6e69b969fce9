"""The commands of `dropflow`, one module each; the work is done by plain functions outside this package."""
