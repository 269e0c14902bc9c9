"""Texts for the prompt-entropy study: ordinary ones of many kinds, and what attackers put into prompts."""
