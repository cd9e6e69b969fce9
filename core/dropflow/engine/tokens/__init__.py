"""Which tokens are live, what each cache layer holds, and the resulting masks and positions."""
