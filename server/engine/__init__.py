"""When it runs: requests, pages, steps."""
