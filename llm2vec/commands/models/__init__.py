"""Commands over one model: fetch it, export it, verify it, read what its anchors tell."""
