"""The built-in components, registered through entry points exactly as an outsider's would be."""
