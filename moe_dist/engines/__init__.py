"""What runs the model on the ranks: native (PyTorch alone); DeepSpeed and Megatron-Core have their place here."""
