"""What mechanisms share: feature maps, chunked, pooled, banded and segmented computation, each with its backward."""
