"""Files that the demo copies into a checkpoint to stand for its remote code; nothing here is imported by us."""
