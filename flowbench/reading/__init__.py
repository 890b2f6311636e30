"""One reader per kind of file: text, YAML, pictures, tensors. What is damaged or odd is refused, never guessed."""
