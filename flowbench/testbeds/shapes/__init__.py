"""The world of shapes: a renderer, an oracle, and the small models that are trained on it."""
