"""How time, memory, FLOPs and intervals are measured."""
