"""What the fine-tuning scripts share, one idea in each file."""
