"""`jepax bench` and `jepax bench-data`: the speed of a recipe's step and of its input on this machine."""
