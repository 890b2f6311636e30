"""`flowbench tune`: the same search for every algorithm, selected on `dev`, with everything that it tried on disk."""
