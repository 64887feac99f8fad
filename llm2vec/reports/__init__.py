"""Tables, figures and pages over results."""
