"""From a model's outputs to labels. Nothing is imported here: the CRF's worker processes must start without torch."""
