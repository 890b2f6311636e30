"""Rewards in processes of their own, each with the packages that it wants."""
