"""The evaluation of one data set: what is collected of its batches, and the figures that come out."""
