"""From records to pictures and tables."""
