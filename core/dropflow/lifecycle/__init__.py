"""What the author of a plug-in reads: stages, the hooks they implement, what hooks get and what they answer."""
