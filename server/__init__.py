"""Who asks, when it runs, and what they get."""
