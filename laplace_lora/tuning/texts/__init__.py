"""The width of a language model: how well a posterior still predicts its training texts."""
