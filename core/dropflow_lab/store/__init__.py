"""Finished measurements in a folder that any number of processes share."""
