"""One pass through the vision encoder."""
