"""Images and masks: found in tables or folders, read by one rule, checked, and put into batches."""
