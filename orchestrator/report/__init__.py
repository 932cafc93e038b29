"""Tables, figures and the live view."""
