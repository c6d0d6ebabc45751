"""Labels from model outputs."""
