"""HTTP: the application, its routes and guards, and how errors look to a client."""
