"""The train-side steps, and the only room that imports torch."""
