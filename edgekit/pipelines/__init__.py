"""What the commands do: each file is a pipeline to be read from top to bottom."""
