"""How well a model predicts text, and how far it is from another."""
