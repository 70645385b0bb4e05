"""Many videos: supervised worker processes, deadlines, and the files that results are kept in."""
