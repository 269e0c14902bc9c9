"""How dangerous a caller has shown to be: surprise in prompts, flags of the guard, breakers, and what they change."""
