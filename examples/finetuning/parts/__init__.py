"""What the fine-tuning programs share.

`data` finds, checks and reads images and masks. `models` are those of three packages, and what
fine-tuning adds to them. `runs` are the folders that training leaves. `evaluation` makes use of
them. `training` has the training loop. Each of these imports those before it alone. `options`,
`errors` and `files` are about the command line and the disk.
"""
