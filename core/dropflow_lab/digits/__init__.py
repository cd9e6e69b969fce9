"""The embedded demo model: a small LLaVA that answers questions about pictures of handwritten digits."""
