"""Bytes -> array: images and tensors."""
