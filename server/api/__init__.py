"""HTTP: the routes and their words."""
