"""What only a machine without a GPU needs."""
