"""Files on disk: atomic writing, PNG settings, the Hub, units, untrusted text."""
