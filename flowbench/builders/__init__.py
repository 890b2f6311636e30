"""Trains the embedded models from nothing: `flowbench testbed build`."""
