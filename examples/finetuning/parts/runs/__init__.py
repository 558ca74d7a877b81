"""The folder of a run: its options, its checkpoints, and the student that it trained."""
