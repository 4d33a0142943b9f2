"""How each engine is asked for the token it finds likeliest after every token of a window, in its own environment."""
