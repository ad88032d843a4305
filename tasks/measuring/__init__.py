"""What measuring is made of: a pass block by block, the MTP head, decoding, the vision tower, a comparison."""

WINDOWS, LENGTH = 24, 512  # tokens measured on: 24 windows of 512, spread over the text
PROBE = 128  # tokens of the first window whose hidden states are kept at every block
