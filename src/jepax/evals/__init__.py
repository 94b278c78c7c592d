"""Evaluation of frozen encoders: linear probe, nearest neighbours, floors and signs of collapse."""
