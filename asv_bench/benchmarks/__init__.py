"""Times of fastbn, commit after commit, for asv; README.md and `python -m fastbn` have ratios to memory's own speed."""
