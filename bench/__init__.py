"""Measurements, kept as data in bench/results and drawn from there."""
