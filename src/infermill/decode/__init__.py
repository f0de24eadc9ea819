"""Bytes -> array: images."""
