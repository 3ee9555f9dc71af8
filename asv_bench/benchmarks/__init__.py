"""fastbn, commit after commit, for asv: times, and in `peers` ratios to a copy, a triad and PyTorch."""
