"""Pure functions on tensors: one operation, one file, each with a torch twin that proves it."""
