"""The fine-tuning methods: what each adds to a model, one file for each kind."""
