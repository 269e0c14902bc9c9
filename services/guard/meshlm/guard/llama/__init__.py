"""Llama Guard's protocol, over any model that a worker serves."""
