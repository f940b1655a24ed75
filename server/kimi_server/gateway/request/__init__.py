"""The client's side of a request: connection, header, body, and what the body asks for."""
