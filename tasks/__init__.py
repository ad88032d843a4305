"""The stages (download, quantize, mtp_fix, validate, benchmark, publish) and the libraries they are made of."""
