"""Labels from model outputs. This module imports nothing, so that the CRF's worker processes start without torch."""
