"""The demo model, its processor, and the shipped checkpoints."""
