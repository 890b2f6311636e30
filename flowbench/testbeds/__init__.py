"""Worlds with a known truth, as pure mathematics and pixels."""
