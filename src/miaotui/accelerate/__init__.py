"""The search for the fastest recipe within a quality floor, and the card that proves what it found."""
