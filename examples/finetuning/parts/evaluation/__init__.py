"""What a student is worth: scores, comparisons of runs, pictures, masks for new prompts."""
