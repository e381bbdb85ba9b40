"""From a model and data to a verified store: plan, prepare, compute, certify."""
