"""What the commands of ``codd`` do, where it takes more than a few lines."""
