"""Densities in the plane with exact velocity and optimum."""
