"""The HTTP API: handlers, with the structs they take and give beside them."""
