"""The interface for adapter authors: the parts of a model, the layout of its images, and its FLOPs."""
