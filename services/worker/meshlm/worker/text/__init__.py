"""Text to tokens and back. No torch: the front process lives here."""
