"""What the fine-tuning programs share.

`data` finds, checks and reads images and masks. `models` are those of three packages, and what
fine-tuning adds to them. `runs` are the folders that training leaves. `distillers` carry knowledge
from the teacher to the student. `evaluation` makes use of runs. `training` has the training loop.
Each of these imports those before it alone. `options`,
`errors` and `files` are about the command line and the disk.
"""
