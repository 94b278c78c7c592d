"""`jepax bench` and `jepax bench-data`: how fast a recipe's step and its input are on this machine."""
