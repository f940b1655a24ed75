"""The gateway's YAML files: reading, field types, settings."""
