"""The mathematics of merging: methods as pure functions of tensors, and the engine that streams blocks through them."""
