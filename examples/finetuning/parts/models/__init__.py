"""The models of three packages behind one interface, and what fine-tuning adds to them."""
