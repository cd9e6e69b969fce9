"""How a policy acts on an unmodified model; nothing outside `dropflow` imports it."""
