"""What the fine-tuning scripts share; each file is one idea and can be copied alone."""
