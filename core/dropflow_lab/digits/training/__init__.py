"""Training the demo model from scratch."""
