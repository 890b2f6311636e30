"""What records say beyond a table: over-optimisation, what judges are worth, and the flagship's published claims."""
