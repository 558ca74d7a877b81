"""What Gram matrices tell, in bits."""
