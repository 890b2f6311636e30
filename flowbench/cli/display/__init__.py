"""What the command line prints; the only place that knows rich."""
