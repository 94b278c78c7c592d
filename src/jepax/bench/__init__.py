"""`jepax bench`: how fast a recipe's step is on this machine, where its time goes, and how far from the peak it is."""
