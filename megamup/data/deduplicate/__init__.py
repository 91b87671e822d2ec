"""Documents without their duplicates, as JSON lines."""
