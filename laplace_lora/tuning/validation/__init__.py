"""Prior, width and temperature by labels that the fit has not seen."""
