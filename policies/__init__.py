"""Trained models turned into actions."""
