"""Experts switched inside a loaded model."""
