"""How a policy acts on an unmodified model; nobody outside of `dropflow` imports it."""
