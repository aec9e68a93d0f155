"""Model inference: encoding, packing, decoding, and the store of responses."""
