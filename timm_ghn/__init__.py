"""Predicted parameters for every architecture in timm."""
