"""Which tokens are live, what each cache layer holds, and what follows for masks and positions."""
