"""How fast a model is, how much memory it takes, and what it is made of."""
