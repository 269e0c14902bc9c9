"""Answers already given: exact, within a tenant, one generation for identical requests at the same time."""
