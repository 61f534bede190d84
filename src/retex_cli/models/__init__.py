"""All that runs a forward pass: transformers models, their processors, features of their layers."""
