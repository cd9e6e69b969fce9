"""The interface for plug-in authors: stages, the hooks they implement, and the payloads and decisions of hooks."""
