"""What the guard says of the input, and how far it lets the answer go."""
