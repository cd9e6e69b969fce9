"""Training the demo model from nothing."""
