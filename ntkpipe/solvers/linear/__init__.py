"""Regularised linear systems (K + λI) X = Y."""
