"""What recovery is worth: accuracies under the three protocols, agreement with the experts, label names."""
