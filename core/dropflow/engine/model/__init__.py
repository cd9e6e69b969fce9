"""How the engine reaches the parts of an unmodified model."""
