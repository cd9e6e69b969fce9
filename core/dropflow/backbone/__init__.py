"""What the author of an adapter reads: the parts of a model, its images, its work."""
