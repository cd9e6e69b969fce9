"""How the parts of an unmodified model are reached."""
