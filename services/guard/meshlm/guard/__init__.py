"""Verdicts on prompts and on token streams, by rules: signatures, secrets, personal data."""
