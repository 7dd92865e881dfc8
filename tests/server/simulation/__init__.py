"""The deterministic simulation: production code over an executor that computes from its pages."""
