"""Loops over elements: a template per family and device, bound to each loss's own scalar function."""
