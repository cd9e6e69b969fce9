"""One pass through the text decoder."""
