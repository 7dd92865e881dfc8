"""What the network is: its shape, its weights, its cache and its words."""
