"""The web page to try a model on, served by the gateway."""
