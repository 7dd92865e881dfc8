"""Numbers with their conditions: every table ends in one JSON line."""
