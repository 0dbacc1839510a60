"""Memory as a plan: what lies where, phase by phase, before a byte of weights is read."""
