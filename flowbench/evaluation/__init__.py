"""The evaluation protocol, its metrics and their statistics."""
