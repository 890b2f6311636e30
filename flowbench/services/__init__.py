"""A reward over HTTP, and parity with the packages that define rewards."""
