"""How far approximate posteriors are from what they approximate."""
