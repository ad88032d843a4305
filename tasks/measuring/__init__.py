"""What measuring is made of: a pass block by block, the MTP head, decoding, the vision tower, a comparison."""
